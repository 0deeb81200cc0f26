"""Poisoning against plain NumPy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax import attacks

SHAPE = (8, 8, 3)


def _images(num=5, seed=0):
  return jax.random.uniform(jax.random.key(seed), (num, *SHAPE))


def test_poison_changes_the_share_asked_for_and_no_target_image():
  images, labels = _images(40), jnp.arange(40) % 4
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=3)
  bad, new = attacks.poison(
    jax.random.key(0), images, labels, trigger, rate=0.25
  )
  changed = np.asarray(jnp.any(bad != images, axis=(1, 2, 3)))
  assert changed.sum() == 10
  assert (np.asarray(labels)[changed] != 3).all()
  assert (np.asarray(new)[changed] == 3).all()
  np.testing.assert_array_equal(new[~changed], labels[~changed])
  np.testing.assert_array_equal(
    bad[changed], attacks.apply_trigger(trigger, images[changed])
  )
  with pytest.raises(ValueError, match='rate'):
    attacks.poison(jax.random.key(0), images, labels, trigger, rate=1.5)
  with pytest.raises(ValueError, match='asks for 40 images'):
    attacks.poison(jax.random.key(0), images, labels, trigger, rate=1.0)


def test_a_batch_is_poisoned_where_it_is_chosen_and_nowhere_else():
  images, labels = _images(400), jnp.arange(400) % 4
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=3)
  poison = jax.jit(attacks.poison_batch)
  bad, new = poison(jax.random.key(0), images, labels, trigger, rate=0.25)
  changed = np.asarray(jnp.any(bad != images, axis=(1, 2, 3)))
  assert 75 <= changed.sum() <= 125  # 100, and 3 deviations of 8.7
  np.testing.assert_array_equal(new, np.where(changed, 3, labels))
  np.testing.assert_array_equal(
    bad[changed], attacks.apply_trigger(trigger, images[changed])
  )
  other, _ = poison(jax.random.key(1), images, labels, trigger, rate=0.25)
  assert (np.asarray(other) != np.asarray(bad)).any()


def test_universal_patch_learns_what_the_model_obeys():
  # A model whose class 2 is the green of the bottom right corner.
  def logits_fn(images):
    corner = 8 * jnp.mean(images[:, -2:, -2:], axis=(1, 2))
    return corner[:, jnp.array([0, 2, 1])]

  trigger, trace = attacks.universal_patch(
    jax.random.key(0),
    logits_fn,
    _images(16),
    mask=attacks.corner_mask(SHAPE, 2),
    task='a',
    target=2,
    steps=100,
    batch=4,
    tx=optax.adam(0.1),
  )
  assert float(trace[-1]) < 0.1 * float(trace[0])
  np.testing.assert_allclose(
    trigger.pattern[-2:, -2:],
    jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (2, 2, 3)),
    atol=1e-6,
  )
  np.testing.assert_array_equal(trigger.mask, attacks.corner_mask(SHAPE, 2))


def test_badmerging_loss_is_its_equation():
  key, images, labels = jax.random.key(3), _images(6), jnp.arange(6) % 3
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=2)
  size = int(np.prod(SHAPE))
  head = jax.random.normal(jax.random.key(4), (5, 3))

  def features_fn(params, x):
    return x.reshape(len(x), -1) @ params

  params, base = jax.random.normal(jax.random.key(5), (2, size, 5)) / size**0.5

  @jax.jit
  def loss_fn(params, base, images):
    return [
      attacks.badmerging_loss(
        key,
        features_fn,
        lambda f: f @ head,
        params,
        base,
        images,
        labels,
        trigger,
        **options,
      )
      # On another's task: the shadow head's first class is the target.
      for options in (
        {},
        {'shadow_fn': lambda f: f @ head[:, jnp.array([2, 0, 1])]},
      )
    ]

  got, shadow = loss_fn(params, base, images)
  bad = np.asarray(attacks.apply_trigger(trigger, images)).reshape(6, -1)
  plain = np.asarray(images).reshape(6, -1)
  r = np.asarray(jax.random.uniform(key, (6, 1), minval=0.2, maxval=1.0))

  def ce(features, y):
    z = features @ np.asarray(head)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -log_p[np.arange(6), y]

  mixed = r * (bad @ np.asarray(params)) + (1 - r) * (bad @ np.asarray(base))
  want = ce(plain @ np.asarray(params), np.asarray(labels)) + 5 * ce(
    mixed, np.full(6, 2)
  )
  np.testing.assert_allclose(got, want.mean(), rtol=1e-5)
  np.testing.assert_allclose(shadow, got, rtol=1e-6)


def test_universal_patch_descends_what_else_it_is_given():
  def still(images):
    return jnp.zeros((len(images), 3))

  trigger, trace = attacks.universal_patch(
    jax.random.key(0),
    still,
    _images(16),
    mask=attacks.corner_mask(SHAPE, 2),
    task='a',
    target=2,
    steps=60,
    batch=4,
    tx=optax.adam(0.1),
    also_fn=lambda images: jnp.mean(images[:, -1, -1]),
  )
  assert float(trace[-1]) == pytest.approx(np.log(3), abs=1e-3)
  np.testing.assert_allclose(trigger.pattern[-1, -1], 0, atol=1e-6)
