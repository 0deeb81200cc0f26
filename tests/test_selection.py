"""The threshold of the largest entries is the entry a sort would give."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import selection


def sorted_threshold(magnitude, density, more):
  size = magnitude.shape[-1]
  kept = min(max(int(np.floor(density * size)) + more, 1), size)
  return np.sort(magnitude, axis=-1)[..., size - kept]


def make(size, seed=0):
  """Returns magnitudes of which many are equal and some are zero."""
  rng = np.random.default_rng(seed)
  x = np.abs(rng.normal(size=(2, size)) * 10.0 ** rng.integers(-9, 4, size))
  x[:, ::3] = np.round(x[:, ::3], 1)
  return x.astype(np.float32)


@hypothesis.given(
  size=st.sampled_from([1, 2, 50]),
  density=st.floats(1e-3, 1.0),
  more=st.integers(0, 1),
  seed=st.integers(0, 9),
)
def test_is_what_a_sort_gives(size, density, more, seed):
  x = make(size, seed)
  got = selection.threshold(jnp.asarray(x), density, more=more)
  np.testing.assert_array_equal(got, sorted_threshold(x, density, more))


def test_bits_and_halves_agree():
  x = make(70_000)
  for density in (0.2, 0.9):
    want = sorted_threshold(x, density, 1)
    got = selection.threshold(jnp.asarray(x), density)
    np.testing.assert_array_equal(got, want)
    rank = x.shape[1] - int(np.floor(density * x.shape[1]))
    np.testing.assert_array_equal(selection.ranked(jnp.asarray(x), rank), want)
    np.testing.assert_array_equal(
      selection.reaches(jnp.asarray(x), rank), x >= want[:, None]
    )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'float64'])
def test_every_float_has_its_own_rank(dtype):
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray([0.0, 6e-8, 1e-3, 1.0, 3e4, np.inf], dtype)
    for i, want in enumerate(x):
      density = (len(x) - i) / len(x)
      got = selection.threshold(x, density, more=0)
      assert got == want
      assert got.dtype == dtype


def test_parts_give_what_the_whole_gives():
  x = make(301)
  parts = np.split(x, [1, 151], axis=1)  # of two shapes: each is compiled
  totals = []

  class Next(Exception):
    pass

  def run(part):
    """Runs up to the first question without an answer."""
    known = iter(totals)

    def sum_parts(histogram, finish, *args):
      for answer in known:
        return answer
      asked.append((histogram, finish, args))
      raise Next

    return selection.threshold(part, 0.3, sum_parts=sum_parts)

  for _ in range(2):
    asked = []
    for part in parts:
      with pytest.raises(Next):
        run(jnp.asarray(part))
    total = functools.reduce(jnp.add, [a[0] for a in asked])
    totals.append(asked[0][1](total, *asked[0][2]))
  for part in parts:
    got = run(jnp.asarray(part))
    np.testing.assert_array_equal(got, sorted_threshold(x, 0.3, 1))


def test_compiles_to_no_sort():
  compiled = jax.jit(lambda x: selection.threshold(x, 0.2))
  text = compiled.lower(jnp.zeros((2, 1000))).compile().as_text()
  assert 'sort(' not in text
