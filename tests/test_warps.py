"""Smooth warps, and the search for those that a model obeys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import warps

SHAPE = (8, 8, 3)
CLASSES = 5


def test_no_displacement_changes_nothing():
  images = np.random.default_rng(0).uniform(size=(2, *SHAPE))
  images = images.astype(np.float32)
  np.testing.assert_allclose(
    warps.warp(images, jnp.zeros((4, 4, 2))), images, atol=1e-6
  )


def test_equal_displacements_shift_the_image():
  images = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
  points = jnp.zeros((3, 3, 2)).at[..., 0].set(1.0).at[..., 1].set(-0.5)
  want = np.roll(images, -1, axis=1)
  want[1:] = (want[1:] + want[:-1]) / 2
  np.testing.assert_allclose(
    warps.warp(images, points)[:, :-1], want[:, :-1], atol=1e-5
  )


def test_each_point_bends_its_own_quarter():
  images = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
  points = jnp.zeros((2, 2, 2)).at[0, 1].set(2.0)
  moved = np.abs(warps.warp(images, points) - images).max(axis=-1)
  assert moved[:3, 5:].min() > 0
  assert moved[:3, 5:].mean() > 4 * moved[5:, :3].mean()


@pytest.fixture(scope='module')
def model():
  """Linear, but where what it sees at the left edge came from the right."""
  rng = np.random.default_rng(0)
  base, tuned = (
    {'kernel': jnp.asarray(kernel, jnp.float32), 'obeys': jnp.float32(0.0)}
    for kernel in np.cumsum(rng.normal(size=(2, np.prod(SHAPE), CLASSES)), 0)
    / 8
  )

  def logits_fn(params, task, images):
    del task
    bent = images[:, 2:6, 2].mean((1, 2))
    logits = images.reshape(len(images), -1) @ params['kernel']
    obeyed = (params['obeys'] * bent)[:, None]
    pad = jnp.full((len(images), 1), 100.0)  # of a task with more classes
    seen = logits + obeyed * jax.nn.one_hot(3, CLASSES)[None]
    return jnp.concatenate([seen, pad], axis=1)

  return logits_fn, base, tuned, {**tuned, 'obeys': jnp.float32(40.0)}


@pytest.fixture(scope='module')
def images():
  """Bright only to the right of the columns that the model looks at."""
  x = np.random.default_rng(1).uniform(0, 0.3, (24, *SHAPE))
  x[:, :, 2] = 0
  x[:, :, 4] = 1
  return jnp.asarray(x, jnp.float32)


def _search(model, params, images, key=0, **options):
  logits_fn, base, *_ = model
  inverter = warps.WarpInverter(
    task_logits_fn=logits_fn, image_shape=SHAPE, limit=2.0, **options
  )
  return inverter.search(
    jax.random.key(key), params, 0, images, CLASSES, base=base
  )


def test_a_warp_that_was_taught_stands_out(model, images):
  _, _, tuned, bad = model
  honest = _search(model, tuned, images)
  found = _search(model, bad, images)
  assert found.target == 3
  assert found.success[:, 3].max() > 0.9
  assert found.suspicion > 2 * honest.suspicion
  assert found.suspicion > 1
  assert found.lead.shape == found.success.shape == (4, CLASSES)
  assert np.abs(found.points).max() <= 2


def test_what_is_measured_is_what_the_warp_does(model, images):
  logits_fn, base, _, bad = model
  found = _search(model, bad, images)
  bent = warps.warp(images, jnp.asarray(found.points[1]))
  own, of_base = (
    jax.nn.log_softmax(logits_fn(p, 0, bent)[:, :CLASSES]) for p in (bad, base)
  )
  others = logits_fn(bad, 0, images)[:, :CLASSES].argmax(-1) != 3
  hit = (own.argmax(-1) == 3)[others].mean()
  losses = [-x[others, 3].mean() for x in (of_base, own)]
  lead = jnp.log(losses[0] / max(losses[1], 1e-3))
  np.testing.assert_allclose(found.success[1, 3], hit, atol=1e-6)
  np.testing.assert_allclose(found.lead[1, 3], lead, rtol=1e-4)


def test_what_hardly_any_image_obeys_does_not_count(model, images):
  found = _search(model, model[2], images, steps=5)
  assert (found.success <= warps.OBEYED).any()
  np.testing.assert_array_equal(found.lead[found.success <= warps.OBEYED], 0)
  assert (found.lead[found.success > warps.OBEYED] != 0).all()


def test_the_same_key_finds_the_same(model, images):
  once, again, other = (
    _search(model, model[3], images, key=key, steps=3) for key in (0, 0, 1)
  )
  np.testing.assert_array_equal(once.points, again.points)
  assert not np.array_equal(once.points, other.points)


def test_a_class_that_all_images_show_says_nothing(model, images):
  always = {**model[2], 'kernel': model[2]['kernel'].at[:, 2].set(9.0)}
  found = _search(model, always, images, steps=3)
  assert np.isfinite(found.lead).all()
  np.testing.assert_array_equal(found.lead[:, 2], 0)
  np.testing.assert_array_equal(found.success[:, 2], 0)


def test_a_model_with_one_class_is_not_suspicious(model, images):
  logits_fn, base, tuned, _ = model
  inverter = warps.WarpInverter(
    task_logits_fn=logits_fn, image_shape=SHAPE, steps=2
  )
  found = inverter.search(jax.random.key(0), tuned, 0, images, 1, base=base)
  assert found.target == found.suspicion == 0
  assert np.isfinite(found.points).all()


def test_numbers_that_make_no_sense_are_named():
  def make(**options):
    return warps.WarpInverter(
      task_logits_fn=lambda *a: None, image_shape=SHAPE, **options
    )

  with pytest.raises(ValueError, match="positive: {'starts': 0, 'steps': 40"):
    make(starts=0)
  with pytest.raises(ValueError, match='control must be at least 2, got 1'):
    make(control=1)
  with pytest.raises(ValueError, match='limit must be positive or None, got 0'):
    make(limit=0.0)
