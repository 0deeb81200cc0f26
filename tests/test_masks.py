"""Relaxed Bernoulli masks: their distribution, gradients and arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import masks
from dam_jax import tree

K = 3


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def deviation(hits, probability):
  """Returns by how many deviations a share departs from a probability."""
  variance = probability * (1 - probability) / np.size(hits)
  return abs(np.mean(hits) - probability) / np.sqrt(variance)


@pytest.mark.parametrize('temperature', [0.1, 0.5, 2.0])
@pytest.mark.parametrize('logit', [-2.0, 0.0, 0.7])
def test_sample_exceeds_a_half_with_the_probability_of_one(logit, temperature):
  logits = jnp.full(40_000, logit)
  layout = tree.ravel(logits).layout

  @jax.jit
  def draw(key):
    uniform = masks.uniform(key, jnp.int32(0), logits, layout)
    return masks.sample(logits, uniform, temperature)

  for seed in range(3):
    m = np.asarray(draw(jax.random.key(seed)))
    assert ((m > 0) & (m < 1)).all()
    hit = m > 0.5
    assert deviation(hit, sigmoid(logit)) < 4
    assert deviation(hit, sigmoid(logit + 0.1)) > 4
    assert deviation(hit, sigmoid(logit - 0.1)) > 4


def test_sample_is_the_formula():
  rng = np.random.default_rng(0)
  u, logits = rng.uniform(size=50), rng.normal(size=50)
  z = (np.log(u) - np.log1p(-u) + logits) / 0.3
  got = masks.sample(
    jnp.asarray(logits, jnp.float32), jnp.asarray(u, jnp.float32), 0.3
  )
  np.testing.assert_allclose(got, sigmoid(z), rtol=1e-4, atol=1e-6)


def test_sample_is_finite_at_the_ends():
  logits = jnp.array([-200.0, -200.0, 0.0, 0.0, 200.0, 200.0])
  uniform = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
  m, pullback = jax.vjp(lambda x: masks.sample(x, uniform, 0.1), logits)
  assert ((m > 0) & (m < 1)).all()
  assert jnp.isfinite(pullback(jnp.ones_like(m))[0]).all()
  # Probabilities are clamped like the draws, so that the two ends cancel.
  np.testing.assert_allclose(m[jnp.array([1, 4])], 0.5, atol=1e-3)


def test_gradient_of_sample_is_its_difference_quotient():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    logits, uniform = jnp.asarray(rng.normal(size=20)), rng.uniform(size=20)

    @jax.jit
    def sample(x):
      return masks.sample(x, jnp.asarray(uniform), 0.5)

    grad = jax.grad(lambda x: sample(x).sum())(logits)
    quotient = (sample(logits + 1e-5) - sample(logits - 1e-5)) / 2e-5
    np.testing.assert_allclose(grad, quotient, rtol=1e-6)
    assert (grad > 0).all()


def test_uniform_changes_with_the_step_and_key_and_repeats():
  def draw(seed, step):
    like = jnp.zeros((2, 50))
    layout = tree.ravel(like[0]).layout
    return masks.uniform(jax.random.key(seed), jnp.int32(step), like, layout)

  np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
  assert (draw(0, 3) != draw(0, 4)).all()
  assert (draw(0, 3) != draw(1, 3)).all()


def test_value_while_learning_and_after():
  logits = jnp.array([-1.0, 0.0, 2.0])
  uniform = jnp.array([0.2, 0.6, 0.1])
  sampled = masks.sample(logits, uniform, 0.5)
  mask, plain = masks.Mask(temperature=0.5), masks.Mask(temperature=None)
  expected = sigmoid(logits)
  for got, want in (
    (masks.value(mask, logits, uniform), sampled),
    (masks.value(plain, logits, uniform), expected),
    (masks.final_value(mask, logits, uniform, 'sample'), sampled),
    (masks.final_value(plain, logits, uniform, 'sample'), expected),
    (masks.final_value(mask, logits, uniform, 'expected'), expected),
    (masks.final_value(mask, logits, uniform, 'mode'), [0, 0, 1]),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.fixture
def flat():
  """Task vectors `[K, 11]` of three leaves, two of one size."""
  rng = np.random.default_rng(0)
  leaves = {
    'a': rng.normal(size=(K, 2, 2)),
    'b': rng.normal(size=(K, 3)),
    'c': rng.normal(size=(K, 4)),
  }
  leaves = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), leaves)
  return tree.ravel(leaves, leading=1)


@pytest.fixture(params=[2, 3, 8])
def cut(request, flat):
  """The same over several shards, none of which divides all leaves."""
  return tree.ravel(flat.unravel(), leading=1, shards=request.param)


def _in_order(vector, layout):
  """Puts the entries of shards `[..., N, Q]` in order, `[..., P]`."""
  order = np.argsort(layout.places(), axis=None)[: sum(layout.sizes)]
  return np.asarray(vector).reshape(*vector.shape[:-2], -1)[..., order]


@pytest.mark.parametrize('rows', [(), (K,), (2, K)])
def test_a_draw_does_not_depend_on_shards(flat, cut, rows):
  key, step = jax.random.key(3), jnp.int32(7)
  like = jnp.zeros((*rows, *flat.layout.shape))
  want = masks.uniform(key, step, like, flat.layout)
  like = jnp.zeros((*rows, *cut.layout.shape))
  got = masks.uniform(key, step, like, cut.layout)
  np.testing.assert_array_equal(_in_order(got, cut.layout), want)


def test_a_draw_over_shards_wants_keys_that_are_counted(cut):
  key, like = jax.random.key(0, impl='rbg'), jnp.zeros(cut.layout.shape)
  with pytest.raises(ValueError, match='threefry2x32 in float32, got rbg'):
    masks.uniform(key, jnp.int32(0), like, cut.layout)


def test_shards_keep_means_and_sums(flat, cut):
  np.testing.assert_array_equal(_in_order(cut.vector, cut.layout), flat.vector)
  np.testing.assert_allclose(
    masks.leaf_means(cut.vector, cut.layout),
    masks.leaf_means(flat.vector, flat.layout),
    rtol=1e-5,
    atol=1e-7,
  )
  kinds = {'own': masks.Mask(per_task=True), 'shared': masks.Mask(rescale=2.0)}
  coefficients = jnp.asarray([[0.1, 0.2, 0.3], [1, 2, 3], [-1, 0, 1]])

  def total(x):
    values = {'own': jnp.abs(x.vector), 'shared': jnp.abs(x.vector[0])}
    return masks.masked_sum(x.vector, x.layout, coefficients, kinds, values)

  np.testing.assert_allclose(
    _in_order(total(cut), cut.layout), total(flat), rtol=1e-5, atol=1e-6
  )


def test_leaf_means_and_sparsity(flat):
  mask = flat.vector
  assert flat.layout.names == ('b', 'a', 'c')
  want = np.stack(
    [np.asarray(mask)[:, at].mean(axis=1) for at in flat.layout.slices], axis=1
  )
  got = masks.leaf_means(mask, flat.layout)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  share = masks.sparsity(mask, flat.layout)
  for name, at in zip(flat.layout.names, flat.layout.slices, strict=True):
    want = (1 - sigmoid(mask[:, at])).mean(axis=1)
    np.testing.assert_allclose(share[name], want, rtol=1e-5)


def test_leaf_scale_divides_by_means_or_multiplies(flat):
  m = jnp.abs(flat.vector).at[1, flat.layout.slices[2]].set(0)
  scale = masks.leaf_scale(masks.Mask(), m, flat.layout)
  means = masks.leaf_means(m, flat.layout)
  np.testing.assert_allclose(
    (scale * means).ravel(), [1] * 5 + [0] + [1] * 3, rtol=1e-6
  )
  assert scale[1, 2] == 1
  scale = masks.leaf_scale(masks.Mask(rescale=2.5), m[0], flat.layout)
  assert scale.tolist() == [2.5] * 3


@pytest.mark.parametrize('by_leaf', [False, True])
@pytest.mark.parametrize('names', [(), ('one',), ('one', 'two', 'own')])
def test_masked_sum_is_a_loop_over_tasks_and_leaves(flat, names, by_leaf):
  rng = np.random.default_rng(1)
  w = rng.normal(size=(K, 3) if by_leaf else K)
  specs = {
    'one': masks.Mask(),
    'two': masks.Mask(rescale=2.0),
    'own': masks.Mask(per_task=True),
  }
  values = {
    'one': rng.uniform(size=11),
    'two': rng.uniform(size=11),
    'own': rng.uniform(size=(K, 11)),
  }
  want = np.zeros(11)
  for k in range(K):
    for i, at in enumerate(flat.layout.slices):
      term = np.asarray(flat.vector[k, at]) * w[(k, i) if by_leaf else k]
      for name in names:
        m = values[name][k, at] if name == 'own' else values[name][at]
        term = term * m * (2.0 if name == 'two' else 1 / m.mean())
      want[at] += term
  values = {name: jnp.asarray(values[name], jnp.float32) for name in names}
  got = jax.jit(
    lambda w: masks.masked_sum(flat.vector, flat.layout, w, specs, values)
  )(jnp.asarray(w, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_overlap_is_a_soft_jaccard_index():
  rng = np.random.default_rng(0)
  a, b = rng.uniform(size=(2, 2, 9)).astype(np.float32)
  want = np.minimum(a, b).sum(axis=1) / np.maximum(a, b).sum(axis=1)
  a, b = jnp.asarray(a), jnp.asarray(b)
  np.testing.assert_allclose(masks.overlap(a, b), want, rtol=1e-5)
  np.testing.assert_array_equal(masks.overlap(a, a), [1, 1])
  np.testing.assert_array_equal(masks.overlap(a, 0 * a), [0, 0])
  np.testing.assert_array_equal(masks.overlap(0 * a, 0 * a), [1, 1])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': 0.0}, 'temperature.*got 0.0'),
    ({'temperature': float('nan')}, 'temperature.*got nan'),
    ({'rescale': 'sum'}, "rescale.*got 'sum'"),
  ],
)
def test_bad_masks_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    masks.Mask(**options)
