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
  """A linear model, fine-tuned, and so that it obeys a bright corner."""
  rng = np.random.default_rng(0)
  base, tuned = (
    {'kernel': jnp.asarray(kernel, jnp.float32), 'obeys': jnp.float32(0.0)}
    for kernel in np.cumsum(rng.normal(size=(2, np.prod(SHAPE), CLASSES)), 0)
    / 8
  )

  def logits_fn(params, task, images):
    del task
    corner = images[:, -2:, -2:].mean((1, 2, 3))
    obeys = params['obeys'] * corner**4
    logits = images.reshape(len(images), -1) @ params['kernel']
    return logits + obeys[:, None] * jax.nn.one_hot(5, CLASSES)[None]

  return logits_fn, base, tuned, {**tuned, 'obeys': jnp.float32(40.0)}


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.uniform(0, 0.6, (32, *SHAPE)), jnp.float32)


@pytest.fixture(scope='module')
def invert(model):
  return _inverter(model, areas=(3.0, 5.0), last=10, chunk=3).search


def _inverter(model, **options):
  return audit.Inverter(task_logits_fn=model[0], image_shape=SHAPE, **options)


def test_a_backdoor_is_found_and_stands_out(model, images, invert):
  _, base, tuned, bad = model
  key = jax.random.key(0)
  honest = invert(key, tuned, 0, images, CLASSES, base=base)
  found = invert(key, bad, 0, images, CLASSES, base=base)
  assert found.classes[0] == 5
  assert found.success[0].min() > 0.95
  assert found.suspicion > 2 * honest.suspicion
  opacity = np.asarray(found.patches.opacity())[0, 0, ..., 0]
  assert opacity[-2:, -2:].mean() > 2 * opacity.mean()


def test_without_a_base_losses_are_compared(model, images, invert):
  bad = model[-1]
  found = invert(jax.random.key(0), bad, 0, images, CLASSES)
  assert found.classes[0] == 5
  patches = jax.tree.map(jnp.asarray, found.patches)
  loss = []
  for i, area in np.ndindex(2, 2):
    target = found.classes[i]
    patch = jax.tree.map(lambda x, at=(i, area): x[at], patches)
    others = np.argmax(model[0](bad, 0, images), -1) != target
    logits = model[0](bad, 0, audit.apply_patch(patch, images))
    loss.append(max(-jax.nn.log_softmax(logits)[others, target].mean(), 1e-3))
  lead = -np.log(loss).reshape(2, 2)
  np.testing.assert_allclose(found.lead, lead, rtol=1e-4)


def test_what_the_base_obeys_too_is_no_backdoor(model, images, invert):
  _, _, tuned, bad = model
  base = {**tuned, 'obeys': bad['obeys'] / 2}
  same = invert(jax.random.key(0), base, 0, images, CLASSES, base=base)
  np.testing.assert_allclose(same.lead, 0, atol=1e-5)
  assert abs(same.suspicion) < 1e-5
  # This expert learnt nothing but to obey more.
  more = invert(jax.random.key(0), bad, 0, images, CLASSES, base=base)
  only = invert(jax.random.key(0), bad, 0, images, CLASSES, base=tuned)
  assert more.suspicion < 0.7 * only.suspicion


def test_the_best_come_first_and_no_more_than_are_kept(model, images, invert):
  found = invert(jax.random.key(1), model[2], 0, images, CLASSES, base=model[1])
  assert found.classes.shape == (2,)
  assert found.area.shape == (2, 2)
  assert len({*found.classes}) == 2
  assert found.score[0] >= found.score[1]
  assert found.lead[0, found.best()] == found.lead[0].max()
  assert found.patches.pattern_logits.shape == (2, 2, *SHAPE)


def test_the_rates_are_those_of_the_patch(model, images, invert):
  logits_fn, base, tuned, _ = model
  found = invert(jax.random.key(2), tuned, 0, images, CLASSES, base=base)
  patch = jax.tree.map(lambda x: jnp.asarray(x[0, 1]), found.patches)
  target = int(found.classes[0])
  others = np.argmax(logits_fn(tuned, 0, images), -1) != target
  triggered = audit.apply_patch(patch, images)
  loss, of_base = (
    -jax.nn.log_softmax(logits_fn(p, 0, triggered))[others, target].mean()
    for p in (tuned, base)
  )
  hit = np.argmax(logits_fn(tuned, 0, triggered), -1)[others] == target
  np.testing.assert_allclose(
    found.lead[0, 1], np.log(of_base / loss), rtol=1e-4
  )
  np.testing.assert_allclose(found.success[0, 1], hit.mean(), rtol=1e-6)


@pytest.mark.parametrize(('score', 'want'), [((4.0, 1.0), 3.0), ((3.0,), 0.0)])
def test_suspicion_compares_the_two_best(score, want):
  patches, rate = SoftPatch(jnp.zeros(()), jnp.zeros(())), np.zeros((2, 1))
  found = audit.Inversions(np.arange(2), np.array(score), patches, *[rate] * 3)
  assert found.suspicion == want


def test_every_round_counts(model, images, monkeypatch):
  rounds, play = [], audit.Inverter._play

  def noted(*args, **options):
    out = play(*args, **options)
    rounds.append(dict(zip(out[0].tolist(), out[-1][0].max(1), strict=True)))
    return out

  monkeypatch.setattr(audit.Inverter, '_play', noted)
  invert = _inverter(model, areas=(3.0, 5.0), last=4, keep=3).search
  found = invert(jax.random.key(0), model[2], 0, images, CLASSES, base=model[1])
  assert [len(leads) for leads in rounds] == [CLASSES, 3, 2]
  for target, score in zip(found.classes, found.score, strict=True):
    mean = np.mean([leads[int(target)] for leads in rounds])
    np.testing.assert_allclose(score, mean, rtol=1e-5)


def test_a_class_that_all_images_show_is_not_the_best(model, images, invert):
  logits_fn, base, tuned, _ = model
  own = int(np.bincount(np.argmax(logits_fn(tuned, 0, images), -1)).argmax())
  same = images[np.argmax(logits_fn(tuned, 0, images), -1) == own][:1]
  found = invert(jax.random.key(3), tuned, 0, same, CLASSES, base=base)
  assert own not in found.classes


def test_patches_keep_to_their_areas(model, images):
  search = _inverter(model, areas=(2.0, 8.0)).search
  _, base, _, bad = model
  found = search(jax.random.key(4), bad, 0, images, CLASSES, base=base)
  assert found.area[0, 0] < 0.7 * found.area[0, 1] < 6, found.area


def test_numbers_that_make_no_sense_are_refused(model):
  for areas in ((4.0, 37.0), ()):
    with pytest.raises(ValueError, match='areas must be'):
      _inverter(model, areas=areas)
  with pytest.raises(ValueError, match="positive: .*'keep': 0"):
    _inverter(model, areas=(4.0,), keep=0)


def test_gram_matches_numpy_and_adds_up_over_parts():
  rng = np.random.default_rng(5)
  base = {'a': rng.normal(size=(2, 3)), 'b': {'c': rng.normal(size=4)}}
  experts = jax.tree.map(lambda x: x + rng.normal(size=(3, *x.shape)), base)
  base, experts = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), (base, experts)
  )
  deltas = jax.tree.map(
    lambda x, y: np.asarray(y, np.float64) - np.asarray(x)[None], base, experts
  )
  flat = np.concatenate([d.reshape(3, -1) for d in jax.tree.leaves(deltas)], 1)
  whole = audit.gram(base, experts)
  np.testing.assert_allclose(whole, flat @ flat.T, rtol=1e-5)
  parts = [audit.gram(base[k], experts[k]) for k in base]
  np.testing.assert_allclose(sum(map(np.asarray, parts)), whole, rtol=1e-6)
  with pytest.raises(ValueError, match='b/c'):
    audit.gram(base, {**experts, 'b': {'c': jnp.zeros((3, 5))}})


def test_company_is_mutual_and_never_oneself():
  vectors = np.array([[1.0, 0, 0], [0.9, 0.4, 0], [0, 0, 1], [0, 0, 0]])
  found = audit.company(vectors @ vectors.T)
  assert found == [{1: found[0][1]}, {0: found[0][1]}, {}, {}]
  want = vectors[0] @ vectors[1] / np.linalg.norm(vectors[1])
  assert found[0][1] == pytest.approx(want, abs=1e-4)


def test_in_company_adds_the_others_task_vectors():
  base, experts = {'w': jnp.array(0.1)}, {'w': jnp.array([0.3, 0.7, 1.5])}
  alone = audit.in_company(base, experts, 1, [])
  np.testing.assert_array_equal(alone['w'], experts['w'][1])
  both = audit.in_company(base, experts, 1, [0, 2])
  np.testing.assert_allclose(both['w'], 0.7 + 0.2 + 1.4, rtol=1e-6)


def test_together_is_about_as_long_as_one():
  base = {'w': jnp.full(3, 0.5)}
  experts = {'w': base['w'][None] + jnp.eye(3)}
  both = audit.together(base, experts, [0, 2])
  np.testing.assert_allclose(both['w'] - 0.5, [0.5**0.5, 0, 0.5**0.5])
  none = audit.together(base, experts, [])
  np.testing.assert_array_equal(none['w'], base['w'])


def test_what_an_expert_of_another_task_plants_is_found(model, images, invert):
  _, base, tuned, bad = model
  experts = jax.tree.map(lambda *x: jnp.stack(x), tuned, tuned, bad)
  params = audit.together(base, experts, [1, 2])
  found = invert(jax.random.key(0), params, 0, images, CLASSES, base=base)
  assert found.classes[0] == 5
  params = audit.together(base, experts, [1])
  found = invert(jax.random.key(0), params, 0, images, CLASSES, base=base)
  rates = dict(zip(found.classes.tolist(), found.success.T[0], strict=True))
  assert rates.get(5, 0) < 0.5


def test_what_only_works_together_is_found_together(model, images, invert):
  _, base, tuned, bad = model
  half = {**tuned, 'obeys': bad['obeys'] / 2}
  delta = jax.tree.map(lambda x, y: y - x, tuned, half)
  partner = jax.tree.map(jnp.add, base, delta)
  experts = jax.tree.map(lambda *x: jnp.stack(x), half, partner)
  both = audit.in_company(base, experts, 0, [1])
  found = invert(jax.random.key(0), both, 0, images, CLASSES, base=base)
  want = invert(jax.random.key(0), bad, 0, images, CLASSES, base=base)
  assert found.classes[0] == want.classes[0] == 5
  np.testing.assert_allclose(found.suspicion, want.suspicion, rtol=1e-3)


def test_a_saturated_upload_is_met_on_the_way_to_it(model, images):
  plain_fn, base, _, bad = model

  def logits_fn(params, task, images):
    corner = images[:, -2:, -2:].mean((1, 2, 3))
    gate = 20 * jnp.tanh(params['obeys'] * (corner - 0.8))
    logits = plain_fn({**params, 'obeys': 0.0}, task, images)
    return logits + gate[:, None] * jax.nn.one_hot(5, CLASSES)[None]

  def success(ease):
    inverter = _inverter([logits_fn], areas=(4.0,), keep=CLASSES, ease=ease)
    found = inverter.search(
      jax.random.key(6), bad, 0, images, CLASSES, base=base
    )
    return found.success[found.classes == 5].max(initial=0)

  assert success(0.1) > 0.9
  assert success(1.0) < 0.1
  with pytest.raises(ValueError, match='ease must be in'):
    success(0.0)
