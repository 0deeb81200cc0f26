"""Merges by angles, against plain NumPy and closed forms."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import geometry


def make_models(num, seed=0, *, spread=1.0):
  """Returns a base and experts: a matrix, a bias and a number."""
  rng = np.random.default_rng(seed)
  base = {'w': rng.normal(size=(6, 4)), 'b': rng.normal(size=5), 's': 2.0}
  experts = [
    {n: x + spread * rng.normal(size=np.shape(x)) for n, x in base.items()}
    for _ in range(num)
  ]
  return base, experts


def merge(tx, base, experts):
  def to_jax(model):
    return {n: jnp.asarray(x, jnp.float32) for n, x in model.items()}

  stacked = dj.tree.stack([to_jax(e) for e in experts])
  return jax.jit(lambda b, e: dj.merge(tx, b, e).params)(to_jax(base), stacked)


def by_unit(vectors_fn, leaves, unit_axis):
  """Applies a function of vectors to each unit of a leaf."""
  if unit_axis is None or leaves[0].ndim < 2:
    return vectors_fn([x.ravel() for x in leaves]).reshape(leaves[0].shape)
  rows = [np.moveaxis(x, unit_axis, 0) for x in leaves]
  out = [vectors_fn([r[i] for r in rows]) for i in range(len(rows[0]))]
  return np.moveaxis(np.stack(out), 0, unit_axis)


def arc(t, a, b):
  """Shoemake's equation, and a line where an angle is zero or undefined."""
  cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
  angle = np.arccos(np.clip(cosine, -1, 1))
  if np.sin(angle) < 1e-6:
    return (1 - t) * a + t * b
  return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize(
  ('space', 'unit_axis'),
  [('delta', None), ('delta', 0), ('weights', None), ('weights', -1)],
)
def test_nuslerp(space, unit_axis):
  base, experts = make_models(2)
  tx = dj.nuslerp([1.0, 3.0], space=space, unit_axis=unit_axis)
  got = merge(tx, base, experts)
  for name, p in base.items():
    origin = np.asarray(p if space == 'delta' else np.zeros_like(p))
    want = origin + by_unit(
      lambda v: arc(0.75, *v), [e[name] - origin for e in experts], unit_axis
    )
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5)


def test_nuslerp_of_equal_weights_is_exact():
  base, _ = make_models(1)
  for unit_axis in (None, -1):
    tx = dj.nuslerp([0.7, 0.3], space='weights', unit_axis=unit_axis)
    got = merge(tx, base, [base, base])
    for name, x in base.items():
      np.testing.assert_array_equal(got[name], np.float32(x))


def karcher(vectors, shares, steps=10, tol=1e-5):
  """The mean of directions, with the mean of lengths."""
  lengths = np.array([np.linalg.norm(v) for v in vectors])
  units = [v / n for v, n in zip(vectors, lengths, strict=True)]
  mean = sum(a * u for a, u in zip(shares, units, strict=True))
  mean = mean / np.linalg.norm(mean)
  for _ in range(steps):
    step = 0.0
    for a, u in zip(shares, units, strict=True):
      angle = np.arccos(np.clip(mean @ u, -1, 1))
      if angle >= tol:
        pull = angle / np.sin(angle)
        step = step + a * pull * (u - np.cos(angle) * mean)
    length = np.linalg.norm(step)
    if length < tol:
      break
    mean = np.cos(length) * mean + np.sin(length) * step / length
    mean /= np.linalg.norm(mean)
  return shares @ lengths * mean


@pytest.mark.parametrize('space', ['delta', 'weights'])
def test_karcher(space):
  base, experts = make_models(4)
  weights = np.array([0.5, 1.0, 2.0, 0.5])
  got = merge(dj.karcher(weights, space=space), base, experts)
  for name in 'wb':
    origin = base[name] if space == 'delta' else 0.0
    vectors = [np.ravel(e[name] - origin) for e in experts]
    want = karcher(vectors, weights / weights.sum())
    want = origin + want.reshape(base[name].shape)
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-4)


@jax.jit
def karcher_of_two(models, weights):
  base, experts = {'w': jnp.ones(models.shape[1:])}, {'w': models}
  return dj.merge(dj.karcher(weights), base, experts).params['w']


@hypothesis.given(
  t=st.floats(0.0, 1.0),
  seed=st.integers(0, 5),
  spread=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
)
def test_karcher_of_two_directions_is_on_their_arc(t, seed, spread):
  _, experts = make_models(2, seed, spread=spread)
  a, b = (e['w'].ravel() / np.linalg.norm(e['w']) for e in experts)
  models = jnp.asarray(np.stack([a, b]), jnp.float32)
  got = karcher_of_two(models, jnp.array([1 - t, t], jnp.float32))
  np.testing.assert_allclose(got, arc(t, a, b), atol=2e-5)


def test_karcher_is_swept_by_vmap():
  models = jnp.array([[3.0, 0.0], [0.0, 1.0]])
  weights = jnp.array([[1.0, 1.0], [1.0, 3.0], [1.0, 0.0]])
  swept = jax.vmap(lambda w: karcher_of_two(models, w))(weights)
  for got, w in zip(swept, weights, strict=True):
    np.testing.assert_allclose(got, karcher_of_two(models, w), rtol=1e-6)


def test_karcher_of_zeros_and_of_opposites():
  def karcher_of(*models):
    return karcher_of_two(jnp.array(models), jnp.ones(2))

  zero = karcher_of([0.0, 0.0], [0.0, 0.0])
  np.testing.assert_array_equal(zero, [0, 0])
  # Zeros have no direction but shorten the mean.
  shortened = karcher_of([0.0, 0.0], [4.0, 2.0])
  np.testing.assert_allclose(shortened, [2, 1], rtol=1e-6)
  # Opposites have no mean: it stays where the first points.
  opposite = karcher_of([3.0, 0.0], [-1.0, 0.0])
  np.testing.assert_allclose(opposite, [2, 0], atol=1e-6)


def stock(vectors, pairs):
  num = len(vectors)
  cosines = [
    a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    for i, a in enumerate(vectors)
    for b in vectors[:i]
  ]
  c = np.mean(cosines)
  if pairs == 'angle':
    c = np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))
  return num * c / (1 + (num - 1) * c) * sum(vectors) / num


@pytest.mark.parametrize(
  ('pairs', 'unit_axis'),
  [('cosine', None), ('cosine', 0), ('cosine', -1), ('angle', None)],
)
def test_model_stock(pairs, unit_axis):
  base, experts = make_models(3)
  common = {n: np.full(np.shape(x), 1.5) for n, x in base.items()}
  experts = [{n: x + common[n] for n, x in e.items()} for e in experts]
  tx = dj.model_stock(unit_axis=unit_axis, pairs=pairs)
  got = merge(tx, base, experts)
  for name, p in base.items():
    deltas = [np.asarray(e[name] - p) for e in experts]
    want = p + by_unit(lambda v: stock(v, pairs), deltas, unit_axis)
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5)


def test_model_stock_stays_where_no_length_is_known():
  tx = geometry.model_stock()
  update = jax.jit(lambda deltas: tx.update(deltas, tx.init(None))[0])
  for second in ([0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]):
    assert not update({'w': jnp.array([[1.0, 0.0], second])})['w'].any()
  with pytest.raises(ValueError, match='at least 2 experts, got 1'):
    tx.update({'w': jnp.ones((1, 2))}, tx.init(None))
