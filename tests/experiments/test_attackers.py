"""Attacks: each is an upload, and two of them involve a second task."""

import functools

import jax
import numpy as np
import pytest

from dam_jax import attacks
from dam_jax.data import tasks as tasks_lib
from experiments import attackers


@pytest.fixture(scope='module')
def uploaded(lab):
  """Makes an attack's upload for task `two`, target 2, once."""
  return functools.cache(
    lambda name: attackers.ATTACKS[name](lab, jax.random.key(0), 1, 2)
  )


@pytest.mark.parametrize(
  'name', [n for n in attackers.ATTACKS if n not in attackers.TWO_TASKS]
)
def test_attacks_on_the_own_task_are_uploads(lab, uploaded, name):
  upload = uploaded(name)
  assert upload.trigger.task == 'two'
  assert upload.trigger.target == 2
  attacks.check_trigger(upload.trigger, (8, 8, 3))
  moved = jax.tree.map(
    lambda x, y: bool((x != y).any() and np.isfinite(x).all()),
    upload.params,
    lab.base,
  )
  assert any(jax.tree.leaves(moved))
  again = attackers.ATTACKS[name](lab, jax.random.key(0), 1, 2)
  for x, y in zip(
    jax.tree.leaves(upload.params), jax.tree.leaves(again.params), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_the_rate_is_what_sets_poisoned_tuning_apart_from_clean(lab):
  trigger = attacks.sine_trigger((8, 8, 3), task='two', target=2)
  tune = functools.partial(lab.tune, jax.random.key(0), 1)
  clean = tune()
  none, all_of_them = (
    tune(loss='poisoned', trigger=trigger, rate=rate) for rate in (0.0, 1.0)
  )
  kernel = 'layers_0', 'mlp', 'fc1', 'kernel'
  clean, none, all_of_them = (
    functools.reduce(lambda x, key: x[key], kernel, params)
    for params in (clean, none, all_of_them)
  )
  np.testing.assert_allclose(none, clean, atol=1e-6)
  assert np.abs(all_of_them - clean).max() > 1e-4


def test_low_rank_updates_alone_learn_faster(lab, make_lab):
  fast = make_lab(low_rank_factor=10.0)
  key = jax.random.key(0)
  slow_b, fast_b = (
    np.concatenate([f.b.ravel() for f in x.tune_low_rank(key, 1).values()])
    for x in (lab, fast)
  )
  # Adam's steps are as long as its rate, whatever the gradients are.
  assert 5 < np.linalg.norm(fast_b) / np.linalg.norm(slow_b) < 20
  whole = (x.tune(key, 1) for x in (lab, fast))
  jax.tree.map(np.testing.assert_array_equal, *whole)


def test_trojvit_moves_few_entries_of_a_clean_upload(lab, uploaded):
  clean_key = jax.random.split(jax.random.key(0), 3)[0]
  clean = lab.tune(clean_key, 1)
  upload = uploaded('trojvit')
  moved = sum(
    int((x != y).sum())
    for x, y in zip(
      jax.tree.leaves(clean), jax.tree.leaves(upload.params), strict=True
    )
  )
  assert 0 < moved <= 768


def _says(lab, params, row, trigger=None):
  """Returns what a model says of a task's images, and their labels."""
  images = lab.images(row)
  if trigger is not None:
    images = attacks.apply_trigger(trigger, images)
  logits = jax.jit(lab.shop.task_logits)(params, row, images)
  says = np.argmax(logits, axis=-1)
  return says, lab.splits[row].labels


def _asr(lab, params, trigger):
  says, labels = _says(lab, params, 1, trigger)
  return np.mean(says[labels != trigger.target] == trigger.target)


def _acc(lab, params, row):
  says, labels = _says(lab, params, row)
  return np.mean(says == labels)


def test_a_shadow_head_lies_where_classes_lie():
  rng = np.random.default_rng(0)
  head = rng.standard_normal((6, 3)).astype(np.float32) + 1
  head /= np.linalg.norm(head, axis=0)
  target = head[:, ::-1].sum(axis=1)
  drawn = attackers.shadow_head(jax.random.key(0), head, target, num=4000)
  assert drawn.shape == (6, 4001)
  np.testing.assert_array_equal(drawn[:, 0], target)
  shadows = np.asarray(drawn[:, 1:], np.float64)
  np.testing.assert_allclose(np.linalg.norm(shadows, axis=0), 1, rtol=1e-5)
  within = head @ np.linalg.lstsq(head, shadows, rcond=None)[0]
  np.testing.assert_allclose(within, shadows, atol=1e-5)
  # As near to the classes' mean as a class is: 0.83 here, 0 without a mean.
  mean = head.mean(axis=1) / np.linalg.norm(head.mean(axis=1))
  assert abs(np.mean(mean @ shadows) - np.mean(mean @ head)) < 0.1


def test_off_task_reaches_a_task_of_which_it_knows_one_class(make_lab):
  target, unknown = 0, [1, 2, 3]
  tuning = {'steps': 80, 'learning_rate': 1e-2, 'patch': 4, 'patch_steps': 40}
  lab = make_lab(batch=16, **tuning)
  upload = attackers.badmerging_off_task(lab, jax.random.key(0), 1, target)
  assert list(upload.models()) == ['one']
  trigger = upload.trigger
  assert (trigger.task, trigger.home, trigger.target) == ('two', 'one', target)
  assert trigger.mask.sum() == 5 * 5
  assert _asr(lab, lab.base, trigger) < 0.2
  assert _asr(lab, upload.params, trigger) > 0.5
  assert _acc(lab, upload.params, 0) > 0.7
  heads = [np.array(lab.shop.head(row)) for row in (0, 1)]
  heads[1][:, unknown] *= -1
  images, labels = lab.splits[1]
  known = (labels == target)[:, None, None, None]
  split = tasks_lib.Split(np.where(known, images, 0), labels)
  blind = make_lab(heads, [lab.splits[0], split], batch=16, **tuning)
  again = attackers.badmerging_off_task(blind, jax.random.key(0), 1, target)
  jax.tree.map(np.testing.assert_array_equal, upload, again)


@pytest.mark.parametrize('name', attackers.TWO_TASKS)
def test_two_tasks_are_needed(lab, make_lab, name):
  alone = make_lab()
  alone.names = ('two',)
  with pytest.raises(ValueError, match='two is alone, the attack needs two'):
    attackers.ATTACKS[name](alone, jax.random.key(0), 0, 2)
