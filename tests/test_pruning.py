"""Pruning by rank in leaves and units, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import pruning
from dam_jax import transforms

SHAPES = {'bias': (7,), 'conv': (2, 3, 4), 'kernel': (5, 4), 'scale': ()}


def make_deltas():
  rng = np.random.default_rng(4)
  return {
    name: rng.normal(size=(2, *shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }


def apply(tx, deltas):
  return jax.jit(lambda u: tx.update(u, tx.init(None))[0])(deltas)


def by_unit(vector_fn, x, unit_axis):
  """Applies a function of a vector to each unit of a leaf."""
  if unit_axis is None or x.ndim < 2:
    return vector_fn(x.ravel()).reshape(x.shape)
  rows = np.moveaxis(x, unit_axis, 0)
  out = [vector_fn(row.ravel()).reshape(row.shape) for row in rows]
  return np.moveaxis(np.stack(out), 0, unit_axis)


def keep_probability(row):
  """From 0.9 for the largest entry to 0.3 for the smallest."""
  out = np.zeros(row.size)
  for rank, i in enumerate(np.argsort(-abs(row))):
    out[i] = 0.9 - 0.6 * rank / max(row.size - 1, 1)
  return out


@pytest.mark.parametrize(
  ('unit_axis', 'rescale'),
  [
    (-1, True),
    (0, True),
    (None, True),
    (-1, 'l1'),
    (-1, False),
  ],
)
def test_magprune_ranks_each_unit(unit_axis, rescale):
  deltas, rng = make_deltas(), np.random.default_rng(5)
  uniforms = {n: rng.uniform(size=x.shape) for n, x in deltas.items()}
  draws = iter(jnp.asarray(u, jnp.float32) for u in uniforms.values())
  tx = pruning.magprune(
    0.6,
    epsilon=0.3,
    unit_axis=unit_axis,
    rescale=rescale,
    uniform_fn=lambda key, leaf: next(draws),
  )
  got = apply(tx, deltas)
  for name, x in deltas.items():
    for k in range(2):
      keep = by_unit(keep_probability, x[k], unit_axis)
      kept = np.where(uniforms[name][k] >= 1 - keep, x[k], 0)
      if rescale is True:
        kept = kept / keep
      elif rescale == 'l1' and kept.any():
        kept = kept * abs(x[k]).sum() / abs(kept).sum()
      np.testing.assert_allclose(got[name][k], kept, rtol=1e-5)


def test_magprune_without_a_spread_is_drop():
  deltas = make_deltas()
  pruned = apply(pruning.magprune(0.7, epsilon=0.0, seed=3), deltas)
  dropped = apply(transforms.drop(1 - 0.7, seed=3), deltas)
  for name, x in pruned.items():
    np.testing.assert_allclose(x, dropped[name], rtol=1e-6)


def test_magprune_keeps_each_rank_at_its_rate():
  x = jnp.broadcast_to(jnp.arange(1.0, 6.0), (1, 20_000, 5))
  tx = pruning.magprune(0.5, epsilon=0.2, unit_axis=0, rescale=False)
  kept = np.mean(apply(tx, {'w': x})['w'] != 0, axis=(0, 1))
  rates = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
  deviation = np.sqrt(rates * (1 - rates) / 20_000)
  assert (abs(kept - rates) < 4 * deviation).all()
  assert (abs(kept - rates - 0.03) > 4 * deviation).all()


def keep_middle(row, *, density, gamma):
  """mergekit's counts, by sorting."""
  kept, top = int(density * row.size), int(gamma * row.size)
  low = max(row.size - kept - top, 0)
  out = np.zeros_like(row)
  chosen = np.argsort(abs(row))[low : low + kept]
  out[chosen] = row[chosen]
  return out


@pytest.mark.parametrize('unit_axis', [None, 0, -1])
def test_keep_middle_counts_as_mergekit_does(unit_axis):
  deltas = make_deltas()

  def keep(density, gamma):
    tx = pruning.keep_middle(density, gamma=gamma, unit_axis=unit_axis)
    return apply(tx, deltas)

  traced = jax.jit(keep)
  for shares, run in (
    ((0.5, 0.0), traced),
    ((0.4, 0.3), traced),
    ((0.9, 0.3), traced),
    ((1.0, 0.2), traced),
    ((0.1, 0.01), traced),
    ((0.4, 0.3), keep),
  ):
    got, [density, gamma] = run(*shares), shares
    middle = functools.partial(keep_middle, density=density, gamma=gamma)
    for name, x in deltas.items():
      for k in range(2):
        want = by_unit(middle, x[k], unit_axis)
        np.testing.assert_array_equal(got[name][k], want)


def test_keep_middle_drops_what_equals_an_outlier():
  x = jnp.array([[4.0, -4.0, 3.0, 2.0, -2.0, 1.0, 0.0, 0.0]])
  out = apply(pruning.keep_middle(0.5, gamma=0.125), {'w': x})['w']
  # Of 4 and -4 one is an outlier, so both go; three are kept for four.
  assert out.tolist() == [[0, 0, 3, 2, -2, 0, 0, 0]]
