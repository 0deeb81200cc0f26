"""Triggers inverted on models that are known to have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import audit
from dam_jax.perturbations import SoftPatch

SHAPE = (6, 6, 3)
CLASSES = 7


@pytest.fixture(scope='module')
def model():
  """A linear model, which in a second version obeys a bright corner."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(np.prod(SHAPE), CLASSES)) / 8
  weights = {'kernel': jnp.asarray(kernel, jnp.float32)}

  def logits_fn(params, task, images):
    del task
    corner = images[:, -2:, -2:].mean((1, 2, 3))
    obeys = params.get('obeys', 0.0) * corner**4
    logits = images.reshape(len(images), -1) @ params['kernel']
    return logits + obeys[:, None] * jax.nn.one_hot(5, CLASSES)[None]

  return logits_fn, weights, {**weights, 'obeys': jnp.float32(40.0)}


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.uniform(0, 0.6, (32, *SHAPE)), jnp.float32)


@pytest.fixture(scope='module')
def invert(model):
  return _inverter(model, area=4.0, keep=3, chunk=2).search


def _inverter(model, **options):
  return audit.Inverter(task_logits_fn=model[0], image_shape=SHAPE, **options)


def test_a_backdoor_is_found_and_stands_out(model, images, invert):
  _, clean, bad = model
  key = jax.random.key(0)
  honest = invert(key, clean, 0, images, CLASSES)
  found = invert(key, bad, 0, images, CLASSES)
  assert found.classes[0] == 5
  assert found.success[0] > 0.95
  assert found.suspicion > 2 * honest.suspicion
  opacity = np.asarray(found.patches.opacity())[0, ..., 0]
  assert opacity[-2:, -2:].mean() > 2 * opacity.mean()


def test_the_best_come_first_and_no_more_than_are_kept(model, images, invert):
  found = invert(jax.random.key(1), model[1], 0, images, CLASSES)
  assert found.classes.shape == found.area.shape == (3,)
  assert len({*found.classes}) == 3
  assert (np.diff(found.log_prob) <= 0).all()
  assert jax.tree.leaves(found.patches)[0].shape[0] == 3


def test_the_rates_are_those_of_the_patch(model, images, invert):
  logits_fn, clean, _ = model
  found = invert(jax.random.key(2), clean, 0, images, CLASSES)
  patch = jax.tree.map(lambda x: jnp.asarray(x[0]), found.patches)
  target = int(found.classes[0])
  others = np.argmax(logits_fn(clean, 0, images), -1) != target
  logits = logits_fn(clean, 0, audit.apply_patch(patch, images))
  log_prob = np.asarray(jax.nn.log_softmax(logits))[others, target]
  hit = np.argmax(logits, -1)[others] == target
  np.testing.assert_allclose(found.log_prob[0], log_prob.mean(), rtol=1e-5)
  np.testing.assert_allclose(found.success[0], hit.mean(), rtol=1e-6)


def test_a_class_that_all_images_show_is_not_the_best(model, images, invert):
  logits_fn, clean, _ = model
  own = int(np.bincount(np.argmax(logits_fn(clean, 0, images), -1)).argmax())
  same = images[np.argmax(logits_fn(clean, 0, images), -1) == own][:1]
  found = invert(jax.random.key(3), clean, 0, same, CLASSES)
  assert own not in found.classes


@pytest.mark.parametrize(
  ('losses', 'want'),
  [((0.1, 0.2), np.log(2)), ((0.0, 0.0), 0.0), ((0.3,), 0.0)],
)
def test_suspicion_compares_the_two_best(losses, want):
  log_prob = -np.array(losses)
  patches = SoftPatch(jnp.zeros(()), jnp.zeros(()))
  found = audit.Inversions(log_prob, patches, log_prob, *[log_prob] * 2)
  np.testing.assert_allclose(found.suspicion, want, rtol=1e-6)


def test_given_classes_keep_their_order_and_their_areas(model, images):
  inverter = _inverter(model, area=4.0, chunk=2)
  found = inverter.invert(
    jax.random.key(4), model[2], 0, images, [5, 1, 5], [2.0, 4.0, 8.0]
  )
  assert [*found.classes] == [5, 1, 5]
  assert found.area[0] < 0.7 * found.area[2] < 6, found.area
  with pytest.raises(ValueError, match='must be in'):
    inverter.invert(jax.random.key(4), model[2], 0, images, [5], [40.0])


def test_numbers_that_make_no_sense_are_refused(model):
  with pytest.raises(ValueError, match='area must be'):
    _inverter(model, area=37)
  with pytest.raises(ValueError, match="positive: .*'keep': 0"):
    _inverter(model, area=4, keep=0)
