"""Repairs that add or subtract one task vector."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax.attacks import patch_trigger
from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.defences.vectors import fine_tuning
from dam_jax.defences.vectors import ibvs
from dam_jax.defences.vectors import lfpm
from dam_jax.defences.vectors import tbar
from dam_jax.defences.vectors import wag
from tests.defences import victims

TX = optax.sgd(1.0)


@pytest.fixture(scope='module')
def victim():
  return victims.plant()


def check_repaired(victim, repaired):
  """Asserts that the backdoor is gone, and nothing else."""
  assert victim.success(victim.params) == 1
  assert victim.success(repaired) < 0.1
  assert victim.accuracy(repaired) > 0.95
  chex.assert_trees_all_equal_shapes_and_dtypes(repaired, victim.params)
  assert repaired['step'] == victim.params['step']


def test_wag_is_the_mean_of_uploads(tiny):
  defence = wag()
  assert defence.experts
  got = defence(tiny.experts, None, NoData())
  for name, x in tiny.experts.items():
    wide = np.asarray(x, np.float64)
    want = wide[0] if name == 'step' else wide.mean(axis=0)
    np.testing.assert_allclose(
      np.asarray(got[name], np.float64),
      want,
      rtol=1e-2 if name == 'gain' else 1e-6,
      atol=1e-6,
    )
  chex.assert_trees_all_equal_shapes_and_dtypes(got, tiny.base)


def test_ibvs_removes_a_backdoor_like_its_own(victim):
  defence = ibvs(trigger=victim.trigger, rate=0.5, tx=TX, steps=60, batch=32)
  check_repaired(victim, defence(victim.params, victims.apply_fn, victim.clean))


def test_ibvs_subtracts_only_what_the_poison_adds(victim):
  def moved(**options):
    defence = ibvs(target=1, tx=TX, steps=5, batch=16, **options)
    repaired = defence(victim.params, victims.apply_fn, victim.clean)
    return np.asarray(repaired['w'] - victim.params['w'])

  assert not moved(rate=0.0).any()
  # The default trigger is the corner, which one row of the weights reads.
  rows = np.abs(moved(rate=0.5)).max(axis=1)
  assert rows[-1] > 0.9 * rows.max()


@pytest.mark.parametrize('known', [True, False])
def test_tbar_removes_a_backdoor(victim, known):
  trigger = (0, victim.trigger) if known else None
  defence = tbar(trigger=trigger, tx=TX, steps=30, area=4 / 36)
  check_repaired(victim, defence(victim.params, victims.apply_fn, victim.clean))


def test_a_fine_tuning_is_that_of_one_task(victim):
  """A step of descent on one image of the second task, by hand."""
  image, label = (x[1, :1] for x in victim.clean)
  flat = dj.tree.ravel(victim.params)
  vector_fn = fine_tuning(
    victims.apply_fn, flat, 2, 1, tx=optax.sgd(0.5), batch=4
  )
  keys = jax.random.split(jax.random.key(0), 1)
  vector = vector_fn(image, label, keys)

  @jax.jit
  @jax.grad
  def grad_fn(vector):
    both = jnp.broadcast_to(image, (2, *image.shape))
    logits = victims.apply_fn(flat.unravel(vector), both)[1, 0]
    return jax.nn.logsumexp(logits) - logits[label[0]]

  np.testing.assert_allclose(
    vector, -0.5 * grad_fn(flat.vector), rtol=1e-4, atol=1e-6
  )
  heads = np.asarray(flat.unravel(vector)['h'])
  assert not heads[0].any()
  assert heads[1].any()


def test_lfpm_removes_a_backdoor(victim):
  options = {'tx': optax.sgd(0.1), 'steps': 100, 'batch': 32}

  def run(weight):
    defence = lfpm(weight=weight, **options)
    return defence(victim.params, victims.apply_fn, victim.clean)

  check_repaired(victim, run(1.0))
  assert victim.success(run(0.0)) > 0.9


def test_lfpm_without_lookahead_descends_at_a_point_of_the_path(victim):
  """The first point is theta, where the gradient counts `t` times."""
  one = Labelled(*(x[:, :1] for x in victim.clean))
  flat = dj.tree.ravel(victim.params)

  def vector(rho):
    defence = lfpm(
      weight=0.0, rho=rho, tx=optax.sgd(1.0), steps=1, batch=1, seed=3
    )
    repaired = defence(victim.params, victims.apply_fn, one)
    return {k: np.asarray(repaired[k]) - victim.params[k] for k in 'wh'}

  @jax.jit
  @jax.grad
  def grad_fn(vector):
    logits = victims.apply_fn(flat.unravel(vector), one.images)
    return jnp.mean(dj.losses.cross_entropy(logits, one.labels))

  @jax.jit
  def grad(rho):
    found = grad_fn(flat.vector)
    ahead = flat.vector + rho * found / jnp.linalg.norm(found)
    return flat.unravel(grad_fn(ahead))

  plain, want = vector(0.0), grad(0.0)
  t = -np.vdot(plain['h'], want['h']) / np.vdot(want['h'], want['h'])
  assert 0 < t < 1
  for name in 'wh':
    np.testing.assert_allclose(plain[name], -t * want[name], atol=1e-6)
  # With the same seed t is the same.
  moved, want = vector(0.5), grad(0.5 * t)
  for name in 'wh':
    np.testing.assert_allclose(moved[name], -t * want[name], atol=1e-6)
  assert np.abs(moved['w'] - plain['w']).max() > 1e-5


@pytest.mark.parametrize(
  ('make', 'options', 'message'),
  [
    (ibvs, {'rate': 1.5}, r'rate must be in \[0, 1\], got 1.5'),
    (ibvs, {'task': -1}, 'task must be at least 0, got -1'),
    (tbar, {'samples': 0}, 'samples must be at least 1, got 0'),
    (tbar, {'area': 0.0}, r'area must be in \(0, 1\], got 0.0'),
    (lfpm, {'ascents': 0}, 'ascents must be at least 1, got 0'),
    (lfpm, {'rho': -0.1}, 'rho must be at least 0, got -0.1'),
  ],
)
def test_bad_options_are_named(make, options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_what_does_not_fit_the_data_is_named(victim):
  args = victim.params, victims.apply_fn, victim.clean
  with pytest.raises(ValueError, match='no task 2, there are 2'):
    ibvs(task=2)(*args)
  large = patch_trigger((8, 8, 1), size=2, task='0', target=2)
  with pytest.raises(ValueError, match='pattern is .* images want'):
    tbar(trigger=(0, large))(*args)
  rate = 'asks for 96 images that are not of class 0'
  with pytest.raises(ValueError, match=rate):
    ibvs(rate=1.0)(*args)
  same = victim.clean._replace(labels=jnp.full_like(victim.clean.labels, 2))
  with pytest.raises(ValueError, match='no image that is not of class 2'):
    tbar(trigger=(0, victim.trigger))(victim.params, victims.apply_fn, same)


def test_the_trigger_is_what_repairs(victim):
  """TBAR with a trigger that the model does not obey leaves the backdoor."""
  other = patch_trigger(victims.SHAPE, size=1, task='0', target=0)
  said = victims.predict(victim.params, victim.test.images, other)
  np.testing.assert_array_equal(said, victim.test.labels)
  defence = tbar(trigger=(0, other), scale=0.1, tx=TX, steps=5)
  repaired = defence(victim.params, victims.apply_fn, victim.clean)
  assert victim.success(repaired) > 0.9
