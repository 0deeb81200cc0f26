"""Masks of a merged task vector and the models they give back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import localization


def make_models():
  """Returns a base, experts and task vectors, three kinds of leaves."""
  rng = np.random.default_rng(0)
  base = {
    'w': jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    'step': jnp.array(3),
  }
  experts = {
    'w': jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=(3, 5)) / 10, jnp.bfloat16),
    'step': jnp.arange(3),
  }
  return base, experts, dj.tree.task_vectors(base, experts)


def merged_by(tx, deltas):
  return jax.jit(lambda u: tx.update(u, tx.init(None))[0])(deltas)


@jax.jit
def specialize(base, merged, masks, task, scales=1.0):
  return localization.specialize(
    base, merged, masks=masks, task=task, scales=scales
  )


emr_masks = jax.jit(localization.emr_masks, static_argnames='norm')
tall_masks = jax.jit(localization.tall_masks)


def plain(x):
  return np.asarray(x, np.float64)


@pytest.mark.parametrize('threshold', [0.4, [0.2, 0.4, 0.6]])
def test_tall_masks(threshold):
  base, _, deltas = make_models()
  merged = merged_by(dj.task_arithmetic(1.0), deltas)
  masks = tall_masks(deltas, merged, threshold=jnp.array(threshold))
  for name in 'wb':
    for k, least in enumerate(np.broadcast_to(threshold, 3)):
      tau, whole = plain(deltas[name][k]), plain(merged[name])
      want = abs(tau) >= least * abs(whole - tau)
      np.testing.assert_array_equal(masks[name][k], want)
      model = specialize(base, merged, masks, k)
      assert model[name].dtype == base[name].dtype
      got = plain(model[name]) - plain(base[name])
      np.testing.assert_allclose(got, want * whole, rtol=0.02, atol=0.02)
      assert model['step'] == base['step']
  with pytest.raises(ValueError, match=r'threshold are \[2\].*3 experts'):
    localization.tall_masks(deltas, merged, threshold=[0.1, 0.2])


@pytest.mark.parametrize('norm', localization.NORMS)
def test_emr_masks(norm):
  base, _, deltas = make_models()
  unified = merged_by(dj.emr(), deltas)
  masks, scales = emr_masks(deltas, unified, norm=norm)
  measure = getattr(np, norm)
  for k in range(3):
    own, masked = 0.0, 0.0
    for name in 'wb':
      tau, whole = plain(deltas[name][k]), plain(unified[name])
      want = tau * whole > 0
      np.testing.assert_array_equal(masks[name][k], want)
      own += measure(abs(tau))
      masked += measure(abs(want * whole))
    np.testing.assert_allclose(scales[k], own / masked, rtol=1e-5)
    model = specialize(base, unified, masks, k, scales)
    want = own / masked * plain(masks['w'][k]) * plain(unified['w'])
    np.testing.assert_allclose(
      plain(model['w']) - plain(base['w']), want, rtol=1e-4, atol=1e-5
    )
  with pytest.raises(ValueError, match="norm.*got 'max'"):
    localization.emr_masks(deltas, unified, norm='max')


def test_emr_elects_a_sign_and_the_largest_magnitude():
  _, _, deltas = make_models()
  unified = merged_by(dj.emr(), deltas)
  for entry, got in zip(
    plain(deltas['w']).reshape(3, -1).T,
    plain(unified['w']).ravel(),
    strict=True,
  ):
    sign = np.sign(entry.sum())
    assert got == sign * max(abs(t) for t in entry if t * sign > 0)


def test_one_expert_is_given_back_and_none_moves_the_base():
  base, experts, deltas = make_models()
  one = jax.tree.map(lambda x: x[:1], deltas)
  unified = merged_by(dj.emr(), one)
  masks, scales = emr_masks(one, unified)
  model = specialize(base, unified, masks, 0, scales)
  np.testing.assert_allclose(model['w'], experts['w'][0], rtol=1e-5)
  nothing = jax.tree.map(jnp.zeros_like, deltas)
  unified = merged_by(dj.emr(), nothing)
  masks, scales = emr_masks(nothing, unified)
  np.testing.assert_array_equal(scales, [1, 1, 1])
  model = specialize(base, unified, masks, 1, scales)
  jax.tree.map(np.testing.assert_array_equal, model, base)


def test_all_models_at_once():
  base, _, deltas = make_models()
  unified = merged_by(dj.emr(), deltas)
  masks, scales = emr_masks(deltas, unified)
  models = jax.vmap(
    lambda task: specialize(base, unified, masks, task, scales)
  )(jnp.arange(3))
  for k in range(3):
    one = specialize(base, unified, masks, k, scales)
    np.testing.assert_allclose(models['w'][k], one['w'], rtol=1e-6)
  for task, scales, message in (
    (0, jnp.ones(2), r'scales are \[2\].*3 experts'),
    (3, 1.0, r'task must be in \[0, 3\), got 3'),
  ):
    with pytest.raises(ValueError, match=message):
      localization.specialize(
        base, unified, masks=masks, task=task, scales=scales
      )
