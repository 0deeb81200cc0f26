"""Aggregators that weigh by statistics, against equations in NumPy."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax import weighted


def update(tx, deltas):
  return tx.update(deltas, optax.EmptyState())[0]


def random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def grams_of(seed, num=3, size=4, rows=9):
  x = random(seed, num, rows, size)
  return np.einsum('kni,knj->kij', x, x)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('epsilon', [0.0, 0.3])
def test_precisions_weigh_entry_by_entry(normalize, epsilon):
  tau = {'a': random(0, 3, 4), 'b': random(1, 3, 2, 2)}
  f = {'a': random(2, 3, 4) ** 2, 'b': random(3, 3, 2, 2) ** 2}
  norms = np.sqrt(sum((x.reshape(3, -1) ** 2).sum(axis=1) for x in f.values()))
  with jax.enable_x64(True):
    tx = weighted.precision_weighted(
      jax.tree.map(jnp.asarray, f), epsilon=epsilon, normalize=normalize
    )
    got = update(tx, jax.tree.map(jnp.asarray, tau))
  for name, x in tau.items():
    w = f[name] + epsilon
    if normalize:
      w = w / (norms + epsilon).reshape(3, *(1,) * (x.ndim - 1))
    want = (w * x).sum(axis=0) / w.sum(axis=0)
    np.testing.assert_allclose(got[name], want, rtol=1e-12)


@pytest.mark.parametrize('epsilon', [0.0, 1e-6])
@pytest.mark.parametrize('normalize', [False, True])
def test_where_no_precision_is_known_it_is_the_mean(normalize, epsilon):
  deltas = {'w': jnp.array([[1.0, 1.0], [3.0, 5.0]])}
  make = functools.partial(
    weighted.precision_weighted, epsilon=epsilon, normalize=normalize
  )
  got = update(make({'w': jnp.zeros((2, 2))}), deltas)['w']
  assert got.tolist() == [2, 3]
  half = update(make({'w': jnp.array([[1.0, 0], [1.0, 0]])}), deltas)['w']
  np.testing.assert_allclose(half, [2, 3], rtol=1e-6)


def test_an_expert_without_precision_has_no_weight():
  deltas = {'w': jnp.array([[1.0, 1.0], [3.0, 5.0]])}
  precisions = {'w': jnp.array([[1.0, 0.5], [0.0, 0.0]])}
  tx = weighted.precision_weighted(precisions, epsilon=1e-6, normalize=True)
  assert update(tx, deltas)['w'].tolist() == [1, 1]


@hypothesis.given(
  st.lists(st.floats(0, 1e6, width=32), min_size=3, max_size=3),
  st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3),
  st.booleans(),
)
def test_precisions_stay_between_the_experts(precisions, values, normalize):
  tx = weighted.precision_weighted(
    {'w': jnp.array(precisions, jnp.float32)[:, None]}, normalize=normalize
  )
  merged = update(tx, {'w': jnp.array(values, jnp.float32)[:, None]})['w']
  margin = 1e-5 * max(map(abs, values))
  assert min(values) - margin <= float(merged[0]) <= max(values) + margin


@pytest.mark.parametrize('scale', [0.0, 0.9, 1.0])
@pytest.mark.parametrize('shape', [(4,), (4, 5), (4, 2, 3)])
def test_grams_solve_their_equations(shape, scale):
  tau, grams = random(0, 3, *shape), grams_of(1)
  scaled = [scale * g + (1 - scale) * np.diag(np.diag(g)) for g in grams]
  want = np.linalg.solve(
    sum(scaled),
    sum(g @ t.reshape(4, -1) for g, t in zip(scaled, tau, strict=True)),
  )
  with jax.enable_x64(True):
    tx = weighted.gram_weighted({'w': jnp.asarray(grams)}, scale=scale)
    got = update(tx, {'w': jnp.asarray(tau), 'b': jnp.asarray(tau)})
  np.testing.assert_allclose(got['w'], want.reshape(shape), rtol=1e-10)
  np.testing.assert_allclose(got['b'], tau.mean(axis=0), rtol=1e-12)


def test_grams_keep_outputs_best():
  x, tau = random(0, 3, 9, 4), random(1, 3, 4, 2)
  grams = jnp.asarray(np.einsum('kni,knj->kij', x, x), jnp.float32)
  tx = weighted.gram_weighted({'w': grams}, scale=1.0)
  merged = np.asarray(update(tx, {'w': jnp.asarray(tau, jnp.float32)})['w'])

  def loss(w):
    return sum(((a @ (w - t)) ** 2).sum() for a, t in zip(x, tau, strict=True))

  for seed in range(5):
    assert loss(merged) < loss(merged + 0.03 * random(2 + seed, 4, 2))


def test_common_factors_of_grams_do_not_matter():
  deltas = {'w': jnp.asarray(random(0, 3, 4, 2), jnp.float32)}
  grams = jnp.asarray(grams_of(1), jnp.float32)
  got = [
    update(weighted.gram_weighted({'w': factor * grams}), deltas)['w']
    for factor in (1.0, 2.0**-60, 2.0**60)
  ]
  np.testing.assert_array_equal(got[0], got[1])
  np.testing.assert_array_equal(got[0], got[2])


@pytest.mark.parametrize('scale', [0.9, 1.0])
def test_inputs_that_nobody_has_get_the_mean(scale):
  tau = jnp.asarray(random(0, 3, 4, 2), jnp.float32)
  grams = grams_of(1)
  grams[:, 2] = grams[:, :, 2] = 0
  kept = [0, 1, 3]
  for g in (grams, 0 * grams):
    g = jnp.asarray(g, jnp.float32)
    tx = weighted.gram_weighted({'w': g}, scale=scale)
    merged = update(tx, {'w': tau})['w']
    np.testing.assert_allclose(merged[2], tau.mean(axis=0)[2], rtol=1e-6)
    tx = weighted.gram_weighted({'w': g[:, kept][:, :, kept]}, scale=scale)
    others = update(tx, {'w': tau[:, np.array(kept)]})['w']
    np.testing.assert_allclose(
      merged[np.array(kept)], others, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize('rows', [1, 2])
def test_few_rows_do_not_break_unscaled_grams(rows):
  x, tau = random(0, rows, 6), random(1, 2, 6, 3)
  grams = jnp.asarray(np.stack([x.T @ x, 3 * x.T @ x]), jnp.float32)
  tx = weighted.gram_weighted({'w': grams}, scale=1.0)
  merged = np.asarray(update(tx, {'w': jnp.asarray(tau, jnp.float32)})['w'])
  assert np.abs(merged).max() < 20 * np.abs(tau).max()
  np.testing.assert_allclose(
    x @ merged, x @ (tau[0] + 3 * tau[1]) / 4, atol=1e-4
  )


def test_all_zero_task_vectors_stay_zero():
  tx = weighted.gram_weighted({'w': jnp.asarray(grams_of(1), jnp.float32)})
  assert not update(tx, {'w': jnp.zeros((3, 4, 2))})['w'].any()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: weighted.precision_weighted({}, epsilon=-1.0), 'got -1.0'),
    (lambda: weighted.precision_weighted({}, epsilon=np.inf), 'got inf'),
    (lambda: weighted.gram_weighted({}, scale=1.5), r'\[0, 1\], got 1.5'),
    (lambda: weighted.gram_weighted({}, scale=np.nan), 'got nan'),
  ],
)
def test_bad_hyperparameters_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_all_that_does_not_fit_is_named():
  deltas = {'w': jnp.zeros((3, 4, 2)), 'b': jnp.zeros(3), 'n': jnp.arange(3)}
  tx = weighted.precision_weighted({'w': jnp.zeros((3, 4)), 'b': jnp.zeros(3)})
  with pytest.raises(ValueError, match='precisions do not fit') as error:
    update(tx, deltas)
  assert 'n: missing' in str(error.value)
  assert 'w: got float32[3, 4]' in str(error.value)
  square = jnp.zeros((3, 4, 4))
  grams = {'w': square[:2], 'b': square, 'n': square, 'v': square}
  with pytest.raises(ValueError, match='Grams do not fit') as error:
    update(weighted.gram_weighted(grams), deltas)
  for line in (
    'w: got a Gram [2, 4, 4] of float32[3, 4, 2]',
    'b: got a Gram [3, 4, 4] of float32[3]',
    'n: got a Gram [3, 4, 4] of int32[3]',
    'v: no such leaf',
  ):
    assert line in str(error.value)


def test_scales_can_be_swept():
  base = {'w': jnp.zeros((4, 2))}
  experts = {'w': jnp.asarray(random(0, 3, 4, 2), jnp.float32)}
  grams = {'w': jnp.asarray(grams_of(1), jnp.float32)}

  def merge(scale):
    tx = weighted.gram_weighted(grams, scale=scale)
    return dj.merge(tx, base, experts).params['w']

  swept = jax.vmap(merge)(jnp.array([0.0, 0.5]))
  for scale, got in zip((0.0, 0.5), swept, strict=True):
    np.testing.assert_allclose(got, merge(scale), rtol=1e-5, atol=1e-6)
