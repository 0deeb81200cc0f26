"""Statistics of experts, against a second reading of them in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import statistics

NUM, BATCH, PIXELS, CLASSES = 2, 6, 4, 3
RNG = np.random.default_rng(0)
W = RNG.normal(size=(NUM, PIXELS, CLASSES))
B = RNG.normal(size=(NUM, CLASSES))
X = RNG.normal(size=(NUM, BATCH, PIXELS))
LABELS = np.eye(CLASSES)[RNG.integers(0, CLASSES, (NUM, BATCH))]


def logits_fn(params, task, images):
  x = images.reshape(len(images), -1)
  logits = x @ params['w'] + params['b'].astype(x.dtype)[None]
  return jnp.concatenate(
    [logits, jnp.full_like(logits[:, :1], dj.losses.MASKED_LOGIT)], axis=1
  )


def images(x):
  return jnp.asarray(x).reshape(*x.shape[:2], 2, 2, 1)


def references(labels):
  return jnp.asarray(np.concatenate([labels, 0 * labels[..., :1]], axis=-1))


def experts(dtype=None):
  return {'b': jnp.asarray(B, dtype), 'w': jnp.asarray(W, dtype)}


def accumulate(accumulator, models, *batches, seed=0):
  carry = accumulator.init(jax.random.key(seed), models, batches[0][0])
  update = jax.jit(accumulator.update)
  for batch in batches:
    carry = update(carry, models, *batch)
  return accumulator.finalize(carry)


def probabilities(t):
  z = X[t] @ W[t] + B[t]
  e = np.exp(z - z.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def gradients(t, i, y):
  """Returns the gradient of `log p(y | x_i)`, in b and w."""
  residual = np.eye(CLASSES)[y] - probabilities(t)[i]
  return residual, np.outer(X[t, i], residual)


def by_hand(labels):
  """Returns the Fisher information of b and w, task by task."""
  out = {'b': np.zeros_like(B), 'w': np.zeros_like(W)}
  for t in range(NUM):
    p, batch = probabilities(t), {'b': 0, 'w': 0}
    for i in range(BATCH):
      for y in range(CLASSES):
        for name, g in zip('bw', gradients(t, i, y), strict=True):
          weight = p[i, y] if labels == 'expected' else LABELS[t, i, y]
          out[name][t] += weight * g**2 / BATCH
          batch[name] += np.sqrt(p[i, y]) * g
    if labels == 'fusion_bench':
      for name, g in batch.items():
        out[name][t] = g**2 / BATCH
  return out


@pytest.mark.parametrize('labels', ['true', 'expected', 'fusion_bench'])
def test_fisher_is_that_of_a_linear_model(labels):
  with jax.enable_x64(True):
    fisher = statistics.diagonal_fisher(logits_fn, labels=labels)
    got = accumulate(fisher, experts(), (images(X), references(LABELS)))
  for name, want in by_hand(labels).items():
    np.testing.assert_allclose(got[name], want, rtol=1e-12)


def test_squares_of_whole_batches_are_not_those_of_images():
  wrong, right = by_hand('fusion_bench'), by_hand('expected')
  assert np.abs(wrong['w'] / right['w'] - 1).max() > 0.5


def test_sampled_labels_have_the_predicted_frequencies():
  draws = 600
  one = np.repeat(X[:, :1], draws, axis=1)
  fisher = statistics.diagonal_fisher(logits_fn, microbatch=draws)
  got = accumulate(fisher, experts(jnp.float32), (images(one),), seed=3)['b']
  for t in range(NUM):
    squares = np.stack([gradients(t, 0, y)[0] ** 2 for y in range(CLASSES)])
    frequencies = np.linalg.solve(squares.T, got[t])
    p = probabilities(t)[0]
    deviation = np.sqrt(p * (1 - p) / draws)
    assert (np.abs(frequencies - p) < 4 * deviation).all()
    assert (np.abs(frequencies - np.roll(p, 1)) > 4 * deviation).any()
    np.testing.assert_allclose(frequencies.sum(), 1, rtol=1e-4)


def test_every_batch_and_image_has_its_own_draw():
  fisher = statistics.diagonal_fisher(logits_fn)
  update = jax.jit(fisher.update)
  same = images(np.repeat(X[:, :1], BATCH, axis=1))
  models = experts(jnp.float32)
  carry = fisher.init(jax.random.key(0), models)
  totals = []
  for _ in range(12):
    carry = update(carry, models, same)
    totals.append(np.asarray(carry.total['b']))
  steps = np.diff(totals, axis=0).round(4)
  assert len(np.unique(steps[:, 0], axis=0)) > 3
  again = accumulate(fisher, models, (same,))
  chex.assert_trees_all_equal(again, accumulate(fisher, models, (same,)))


def test_batches_and_microbatches_do_not_matter():
  make = functools.partial(
    statistics.diagonal_fisher, logits_fn, labels='expected'
  )
  models, data = experts(jnp.float32), (images(X), references(LABELS))
  whole = accumulate(make(), models, data)
  parts = [[x[:, :3] for x in data], [x[:, 3:] for x in data]]
  for got in (
    accumulate(make(), models, *parts),
    accumulate(make(microbatch=3), models, *parts),
  ):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4), got, whole
    )


def test_fisher_is_float32_and_counters_have_none():
  models = experts(jnp.bfloat16) | {'step': jnp.array([3, 4])}
  fisher = statistics.diagonal_fisher(logits_fn, labels='true')
  data = images(X).astype(jnp.bfloat16), references(LABELS)
  got = accumulate(fisher, models, data)
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  assert got['step'].tolist() == [0, 0]
  np.testing.assert_allclose(got['w'], by_hand('true')['w'], rtol=0.1)


def inputs_fn(params, task, images):
  x = images.reshape(len(images), -1)
  return {
    'w': x,
    'b': jnp.repeat(x[:, :2], 3, axis=0) * (1 + task).astype(x.dtype),
  }


def test_grams_are_mean_products_of_rows():
  grams = statistics.input_grams(inputs_fn)
  with jax.enable_x64(True):
    parts = [(images(X[:, :2]),), (images(X[:, 2:]),)]
    got = accumulate(grams, experts(), *parts)
  for t in range(NUM):
    want = X[t].T @ X[t] / BATCH
    np.testing.assert_allclose(got['w'][t], want, rtol=1e-12)
    np.testing.assert_allclose(
      got['b'][t], (1 + t) ** 2 * want[:2, :2], rtol=1e-12
    )
  x = jnp.asarray(X[0], jnp.bfloat16)
  assert statistics.gram(x).dtype == jnp.float32


@pytest.mark.parametrize(
  'accumulator',
  [
    statistics.diagonal_fisher(logits_fn),
    statistics.input_grams(inputs_fn),
  ],
  ids=['fisher', 'grams'],
)
def test_carries_need_no_arrays_and_keep_their_type(accumulator):
  models, data = experts(jnp.float32), images(X.astype(np.float32))
  shapes = jax.eval_shape(lambda: (models, data))
  carry = accumulator.init(jax.random.key(0), *shapes)
  chex.assert_trees_all_equal(
    carry, accumulator.init(jax.random.key(0), models, data)
  )
  assert not any(x.any() for x in jax.tree.leaves(accumulator.finalize(carry)))
  traces = 0

  @jax.jit
  def run(carry, data):
    nonlocal traces
    traces += 1

    def step(carry, x):
      return accumulator.update(carry, models, x), None

    return jax.lax.scan(step, carry, data)[0]

  after = run(carry, jnp.stack([data, data]))
  run(after, jnp.stack([data, data]))
  assert traces == 1
  assert jax.eval_shape(lambda: after) == jax.eval_shape(lambda: carry)
  assert int(after.count) == 2 * BATCH


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'labels': 'guessed'}, "labels must be one of .* got 'guessed'"),
    ({'microbatch': 0}, 'microbatch must be positive.*got 0'),
    ({'labels': 'fusion_bench', 'microbatch': 2}, 'whole batches, got 2'),
    ({'microbatch': 4}, '6 images does not divide into microbatches of 4'),
    ({'labels': 'true'}, 'reads one-hot labels: give references'),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    accumulate(
      statistics.diagonal_fisher(logits_fn, **options),
      experts(jnp.float32),
      (images(X),),
    )
