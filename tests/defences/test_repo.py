"""Repairs of a merged model, which is their only expert."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import dam_jax as dj
from dam_jax.masks import Mask
from dam_jax.meta_spec import Shared

SHAPE = (4, 4, 3)


@pytest.fixture(scope='module')
def experts(tiny):
  merged = dj.merge(dj.average(), tiny.base, tiny.experts).params
  return dj.tree.stack([merged])


def repair(make, tiny, experts, **options):
  """Returns the repaired model, the state and metrics after two steps."""
  merger = make(
    tiny.logits_fn,
    image_shape=SHAPE,
    num_tasks=3,
    mask=Mask(tx=optax.sgd(1.0)),
    adversary_tx=optax.adam(0.5),
    safety_weight=1.0,
    steps=2,
    **options,
  )
  state = merger.init(jax.random.key(0), tiny.base, experts)
  step = jax.jit(merger.step)
  for i in range(2):
    batch = tiny.batch(merger.plan.phases, seed=i)
    state, metrics = step(state, tiny.base, experts, batch)
  return merger.finalize(state, tiny.base, experts), state, metrics


def test_a_fresh_mask_gives_the_merged_model_back(tiny, experts):
  merger = dj.repo_awm(
    tiny.logits_fn, image_shape=SHAPE, num_tasks=3, final='expected'
  )
  state = merger.init(jax.random.key(0), tiny.base, experts)
  assert state.adversary.shape == (1, 3, *SHAPE)
  got = merger.finalize(state, tiny.base, experts)
  want = {**dj.tree.unstack(experts)[0], 'step': tiny.base['step']}
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def test_awm_is_sau_without_its_terms(tiny, experts):
  plain, state, metrics = repair(dj.repo_awm, tiny, experts)
  nothing = Shared(weight=0.0, untargeted=1.0, divergence=0.0)
  same, twin, more = repair(dj.repo_sau, tiny, experts, shared=nothing)
  assert set(more) - set(metrics) == {'shared/loss'}
  chex.assert_trees_all_close(
    (plain, state.masks, state.adversary),
    (same, twin.masks, twin.adversary),
    rtol=1e-5,
    atol=1e-6,
  )
  assert more['shared/loss'].sum() > 0
  _, other, _ = repair(dj.repo_sau, tiny, experts, shared=Shared(weight=1.0))
  assert jnp.abs(other.masks['shared'] - state.masks['shared']).max() > 1e-3
  assert jnp.abs(other.adversary - state.adversary).max() > 1e-3


@pytest.mark.parametrize('make', [dj.repo_awm, dj.repo_sau])
def test_bad_options_are_named(make, tiny):
  options = {'image_shape': SHAPE, 'num_tasks': 3}
  with pytest.raises(ValueError, match=r'image_shape .* got \(4,\)'):
    make(tiny.logits_fn, **{**options, 'image_shape': (4,)})
  with pytest.raises(ValueError, match="final must be one of .* got 'mean'"):
    make(tiny.logits_fn, **options, final='mean')
