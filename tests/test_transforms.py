"""Transformations that keep the task axis, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import transforms


def make_deltas():
  """Task vectors with repeated magnitudes and zeros."""
  rng = np.random.default_rng(0)
  deltas = {
    'a': rng.integers(-6, 7, (3, 4, 5)).astype(np.float32),
    'b': rng.normal(size=(3, 30)).astype(np.float32),
  }
  return jax.tree.map(jnp.asarray, deltas)


def apply(tx, deltas):
  return tx.update(deltas, tx.init(None))[0]


def keep_largest(x, density):
  """Keeps what reaches the magnitude of rank `P - floor(density P)`."""
  rank = x.size - int(density * x.size)
  threshold = np.sort(np.abs(x))[max(rank, 1) - 1]
  return np.where(np.abs(x) >= threshold, x, 0)


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('density', [0.01, 0.25, 0.5, 1.0])
def test_trim_ranks_the_model_or_each_leaf(density, traced):
  deltas = make_deltas()

  def trim(density, scope):
    return apply(transforms.trim(density, scope=scope), deltas)

  trim = jax.jit(trim, static_argnums=(1,) if traced else (0, 1))
  by_leaf, by_model = trim(density, 'leaf'), trim(density, 'model')
  for k in range(3):
    for name, x in deltas.items():
      want = keep_largest(np.asarray(x[k]).ravel(), density)
      np.testing.assert_array_equal(by_leaf[name][k].ravel(), want)
    joined = np.concatenate([np.ravel(x[k]) for x in deltas.values()])
    want = keep_largest(joined, density)
    got = np.concatenate([np.ravel(x[k]) for x in by_model.values()])
    np.testing.assert_array_equal(got, want)


def test_trim_keeps_one_more_than_the_floor():
  x = jnp.array([[5.0, -4.0, 3.0, -2.0, 1.0]])
  for density, kept in ((0.1, 1), (0.2, 2), (0.5, 3), (0.79, 4), (0.99, 5)):
    out = apply(transforms.trim(density), {'w': x})['w']
    assert np.count_nonzero(out) == kept


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'float64'])
def test_trim_ranks_every_float(dtype):
  rng = np.random.default_rng(3)
  x = rng.normal(size=40) * 10.0 ** rng.integers(-7, 4, 40)
  x[:6] = [0.0, -0.0, np.inf, -np.inf, 6e-8, -6e-8]  # subnormal in float16
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray(x, dtype)
    for density in (0.01, 0.1, 0.5, 0.9, 0.96, 1.0):
      out = apply(transforms.trim(density), {'w': x[None]})['w']
      assert out.dtype == dtype
      want = keep_largest(np.asarray(x, np.float64), density)
      np.testing.assert_array_equal(np.asarray(out[0], np.float64), want)


def test_drop_keeps_what_exceeds_the_rate():
  uniform = np.random.default_rng(1).uniform(size=(3, 4, 5)).astype(np.float32)
  uniform[0, 0, 0] = 0.25
  deltas = {'a': make_deltas()['a']}
  for rescale, factor in ((True, 1 / 0.75), (False, 1.0)):
    tx = transforms.drop(
      0.25, rescale=rescale, uniform_fn=lambda key, leaf: jnp.asarray(uniform)
    )
    want = np.where(uniform > 0.25, factor * np.asarray(deltas['a']), 0)
    np.testing.assert_allclose(apply(tx, deltas)['a'], want, rtol=1e-6)


def test_drop_gives_each_leaf_its_own_key():
  keys = []

  def record(key, leaf):
    keys.append(tuple(jax.random.key_data(key).tolist()))
    return jnp.ones(leaf.shape)

  tx = transforms.drop(0.5, uniform_fn=record)
  deltas, state = make_deltas(), tx.init(None)
  for _ in range(2):
    _, state = tx.update(deltas, state)
  assert len(set(keys)) == 4


def test_scale_tasks_has_one_weight_a_task():
  deltas, weights = make_deltas(), [2.0, 0.0, -1.0]
  scaled = apply(transforms.scale_tasks(weights), deltas)
  for name, x in deltas.items():
    want = np.stack([w * np.asarray(x[k]) for k, w in enumerate(weights)])
    np.testing.assert_array_equal(scaled[name], want)


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    ([1.0, 2.0], r'weights are \[2\], want one for each of 3 experts'),
    (np.ones((3, 1)), r'weights are \[3, 1\]'),
    ([1.0, np.inf, 0.0], r'must be finite, got \[1.0, inf, 0.0\]'),
  ],
)
def test_scale_tasks_refuses(weights, message):
  with pytest.raises(ValueError, match=message):
    apply(transforms.scale_tasks(weights), make_deltas())


def test_mask_by_takes_a_mask_for_all_or_for_each():
  deltas, rng = make_deltas(), np.random.default_rng(2)
  masks = {'a': rng.uniform(size=(4, 5)), 'b': rng.uniform(size=(3, 30))}
  masked = apply(transforms.mask_by(masks), deltas)
  for name, x in deltas.items():
    want = np.asarray(x) * masks[name]
    np.testing.assert_allclose(masked[name], want, rtol=1e-6)
  with pytest.raises(ValueError, match='b'):
    apply(transforms.mask_by({'a': masks['a']}), deltas)
