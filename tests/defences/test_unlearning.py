"""Repairs that unlearn what fools a merged model."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.defences.unlearning import hyper_gradient
from dam_jax.defences.unlearning import i_bau
from dam_jax.defences.unlearning import sau
from dam_jax.defences.unlearning import shared_perturbation
from dam_jax.defences.unlearning import unlearning_loss
from tests.defences import victims

SMALL = {'tx': optax.sgd(0.3), 'batch': 32}
OPTIONS = {'radius': 0.2, 'rate': 0.2, 'untargeted': 0.01, 'divergence': 1.0}


@pytest.fixture(scope='module')
def victim():
  found = victims.plant()
  assert found.accuracy(found.params) == 1
  assert found.success(found.params) == 1
  return found


# Without its adversary each is fine-tuning on clean images, which the backdoor
# survives.
@pytest.mark.parametrize(
  ('defence', 'control'),
  [
    (sau(rounds=60, **SMALL), sau(rounds=60, weight=0.0, **SMALL)),
    (
      i_bau(rounds=20, portion=0.25, norm=2.0, **SMALL),
      i_bau(rounds=20, portion=0.25, norm=0.0, **SMALL),
    ),
  ],
  ids=['sau', 'i_bau'],
)
def test_a_planted_backdoor_is_unlearned(victim, defence, control):
  repaired = defence(victim.params, victims.apply_fn, victim.clean)
  assert victim.accuracy(repaired) > 0.95
  assert victim.success(repaired) < 0.1
  kept = control(victim.params, victims.apply_fn, victim.clean)
  assert victim.success(kept) > 0.85
  chex.assert_trees_all_equal_shapes_and_dtypes(repaired, victim.params)
  assert repaired['step'] == victim.params['step']


@pytest.mark.parametrize('make', [sau, i_bau])
def test_the_seed_draws(victim, make):
  def run(seed):
    defence = make(rounds=1, seed=seed, tx=optax.sgd(0.3), batch=64)
    return defence(victim.params, victims.apply_fn, victim.clean)['w']

  assert np.any(np.asarray(run(0)) != np.asarray(run(1)))


def softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def test_shared_examples_fool_both_and_stay_in_the_ball(victim):
  """They find what the patch does, in both models at once."""
  images, labels = (x[:, :32] for x in victim.clean)
  clean = {**victim.params, 'h': victim.params['h'].at[:, 6].set(0.0)}

  @jax.jit
  def search(params, reference):
    return shared_perturbation(
      victims.apply_fn, params, reference, images, labels, steps=5, **OPTIONS
    )

  shift = search(victim.params, victim.params)
  assert shift.shape == images.shape
  assert 0.19 < jnp.abs(shift).max() <= 0.2
  said = np.asarray(victims.predict(victim.params, images + shift))
  others = np.asarray(labels[0]) != victim.trigger.target
  assert (said[0] == 2)[others].mean() > 0.9
  np.testing.assert_array_equal(said[1], labels[1])
  # What only one of two models falls for is not an example to share.
  shift = search(clean, victim.params)
  said = np.asarray(victims.predict(victim.params, images + shift))
  np.testing.assert_array_equal(said, labels)


def test_a_step_of_the_search_is_a_signed_gradient(victim):
  """By central differences of the objective in NumPy."""
  images, labels = (x[:, :2] for x in victim.clean)
  other = {**victim.params, 'w': 0.7 * victim.params['w']}
  options = {**OPTIONS, 'radius': 0.01, 'rate': 0.003, 'untargeted': 3.0}
  shift = shared_perturbation(
    victims.apply_fn, victim.params, other, images, labels, steps=1, **options
  )

  def objective(change):
    p, q = (
      softmax(np.asarray(victims.apply_fn(model, images + change), np.float64))
      for model in (victim.params, other)
    )
    right = np.asarray(jax.nn.one_hot(labels, 3), bool)
    middle = (p + q) / 2
    js = 0.5 * (p * np.log(p / middle) + q * np.log(q / middle)).sum(axis=-1)
    errors = -np.log(p[right]) - np.log(q[right])
    return js.mean(axis=-1).sum() - 1.5 * errors.sum() / 2

  start = np.full(images.shape, 0.01)
  with jax.enable_x64(True):
    images = np.asarray(images, np.float64)
    for at in [(0, 0, 0, 0, 0), (0, 1, 5, 4, 0), (1, 0, 2, 2, 0)]:
      bump = np.zeros(images.shape)
      bump[at] = 1e-4
      slope = objective(start + bump) - objective(start - bump)
      want = 0.01 if slope < 0 else 0.007
      assert shift[at] == pytest.approx(want, rel=1e-5)


def test_the_loss_is_the_published_one():
  rng = np.random.default_rng(0)
  logits, reference = rng.normal(size=(2, 2, 20, 3)).astype(np.float32)
  labels = rng.integers(0, 3, (2, 10))
  got = unlearning_loss(
    jnp.asarray(logits), jnp.asarray(reference), labels, weight=0.7
  )
  p, total, applied = softmax(logits), 0.0, 0
  for t in range(2):
    for i in range(10):
      total -= np.log(p[t, i, labels[t, i]])
      wrong = reference[t, 10 + i].argmax()
      if wrong not in (labels[t, i], reference[t, i].argmax()):
        total -= 0.7 * np.log(1 - p[t, 10 + i, wrong])
        applied += 1
  assert 0 < applied < 20
  np.testing.assert_allclose(got, total / 20, rtol=1e-5)


@pytest.mark.parametrize('steps', [1, 5, 300])
def test_the_hyper_gradient_of_a_quadratic(steps):
  """`inner = d A d / 2 - d B w` has the minimiser `A^-1 B w`."""
  rng = np.random.default_rng(0)
  root, b = rng.normal(size=(4, 4)), rng.normal(size=(4, 3))
  a, c, w = (
    root @ root.T / 4 + np.eye(4),
    rng.normal(size=4),
    rng.normal(size=3),
  )
  minimiser = np.linalg.solve(a, b @ w)
  rate = 0.9 / np.linalg.eigvalsh(a)[-1]
  got = hyper_gradient(
    lambda d, w, c: jnp.sum((d - c) ** 2) / 2 + jnp.sum(w**2),
    lambda d, w, c: d @ a.astype(np.float32) @ d / 2 - d @ jnp.float32(b) @ w,
    jnp.float32(minimiser),
    jnp.float32(w),
    jnp.float32(c),
    steps=steps,
    rate=rate,
  )
  jacobian = np.eye(4) - rate * a
  series = sum(np.linalg.matrix_power(jacobian, k) for k in range(steps))
  outer = minimiser - c
  np.testing.assert_allclose(
    got, 2 * w + rate * b.T @ series @ outer, rtol=1e-4, atol=1e-5
  )
  exact = 2 * w + b.T @ np.linalg.solve(a, outer)
  assert np.allclose(got, exact, rtol=1e-3, atol=1e-3) == (steps == 300)


def test_one_round_of_i_bau_by_hand(victim):
  """Its perturbation is projected, and its gradient the implicit one."""
  one = Labelled(*(x[:, :1] for x in victim.clean))
  params = {k: v for k, v in victim.params.items() if k != 'b'}

  def own_fn(p, x):
    return victims.apply_fn({**p, 'b': victim.params['b']}, x)

  def errors(delta, params):
    logits = own_fn(params, one.images + delta[:, None])
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, one.labels[..., None], axis=-1)

  def inner(delta, params):
    return 0.1 * jnp.sum(delta**2) - jnp.sum(errors(delta, params))

  inner_grad = jax.jit(jax.grad(inner))
  delta = -10 * np.asarray(inner_grad(np.zeros((2, *victims.SHAPE)), params))
  norms = np.sqrt(np.sum(delta**2, axis=(1, 2, 3), keepdims=True))
  bound = float(np.min(norms)) * 1.5
  assert bound < np.max(norms)
  delta = delta * np.minimum(1, bound / norms)

  def outer(params):
    # One step of the series: the minimiser moves as one descent step does.
    moved = delta - 0.2 * inner_grad(delta, params)
    fixed = jax.lax.stop_gradient(delta - moved)
    return jnp.mean(errors(moved + fixed, params))

  floats = {k: v for k, v in params.items() if k != 'step'}
  grads = jax.jit(jax.grad(lambda p: outer({**params, **p})))(floats)
  want = {**params, **{k: floats[k] - 0.5 * grads[k] for k in floats}}
  defence = i_bau(
    rounds=1,
    batch=1,
    norm=bound,
    price=0.1,
    portion=1.0,
    fixed_points=1,
    inner_rate=0.2,
    tx=optax.sgd(0.5),
  )
  chex.assert_trees_all_close(
    defence(params, own_fn, one), want, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  ('make', 'options', 'message'),
  [
    (sau, {'radius': -0.5}, 'radius must be at least 0, got -0.5'),
    (sau, {'rounds': 0}, 'rounds must be at least 1, got 0'),
    (sau, {'weight': math.nan}, 'weight must be at least 0, got nan'),
    (i_bau, {'portion': 0.0}, r'portion must be in \(0, 1\], got 0.0'),
    (i_bau, {'norm': -1.0}, 'norm must be at least 0, got -1.0'),
    (i_bau, {'fixed_points': 0}, 'fixed_points must be at least 1, got 0'),
  ],
)
def test_bad_options_are_named(make, options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_they_read_labels(victim):
  with pytest.raises(ValueError, match='reads Labelled, got NoData'):
    sau()(victim.params, victims.apply_fn, NoData())
