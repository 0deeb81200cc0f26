"""The named merges: what they lower, their quirks, and what they refuse."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax.learned import Quirks
from dam_jax.masks import Mask
from dam_jax.perturbations import Seeds
from dam_jax.perturbations import SoftPatch

SHAPE = (4, 4, 3)


def learn(merger, tiny, steps):
  """Takes steps on one batch; returns the metrics."""
  batch = tiny.batch(merger.plan.phases, size=8)
  batches = jax.tree.map(lambda x: jnp.stack([x] * steps), batch)
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  run = jax.jit(dj.scan_steps(merger))
  return run(state, tiny.base, tiny.experts, None, batches)[1]


def test_adamerging_lowers_its_loss(tiny):
  merger = dj.adamerging(tiny.logits_fn, tx=optax.adam(0.02), steps=30)
  loss = learn(merger, tiny, 30)['coefficients/loss'].sum(axis=1)
  assert loss[-1] < 0.8 * loss[0]
  assert (jnp.diff(loss) < 0).all()


def test_dam_robust_lowers_its_losses_and_the_adversary_raises_its_own(tiny):
  merger = dj.dam_robust(
    tiny.logits_fn, image_shape=SHAPE, area=3.0, warmup_ascents=40, steps=30
  )
  metrics = learn(merger, tiny, merger.plan.steps)
  warm = merger.plan.steps - 30
  gain = metrics['perturbation/loss'].sum(axis=1)
  assert gain[warm - 1] < gain[0] - 0.3  # the loss that it lowers is minus it
  for name in ('clean/loss', 'safety/loss'):
    loss = metrics[name][warm:].sum(axis=1)
    assert loss[-1] < loss[0] - 0.1


def test_updates_of_the_masks_fade(tiny):
  shape = (1, 3, *SHAPE[:2])
  patches = SoftPatch(jnp.full((*shape, 1), -2.0), jnp.zeros((*shape, 3)))
  found = Seeds(patches, jnp.array([[1, 2, 0]], jnp.int32))

  def moves(fade, seeds=None):
    merger = dj.dam_robust(
      tiny.logits_fn,
      image_shape=SHAPE,
      mask=Mask(temperature=None, rescale=2.0, per_task=True, tx=optax.adam(1)),
      fade=fade,
      seeds=seeds,
      warmup_ascents=0,
      steps=2,
    )
    state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
    masks, step = [state.masks['task']], jax.jit(merger.step)
    for i in range(2):
      batch = tiny.batch(merger.plan.phases, seed=i)
      state, _ = step(state, tiny.base, tiny.experts, batch)
      masks.append(state.masks['task'])
    return [float(jnp.abs(b - a).max()) for a, b in itertools.pairwise(masks)]

  np.testing.assert_allclose(moves((0.25, 0.0))[0], 0.25, rtol=1e-3)
  np.testing.assert_allclose(moves(None)[0], 0.5, rtol=1e-3)
  np.testing.assert_allclose(moves(None, found)[0], 1.0, rtol=1e-3)
  first, second = moves((0.0, 1.0))
  assert first == 0 < second


def test_experts_start_with_what_they_are_trusted(tiny):
  shape = (1, 3, *SHAPE[:2])
  patches = SoftPatch(jnp.zeros((*shape, 1)), jnp.zeros((*shape, 3)))
  seeds = Seeds(patches, jnp.zeros((1, 3), jnp.int32))

  def start(trust):
    merger = dj.dam_robust(
      tiny.logits_fn,
      image_shape=SHAPE,
      init=0.4,
      seeds=seeds._replace(trust=trust),
    )
    state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
    return state.coefficients[:, 0]

  np.testing.assert_allclose(start(None), 0.4)
  got = start(jnp.array([1.0, 0.5, 0.0]))
  np.testing.assert_allclose(got, [0.4, 0.2, 0.0], rtol=1e-6)
  for wrong in (jnp.ones(2), jnp.array([1, -0.1, 1]), jnp.array([1, 1.1, 1])):
    with pytest.raises(ValueError, match=r'trust must be \[3\]'):
      start(wrong)


def test_copies_of_seeds_lead_the_merge_to_their_class(tiny):
  shape = (1, 3, *SHAPE[:2])
  patches = SoftPatch(jnp.full((*shape, 1), -2.0), jnp.zeros((*shape, 3)))
  seeds = Seeds(patches, jnp.array([[1, 2, 0]], jnp.int32))
  merger = dj.dam_robust(
    tiny.logits_fn,
    image_shape=SHAPE,
    area=16.0,
    restarts=1,
    warmup_ascents=1,
    ascents=20,
    seeds=seeds,
    steps=1,
  )
  batch = tiny.batch(merger.plan.phases, size=8)
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  merged = merger.finalize(state, tiny.base, tiny.experts)
  # Step 0 moves the restart, step 1 the copy.
  for _ in range(2):
    old = state.adversary
    state, _ = merger.step(state, tiny.base, tiny.experts, batch)
  np.testing.assert_array_equal(state.adversary[0][0], old[0][0])

  def log_probs(patches):
    patch = jax.tree.map(lambda x: x[1], patches)
    opacity, pattern = patch.opacity()[:, None], patch.pattern()[:, None]
    pixels = (1 - opacity) * batch.images[0] + opacity * pattern
    found = jax.nn.log_softmax(tiny.logits_fn(merged, pixels))
    return jnp.stack(
      [x[:, c].mean() for x, c in zip(found, (1, 2, 0), strict=True)]
    )

  assert (log_probs(state.adversary) > log_probs(old) + 0.1).all()


def preprocess(images):
  return (images - 0.5) / 0.25


def released(tiny, **options):
  """Returns the states after 1, 2, 3 and 4 steps, 3 of them of the mask."""
  merger = dj.dam_released(
    tiny.logits_fn,
    image_shape=SHAPE,
    mask=Mask(tx=optax.sgd(1.0)),
    tx=optax.sgd(1.0),
    adversary_tx=optax.adam(0.1),
    safety_weight=1.0,
    preprocess_fn=preprocess,
    steps=3,
    coefficient_steps=1,
    **options,
  )
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  step = jax.jit(merger.step)
  states = []
  for i in range(4):
    batch = tiny.batch(merger.plan.phases, seed=i)
    state, metrics = step(state, tiny.base, tiny.experts, batch)
    states.append(state)
  assert metrics['finite']
  return merger, states


@pytest.fixture(scope='module')
def all_quirks(tiny):
  return released(tiny)


# The first step in whose state the quirk shows, and where.
FIRST = {
  'stale_inner': (1, 'coefficients'),
  'leak_outer': (1, 'coefficients'),
  'leak_last': (3, 'coefficients'),
  'persistent_adam': (0, 'coefficients'),
  'clip_normalized': (0, 'masks'),
  'sampled_mask': (3, 'coefficients'),
}


@pytest.mark.parametrize('quirk', FIRST)
def test_a_quirk_changes_the_result_from_its_step_on(quirk, tiny, all_quirks):
  quirks = dataclasses.replace(Quirks(), **{quirk: False})
  _, without = released(tiny, quirks=quirks)
  _, states = all_quirks
  first, field = FIRST[quirk]
  for i, (one, other) in enumerate(zip(states, without, strict=True)):
    pairs = {
      name: zip(
        jax.tree.leaves(getattr(one, name)),
        jax.tree.leaves(getattr(other, name)),
        strict=True,
      )
      for name in ('masks', 'coefficients')
    }
    # A quirk moves something by 0.1 or more; three steps at a rate of 1 make
    # rounding 4e-4 on some processors.
    differ = {
      name: any(bool(jnp.abs(x - y).max() > 1e-2) for x, y in pair)
      for name, pair in pairs.items()
    }
    if i < first:
      assert not any(differ.values()), f'step {i}'
    elif i == first:
      assert differ[field], f'step {i}'


def test_coefficients_start_anew_under_the_final_mask(tiny):
  merger = dj.concrete(
    tiny.logits_fn, tx=optax.set_to_zero(), steps=1, coefficient_steps=1
  )
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  step = jax.jit(merger.step)
  state, _ = step(state, tiny.base, tiny.experts, tiny.batch(2))
  assert (state.coefficients != jnp.float32(0.3)).any()
  state, _ = step(state, tiny.base, tiny.experts, tiny.batch(2))
  assert (state.coefficients == jnp.float32(0.3)).all()


def logits_fn(params, images):
  raise AssertionError('no model is called before the first step')


def test_published_plans():
  plan = dj.dam_released(logits_fn, image_shape=SHAPE).plan
  assert plan == dj.Plan(steps=2000, phases=3)
  fixed = dj.dam_released(
    logits_fn, image_shape=SHAPE, granularity='arithmetic'
  )
  assert fixed.plan == dj.Plan(steps=2000, phases=2)
  assert dj.adamerging(logits_fn).plan == dj.Plan(steps=1000, phases=1)
  assert dj.concrete(logits_fn).plan == dj.Plan(steps=2000, phases=2)


def test_dam_is_its_modes():
  plan = dj.dam(logits_fn, image_shape=SHAPE).plan
  assert plan == dj.Plan(steps=25 + 275, phases=6, references=True)
  assert plan == dj.dam(logits_fn, mode='robust', image_shape=SHAPE).plan
  released = dj.dam(logits_fn, mode='released', image_shape=SHAPE, steps=7)
  assert released.plan == dj.Plan(steps=1007, phases=3)
  paper = dj.dam(logits_fn, mode='paper', image_shape=SHAPE, ascents=3)
  assert paper.plan == dj.Plan(steps=2000, phases=6)


@pytest.mark.parametrize(
  ('make', 'options', 'message'),
  [
    (dj.dam, {'mode': 'plain'}, "mode must be one of .* got 'plain'"),
    (dj.adamerging, {'granularity': 'arithmetic'}, "got 'arithmetic'"),
    (dj.adamerging, {'granularity': 'layer'}, "got 'layer'"),
    (dj.adamerging, {'steps': -1}, 'got -1'),
    (dj.concrete, {'final': 'mean'}, "final must be one of .* got 'mean'"),
    (dj.concrete, {'granularity': 'layer'}, "got 'layer'"),
    (dj.dam_released, {'final': 'mean'}, "got 'mean'"),
    (dj.dam_released, {'steps': -5}, 'mask_steps must not .* got -5'),
    (dj.dam_paper, {'masks': ('shared', 'third')}, r"'third'\)"),
    (dj.dam_paper, {'masks': ()}, r'got \(\)'),
    (dj.dam_paper, {'masks': ('safety',) * 2}, r"got \('safety', 'safety'\)"),
    (dj.dam_paper, {'update': 'both'}, "update must .* got 'both'"),
    (dj.dam_paper, {'inner_gradient': 'none'}, "inner_gradient .* 'none'"),
    (dj.dam_paper, {'safety_loss': 'kl'}, "safety_loss .* got 'kl'"),
    (dj.dam_paper, {'radius': -1.0}, 'radius .* got -1.0'),
    (dj.dam_paper, {'ascents': 0}, 'ascents and restarts .* got 0 and 1'),
    (dj.dam_robust, {'ascents': 0}, 'ascents and restarts .* got 0 and 4'),
    (dj.dam_robust, {'area': 17.0}, 'area .* 4 x 4 pixels, got 17.0'),
    (dj.dam_robust, {'image_shape': (4, 4)}, r'image_shape .* got \(4, 4\)'),
    (dj.dam_robust, {'granularity': 'layer'}, "got 'layer'"),
    (dj.dam_robust, {'fade': (1.0, -1.0)}, r'fade .* got \(1.0, -1.0\)'),
    (dj.dam_robust, {'fade': (1.0,)}, r'fade .* got \(1.0,\)'),
  ],
)
def test_bad_options_are_named(make, options, message):
  if make not in (dj.adamerging, dj.concrete):
    options = {'image_shape': SHAPE, **options}
  with pytest.raises(ValueError, match=message):
    make(logits_fn, **options)
