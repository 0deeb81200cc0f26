"""The choices of a step: what they refuse, differentiate and leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax import losses
from dam_jax import masks
from dam_jax import perturbations
from dam_jax.meta import meta_merger
from dam_jax.meta_spec import Coefficients
from dam_jax.meta_spec import MetaSpec

SHAPE = (4, 4, 3)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'clean_loss': 'kl'}, "clean_loss must be one of .* got 'kl'"),
    ({'safety_loss': 'kl'}, "safety_loss must be one of .* got 'kl'"),
    ({'labels': 'truth'}, "labels must be one of .* got 'truth'"),
    ({'final': 'mean'}, "final must be one of .* got 'mean'"),
    ({'mask_steps': -1}, 'mask_steps must not be negative, got -1'),
    ({'warmup_steps': -2}, 'warmup_steps must not be negative, got -2'),
    ({'coefficient_steps': -3}, 'coefficient_steps .* got -3'),
    ({'own_images': True, 'safety_loss': 'consistency'}, 'own_images'),
    (
      {'updates': [(('one', 'two'), 1.0, 0.0)], 'masks': {'one': masks.Mask()}},
      r"updates name masks \['two'\], there are \['one'\]",
    ),
    (
      {'updates': [(('one',), 1.0, 0.1)], 'masks': {'one': masks.Mask()}},
      'a safety loss needs an adversary',
    ),
    ({'coefficient_safety': 0.1}, 'a safety loss needs an adversary'),
  ],
)
def test_bad_specs_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    MetaSpec(**options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'granularity': 'layer'}, "granularity must be one of .* got 'layer'"),
    ({'inner_gradient': 'second'}, "inner_gradient .* got 'second'"),
  ],
)
def test_bad_coefficients_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Coefficients(**options)


def test_shunned_classes_are_part_of_the_safety_loss():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
  references = jax.nn.one_hot(jnp.array([[0, 1, 2], [3, 3, 0]]), 4)
  shunned = jnp.array([[1, 1, -1], [2, 3, 3]])
  spec = MetaSpec(safety_loss='reference', shun_weight=2.0)
  away = losses.shun(logits, jnp.argmax(references, axis=-1), shunned)
  assert (away > 0).all()
  np.testing.assert_allclose(
    spec.safety(logits, logits, references, shunned),
    spec.safety(logits, logits, references) + 2 * away,
    rtol=1e-6,
  )
  with pytest.raises(ValueError, match='give Batch.references'):
    MetaSpec(shun_weight=1.0).safety(logits, logits, None, shunned)


def test_missing_references_are_named(tiny):
  spec = MetaSpec(clean_loss='reference', coefficient_steps=1)
  merger = meta_merger(tiny.logits_fn, spec)
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  batch = tiny.batch(1)._replace(references=None)
  with pytest.raises(ValueError, match='give Batch.references'):
    merger.step(state, tiny.base, tiny.experts, batch)


def test_exact_inner_gradient_is_the_derivative_and_first_order_is_not(tiny):
  with jax.enable_x64(True):
    base, experts = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x, np.float64)),
      [{n: m[n] for n in ('kernel', 'bias', 'gain')} for m in tiny[:2]],
    )
    batch = tiny.batch(2)._replace(references=None)
    batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
    rng = np.random.default_rng(0)
    uniform = jnp.asarray(rng.uniform(size=400))

    def make(inner_gradient):
      spec = MetaSpec(
        coefficients=Coefficients(
          inner_tx=optax.sgd(1.0), inner_gradient=inner_gradient
        ),
        masks={
          'shared': masks.Mask(tx=optax.sgd(1.0), uniform_fn=lambda *_: uniform)
        },
        updates=[(('shared',), 1.0, 0.0)],
        mask_steps=1,
      )
      return meta_merger(tiny.logits_fn, spec)

    def gradient_and_loss(merger):
      state = merger.init(jax.random.key(0), base, experts)
      step = jax.jit(merger.step)

      def at(logits):
        moved = state._replace(masks={'shared': logits})
        new, metrics = step(moved, base, experts, batch)
        return logits - new.masks['shared'], metrics['clean/loss'].sum()

      return at

    exact = gradient_and_loss(make('exact'))
    first_order = gradient_and_loss(make('first_order'))
    logits, way = jnp.asarray(rng.normal(size=(2, 400)))
    after, before = (exact(logits + eps * way)[1] for eps in (1e-5, -1e-5))
    slope = (after - before) / 2e-5
    assert first_order(logits)[1] == pytest.approx(float(exact(logits)[1]))
    np.testing.assert_allclose(exact(logits)[0] @ way, slope, rtol=1e-6)
    assert abs(first_order(logits)[0] @ way - slope) > 1e-3 * abs(slope)


def test_perturbation_phase_takes_no_gradient_in_the_weights(tiny):
  differentiated = []

  @jax.custom_vjp
  def watch(params):
    return params

  def forward(params):
    differentiated.append(True)
    return params, None

  watch.defvjp(forward, lambda _, gradient: (gradient,))

  def trace(**options):
    differentiated.clear()
    spec = MetaSpec(
      masks={'shared': masks.Mask()},
      adversary=perturbations.additive(SHAPE, preprocess_fn=lambda x: x),
      **options,
    )

    def logits_fn(params, images):
      return tiny.logits_fn(watch(params), images)

    def task_logits_fn(params, task, images):
      return logits_fn(params, jnp.stack([images] * 3))[task]

    merger = meta_merger(logits_fn, spec, task_logits_fn=task_logits_fn)
    args = merger.init(jax.random.key(0), tiny.base, tiny.experts), tiny.base
    batch = tiny.batch(max(merger.plan.phases, 1))
    jax.eval_shape(merger.step, *args, tiny.experts, batch)
    return len(differentiated)

  assert trace(warmup_steps=2) == 0
  assert trace(mask_steps=1, updates=[(('shared',), 1.0, 0.1)]) == 1
  assert trace(coefficient_steps=1, coefficient_safety=0.1) == 1
