"""Transformations that reduce the task axis, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import aggregators


def make_deltas():
  """Task vectors whose signs often tie, with zeros and an integer leaf."""
  rng = np.random.default_rng(0)
  deltas = {
    'a': rng.integers(-2, 4, (4, 6, 5)).astype(np.float32),
    'b': rng.normal(size=(4, 7)).astype(np.float32),
    'n': np.zeros((4, 2), np.int32),
  }
  return deltas, jax.tree.map(jnp.asarray, deltas)


def apply(tx, deltas):
  return jax.jit(lambda updates: tx.update(updates, tx.init(None))[0])(deltas)


def test_mean_and_weighted_sum():
  plain, deltas = make_deltas()
  weights = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
  averaged = apply(aggregators.mean(), deltas)
  summed = apply(aggregators.weighted_sum(weights), deltas)
  scaled = apply(aggregators.weighted_sum(0.3), deltas)
  for name in ('a', 'b'):
    x = plain[name]
    for got, want in (
      (averaged[name], x.mean(axis=0)),
      (summed[name], np.tensordot(weights, x, axes=1)),
      (scaled[name], 0.3 * x.sum(axis=0)),
    ):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  for merged in (averaged, summed, scaled):
    assert merged['n'].shape == (2,)
    assert merged['n'].dtype == jnp.int32


def elect(deltas, merge, weights):
  """TIES's election and merge, one entry at a time."""
  vectors = np.concatenate([x.reshape(4, -1) for x in deltas], axis=1)
  signs = [np.sign(sum(entry)) for entry in vectors.T]
  majority = np.sign(sum(signs))
  assert majority
  merged = []
  for entry, sign in zip(vectors.T, signs, strict=True):
    agree = [
      (w, x)
      for w, x in zip(weights, entry, strict=True)
      if x and np.sign(x) == (sign or majority)
    ]
    terms = [w * x for w, x in agree] or [0.0]
    if merge == 'max':
      merged.append(max(terms, key=abs))
    else:
      merged.append(sum(terms) / (len(terms) if merge == 'mean' else 1))
  return np.array(merged)


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('merge', aggregators.MERGES)
def test_elect_mean(merge, sign):
  plain, deltas = make_deltas()
  plain, deltas = jax.tree.map(lambda x: sign * x, (plain, deltas))
  assert (plain['a'].sum(axis=0) == 0).any()  # ties take the majority's sign
  weights = np.array([0.5, 1.0, 2.0, 0.25], np.float32)
  merged = apply(aggregators.elect_mean(merge, weights=weights), deltas)
  got = np.concatenate([np.ravel(merged[name]) for name in 'ab'])
  want = elect([plain['a'], plain['b']], merge, weights)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  assert merged['n'].shape == (2,)


def test_keep_base_drops_the_task_axis():
  _, deltas = make_deltas()
  merged = apply(aggregators.keep_base(), deltas)
  for name, x in deltas.items():
    assert merged[name].shape == x.shape[1:]
    assert merged[name].dtype == x.dtype
    assert not merged[name].any()


@pytest.mark.parametrize(
  ('tx', 'message'),
  [
    (aggregators.weighted_sum([1.0]), r'weights are \[1\].*4 experts'),
    (aggregators.weighted_sum(np.nan), 'finite, got nan'),
    (aggregators.elect_mean(weights=[1.0] * 3), r'weights are \[3\]'),
  ],
)
def test_bad_weights_are_named(tx, message):
  _, deltas = make_deltas()
  with pytest.raises(ValueError, match=message):
    tx.update(deltas, tx.init(None))


def test_unknown_merges_are_named():
  with pytest.raises(ValueError, match="'median'"):
    aggregators.elect_mean('median')
