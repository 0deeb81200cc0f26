"""Merges by statistics: what they read, keep and give, and RegMean by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import statistics
from dam_jax import weighted

NUM, BATCH, STEPS, SHAPE = 3, 5, 2, (2, 2, 1)
SIZES = (4, 6, 3)
LEVELS = ('first/.*', 'second/.*')
SCALE = 0.8


def random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def make_params(seed):
  rng = np.random.default_rng(seed)
  return {
    'gain': rng.normal(size=4),
    'first': {'kernel': rng.normal(size=(4, 6)), 'bias': rng.normal(size=6)},
    'second': {'kernel': rng.normal(size=(6, 3))},
    'step': np.array(seed),
  }


def stack(models):
  return jax.tree.map(lambda *x: np.stack(x), *models)


BASE = make_params(0)
MODELS = [make_params(1 + k) for k in range(NUM)]
IMAGES = random(9, 2 * STEPS, NUM, BATCH, *SHAPE)


def hidden(params, x):
  return np.tanh(x @ params['first']['kernel'] + params['first']['bias'])


def forward(params, images):
  x = (
    images.reshape(len(images), -1) * params['gain'].astype(images.dtype)[None]
  )
  first, second = params['first'], params['second']
  bias = first['bias'].astype(x.dtype)[None]
  h = jnp.tanh(x @ first['kernel'].astype(x.dtype) + bias)
  return x, h, h @ second['kernel'].astype(x.dtype)


def inputs_fn(params, task, images):
  x, h, _ = forward(params, images)
  return {'first/kernel': x, 'second/kernel': h}


def logits_fn(params, task, images):
  return forward(params, images)[2]


def preprocess(images):
  return 2 * images - 1


def arrays(tree, dtype=jnp.float32):
  return jax.tree.map(
    lambda x: jnp.asarray(x, dtype if x.dtype == float else jnp.int32), tree
  )


def make(name, **options):
  options = {'steps': STEPS, 'preprocess_fn': preprocess, **options}
  if name == 'fisher':
    return dj.fisher(logits_fn, **options)
  options = {'image_shape': SHAPE, 'scale': SCALE, **options}
  if name == 'regmean':
    return dj.regmean(inputs_fn, **options)
  return dj.regmean_plus_plus(inputs_fn, **{'levels': LEVELS, **options})


@functools.cache
def program(name):
  """Returns a merger, all its steps (their state is donated) and its end."""
  return compiled(make(name))


def compiled(merger):
  return merger, dj.scan_steps(merger), jax.jit(merger.finalize)


def run(program, base, experts, references=None):
  """Takes all steps; returns the merged model and the metrics."""
  merger, steps, finalize = program
  images = jnp.asarray(IMAGES[: merger.plan.steps, None], base['gain'].dtype)
  state = merger.init(jax.random.key(0), base, experts)
  state, metrics = steps(
    state, base, experts, None, dj.Batch(images, references)
  )
  return finalize(state, base, experts), metrics


NAMES = ('fisher', 'regmean', 'regmean_plus_plus')


@pytest.fixture(params=NAMES)
def name(request):
  return request.param


def regress(kernels, inputs):
  """Solves RegMean's equations of one layer."""
  left, right = 0, 0
  for w, x in zip(kernels, inputs, strict=True):
    g = x.T @ x
    g = SCALE * g + (1 - SCALE) * np.diag(np.diag(g))
    left, right = left + g, right + g @ w
  return np.linalg.solve(left, right)


def by_hand(name):
  """Returns a merged model, layer by layer."""
  gain = np.mean([m['gain'] for m in MODELS], axis=0)
  bias = np.mean([m['first']['bias'] for m in MODELS], axis=0)
  seen = 2 * IMAGES.reshape(2, STEPS, NUM, BATCH, -1) - 1
  seen = seen.swapaxes(1, 2).reshape(2, NUM, -1, 4)
  plain = name == 'regmean'
  x = [
    seen[0, k] * (m['gain'] if plain else gain) for k, m in enumerate(MODELS)
  ]
  first = regress([m['first']['kernel'] for m in MODELS], x)
  merged = {'gain': gain, 'first': {'kernel': first, 'bias': bias}}
  if plain:
    h = [hidden(m, x) for m, x in zip(MODELS, x, strict=True)]
  else:
    h = [hidden(merged, seen[1, k] * gain) for k in range(NUM)]
  second = regress([m['second']['kernel'] for m in MODELS], h)
  return {**merged, 'second': {'kernel': second}, 'step': BASE['step']}


@pytest.mark.parametrize('name', ['regmean', 'regmean_plus_plus'])
def test_regression_is_that_of_a_model_of_two_layers(name):
  with jax.enable_x64(True):
    base, experts = (arrays(x, jnp.float64) for x in (BASE, stack(MODELS)))
    merged, _ = run(program(name), base, experts)
  want = by_hand(name)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10), merged, want
  )


def test_layers_of_one_level_do_not_see_each_other_merged():
  base, experts = arrays(BASE), arrays(stack(MODELS))
  merger = make('regmean_plus_plus', levels=['first/.*|second/.*'])
  together, _ = run(compiled(merger), base, experts)
  apart, _ = run(program('regmean_plus_plus'), base, experts)
  kernels = [
    [x[k]['kernel'] for x in (together, apart)] for k in ('first', 'second')
  ]
  np.testing.assert_allclose(*kernels[0], rtol=1e-4, atol=1e-5)
  assert jnp.abs(kernels[1][0] - kernels[1][1]).max() > 0.01


def test_fisher_is_its_statistic_and_its_aggregator():
  base, experts = arrays(BASE), arrays(stack(MODELS))
  labels = np.eye(3)[np.random.default_rng(3).integers(0, 3, (NUM, BATCH))]
  references = jnp.asarray(labels, jnp.float32)
  options = {'labels': 'true', 'normalize': False, 'epsilon': 0.1, 'steps': 1}
  merger = make('fisher', **options)
  assert merger.plan == dj.Plan(steps=1, phases=1, references=True)
  merged, _ = run(compiled(merger), base, experts, references[None, None])
  fisher = statistics.diagonal_fisher(logits_fn, labels='true')
  carry = jax.jit(fisher.update)(
    fisher.init(jax.random.key(0), experts),
    experts,
    preprocess(jnp.asarray(IMAGES[0], jnp.float32)),
    references,
  )
  tx = weighted.precision_weighted(fisher.finalize(carry), epsilon=0.1)
  want = dj.merge(tx, base, experts).params
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4), merged, want
  )


def test_plans_and_metrics(name):
  merger, *_ = program(name)
  passes = len(LEVELS) if name == 'regmean_plus_plus' else 1
  assert merger.plan == dj.Plan(steps=STEPS * passes, phases=1)
  base, experts = arrays(BASE), arrays(stack(MODELS))
  merged, metrics = run(program(name), base, experts)
  assert metrics['finite'].all()
  trace = metrics['fisher/trace' if name == 'fisher' else 'grams/trace']
  assert trace.shape == (merger.plan.steps, NUM)
  assert (trace > 0).all()
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)
  chex.assert_trees_all_equal(base, arrays(BASE))  # not donated


@pytest.mark.parametrize('name', ['fisher', 'regmean_plus_plus'])
def test_raveled_models_give_what_pytrees_give(name):
  base, experts = arrays(BASE), arrays(stack(MODELS))
  merger, *_ = program(name)
  want, _ = run(program(name), base, experts)
  state = merger.init(jax.random.key(0), base, experts)
  flat = dj.tree.ravel(base), dj.tree.ravel(experts, leading=1)
  assert jax.eval_shape(
    merger.init, jax.random.key(0), *flat
  ) == jax.eval_shape(lambda: state)
  step, traces = merger.step, []

  @jax.jit
  def counted(*args):
    traces.append(1)
    return step(*args)

  for x in IMAGES[: merger.plan.steps, None]:
    batch = dj.Batch(jnp.asarray(x, jnp.float32))
    state, _ = counted(state, *flat, batch)
  assert len(traces) == 1
  got = merger.finalize(state, *flat)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5),
    got,
    want,
  )


def test_no_task_vectors_give_the_base_bit_for_bit(name):
  base = arrays(BASE)
  merged, _ = run(program(name), base, dj.tree.stack([base] * NUM))
  chex.assert_trees_all_equal(merged, base)


def test_before_any_step_it_is_the_mean(name):
  base, experts = arrays(BASE), arrays(stack(MODELS))
  merger, _, finalize = program(name)
  state = merger.init(jax.random.key(0), base, experts)
  want = dj.merge(dj.average(), base, experts).params
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
    finalize(state, base, experts),
    want,
  )


def test_a_step_that_is_not_finite_leaves_the_state(name):
  base, experts = arrays(BASE), arrays(stack(MODELS))
  merger, steps, _ = program(name)
  init = functools.partial(merger.init, jax.random.key(0), base, experts)
  shape = (merger.plan.steps, 1, NUM, BATCH, *SHAPE)
  images = jnp.full(shape, jnp.nan, jnp.float32)
  after, metrics = steps(init(), base, experts, None, dj.Batch(images))
  assert not metrics['finite'].any()
  chex.assert_trees_all_equal(after, init())


def test_levels_that_do_not_fit_are_named():
  base, experts = arrays(BASE), arrays(stack(MODELS))

  def start(*levels):
    merger = make('regmean_plus_plus', levels=levels)
    merger.init(jax.random.key(0), base, experts)

  with pytest.raises(ValueError, match='levels:') as error:
    start('gain', 'first/.*')
  assert 'second/kernel: inputs_fn gives' in str(error.value)
  assert "level 'gain' has no layer" in str(error.value)
  with pytest.raises(ValueError, match="rule 'third/.*' matches no leaf"):
    start('first/.*', 'second/.*', 'third/.*')


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('fisher', {'labels': 'guessed'}, "labels must be .* got 'guessed'"),
    ('fisher', {'steps': 0}, 'steps must be positive, got 0'),
    ('fisher', {'epsilon': -1.0}, 'epsilon must be .* got -1.0'),
    ('fisher', {'microbatch': 0}, 'microbatch must be positive.* got 0'),
    ('regmean', {'steps': -1}, 'steps must be positive, got -1'),
    ('regmean', {'scale': 1.1}, r'scale must be in \[0, 1\], got 1.1'),
    ('regmean', {'image_shape': (2, 2)}, r'image_shape .* got \(2, 2\)'),
    ('regmean_plus_plus', {'levels': ()}, 'levels must name at least one'),
    ('regmean_plus_plus', {'scale': -1}, r'scale must be .* got -1'),
  ],
)
def test_bad_options_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)
