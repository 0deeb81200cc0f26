"""ANP and AWM: their steps, what they remove, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax.defences import Labelled
from dam_jax.defences import masking
from dam_jax.defences import pruning

HIDDEN_KERNEL = r'.*/fc1/kernel'
SIZE = 12


def linear(params, images):
  flat = images.reshape(*images.shape[:2], -1)
  return flat @ params['kernel'] + params['bias'][None, None]


def linear_case(classes, *, seed=0):
  """Returns a linear model and one image for each of two tasks.

  A draw with replacement is then always the same image.
  """
  rng = np.random.default_rng(seed)
  params = {
    'kernel': jnp.asarray(rng.normal(size=(SIZE, classes)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=classes), jnp.float32),
  }
  images = rng.uniform(0.2, 0.8, (2, 1, 2, 2, 3))
  labels = jnp.array([[0], [1]])
  return params, Labelled(jnp.asarray(images, jnp.float32), labels)


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def neuron_masks(params, apply_fn, data, **options):
  defaults = {
    'kernels': 'kernel',
    'eps': 0.4,
    'adversary_steps': 1,
    'alpha': 0.2,
    'tx': optax.sgd(0.2, momentum=0.9),
    'steps': 1,
    'batch': 2,
  }
  return masking.neuron_masks(params, apply_fn, data, **{**defaults, **options})


def test_masks_of_neurons_descend_the_cross_entropy():
  params, data = linear_case(3)
  got = neuron_masks(params, linear, data, eps=0.0, steps=3)['kernel']
  kernel, bias = np.asarray(params['kernel']), np.asarray(params['bias'])
  x, y = np.asarray(data.images).reshape(2, -1), np.eye(3)[data.labels[:, 0]]
  mask, momentum = np.ones(3), np.zeros(3)
  for _ in range(3):
    p = softmax(x @ kernel * mask + bias)
    momentum = 0.9 * momentum + ((p - y) * (x @ kernel)).mean(0)
    mask = np.clip(mask - 0.2 * momentum, 0, 1)
  assert 0 < mask.min() < 0.95
  np.testing.assert_allclose(got, mask, rtol=1e-5)


def test_noise_raises_the_loss_of_weights_and_bias_within_its_bound():
  # Of two classes with label 0, all noise that raises the loss makes the masks
  # fall faster, so that none and most bound what one step does.
  params = {'kernel': jnp.array([[-0.04, 0.02]]), 'bias': jnp.array([0.5, 0.3])}
  data = Labelled(jnp.ones((1, 1, 1, 1, 1)), jnp.zeros((1, 1), int))
  options = {'tx': optax.sgd(5.0), 'alpha': 0.0}
  plain = neuron_masks(params, linear, data, eps=0.0, **options)['kernel']
  w, b = np.array([-0.04, 0.02]), np.array([0.5, 0.3])

  def most(eps):  # where noise of the weights is 0.4 and that of the bias eps
    p = softmax(w * 1.4 + b * (1 + eps * np.array([-1, 1])))
    return 1 - 5 * (p - np.array([1, 0])) * w

  found = set()
  for seed in range(2):
    masks = neuron_masks(params, linear, data, seed=seed, **options)['kernel']
    assert (masks < plain).all()
    assert (masks < most(0)).all()
    assert (masks >= most(0.4) - 1e-6).all()
    found.add(float(masks[0]))
  # Half of the weight halves what the noise does.
  half = neuron_masks(
    params, linear, data, seed=seed, tx=optax.sgd(5.0), alpha=0.5
  )
  np.testing.assert_allclose(half['kernel'], (masks + plain) / 2, rtol=1e-6)
  assert len(found) == 2


def test_ascent_takes_signed_steps_and_stays_within_the_bound():
  noise = {'w': jnp.array([0.1, -0.3, 0.0])}
  slope = {'w': jnp.array([2.0, -5.0, 0.0])}
  once = masking._ascend_signs(lambda x: slope, noise, 0.4, 1)
  np.testing.assert_allclose(once['w'], [0.4, -0.4, 0.0])
  flips = iter([slope, {'w': -slope['w']}])
  twice = masking._ascend_signs(lambda x: next(flips), noise, 0.4, 2)
  np.testing.assert_allclose(twice['w'], [0.1, -0.2, 0.0], atol=1e-7)


def anp(**options):
  options = {'kernels': HIDDEN_KERNEL, 'steps': 40, 'batch': 16, **options}
  return masking.anp(**options)


def test_anp_prunes_the_planted_neuron(planted):
  assert planted.accuracy(planted.params) == planted.attack_rate(planted.params)
  repaired = anp()(planted.params, planted.logits_fn, planted.data)
  chex.assert_trees_all_equal_shapes_and_dtypes(repaired, planted.params)
  assert planted.accuracy(repaired) > 0.98
  assert planted.attack_rate(repaired) < 0.05
  fc1 = repaired['layers_0']['mlp']['fc1']
  assert not fc1['kernel'][:, planted.unit].any()
  # Weights alone are masked.
  changed = {**planted.params['layers_0']['mlp']['fc1'], 'kernel': None}
  chex.assert_trees_all_equal({**fc1, 'kernel': None}, changed)


def test_anp_without_noise_leaves_the_planted_neuron(planted):
  repaired = anp(eps=0.0)(planted.params, planted.logits_fn, planted.data)
  assert planted.attack_rate(repaired) == 1


def test_the_threshold_is_the_largest_that_keeps_clean_accuracy(
  planted, monkeypatch
):
  params, data = planted.params, planted.data
  path = 'layers_0/mlp/fc1/kernel'
  order = np.roll(np.arange(16), planted.unit)  # the planted unit goes first
  masks = {path: jnp.asarray(order / 15, jnp.float32)}
  monkeypatch.setattr(masking, 'neuron_masks', lambda *_, **__: masks)
  grid = tuple(np.arange(0, 16, 2) / 15)
  pruned = {
    t: pruning.multiply(params, {path: masks[path] > np.float32(t)})
    for t in grid
  }
  fell = {t: 1 - planted.accuracy(x) for t, x in pruned.items()}
  chosen = []
  for max_drop in (0.0, 0.4, 1.0):
    defence = masking.anp(thresholds=grid, max_drop=max_drop)
    chosen.append(max(t for t in grid if fell[t] <= max_drop + 1e-6))
    got = defence(params, planted.logits_fn, data)
    chex.assert_trees_all_equal(got, pruned[chosen[-1]])
  assert grid[0] <= chosen[0] < chosen[1] < chosen[2] == grid[-1]
  # Nothing but accuracy on these labels counts: none is right, none is lost.
  wrong = data._replace(labels=(data.labels + 1) % 3)
  every = masking.anp(thresholds=(1.0,))
  assert every(params, planted.logits_fn, data) is params
  gone = every(params, planted.logits_fn, wrong)
  assert not gone['layers_0']['mlp']['fc1']['kernel'].any()


def test_defaults_of_anp_are_the_published_ones(planted, monkeypatch):
  seen = {}

  def neuron_masks(params, apply_fn, data, **options):
    seen.update(options)
    return {}

  monkeypatch.setattr(masking, 'neuron_masks', neuron_masks)
  masking.anp(seed=3)(planted.params, planted.logits_fn, planted.data)
  tx = seen.pop('tx')
  updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
  assert updates == np.float32(-0.2)
  assert tx.update(jnp.ones(1), state)[0] == np.float32(-0.2 * 1.9)
  assert seen == {
    'kernels': '(.*/)?kernel',
    'eps': 0.4,
    'adversary_steps': 1,
    'alpha': 0.2,
    'steps': 2000,
    'batch': 128,
    'seed': 3,
  }


def awm_by_hand(params, data, *, rounds, steps, bound, alpha, gamma, lr):
  """Returns the masked linear model of two tasks, with NumPy."""
  theta = {k: np.asarray(v, np.float64) for k, v in params.items()}
  x = np.asarray(data.images, np.float64).reshape(2, -1)
  y = np.eye(3)[np.asarray(data.labels)[:, 0]]
  mask = {k: np.ones(v.shape) for k, v in theta.items()}
  first = {k: np.zeros(v.shape) for k, v in theta.items()}
  second = {k: np.zeros(v.shape) for k, v in theta.items()}
  count = 0
  for r in range(rounds):
    kernel, bias = (mask[k] * theta[k] for k in ('kernel', 'bias'))
    change = np.zeros_like(x)
    target = np.eye(3)[(x @ kernel + bias).argmax(-1)]
    for _ in range(steps):
      p = softmax((x + change) @ kernel + bias)
      change += 10 * (p - target) @ kernel.T
    norm = np.abs(change).sum(1, keepdims=True)
    assert (norm > bound).all()
    change *= np.minimum(1, bound / norm)
    for _ in range(steps):
      grads = {k: np.full(v.shape, gamma) for k, v in theta.items()}
      for z, weight in [(x, alpha), (np.clip(x + change, 0, 1), 1 - alpha)]:
        p = softmax(
          z @ (mask['kernel'] * theta['kernel']) + mask['bias'] * theta['bias']
        )
        grads['kernel'] += weight * z.T @ (p - y) / 2 * theta['kernel']
        grads['bias'] += weight * (p - y).mean(0) * theta['bias']
      count += 1
      for k, g in grads.items():
        first[k] = 0.9 * first[k] + 0.1 * g
        second[k] = 0.999 * second[k] + 0.001 * g * g
        m, v = first[k] / (1 - 0.9**count), second[k] / (1 - 0.999**count)
        mask[k] -= lr * 0.9**r * m / (np.sqrt(v) + 1e-8)
        mask[k] = np.clip(mask[k], 0, 1)
  return {k: mask[k] * theta[k] for k in theta}


@pytest.mark.parametrize(
  ('l1_norm', 'bound'), [(2.0, 2.0), (None, 1000 * SIZE / (32 * 32 * 3))]
)
def test_awm_is_what_its_equations_say(l1_norm, bound):
  params, data = linear_case(3)
  how = {'alpha': 0.7, 'gamma': 0.01, 'lr': 0.05}
  want = awm_by_hand(params, data, rounds=3, steps=4, bound=bound, **how)
  defence = masking.awm(rounds=3, epochs=4, batch=1, l1_norm=l1_norm, **how)
  got = defence(params, linear, data)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  assert np.abs(got['kernel'] - params['kernel']).max() > 0.1


def test_awm_masks_the_planted_neuron(planted):
  defence = masking.awm(epochs=20, batch=16)
  repaired = defence(planted.params, planted.logits_fn, planted.data)
  chex.assert_trees_all_equal_shapes_and_dtypes(repaired, planted.params)
  assert planted.accuracy(repaired) > 0.98
  assert planted.attack_rate(repaired) < 0.05
  ratio = jax.tree.map(
    lambda new, old: np.asarray(new / jnp.where(old == 0, 1, old), np.float32),
    repaired['layers_0'],
    planted.params['layers_0'],
  )
  for mask in jax.tree.leaves(ratio):
    assert mask.min() >= 0
    assert mask.max() <= 1
  assert repaired['step'] == 7


def test_awm_masks_what_its_rule_says_on_draws_of_its_seed(planted):
  old, found = planted.params['layers_0']['mlp'], []
  for seed in (1, 2):
    defence = masking.awm(leaves=HIDDEN_KERNEL, rounds=1, batch=16, seed=seed)
    repaired = defence(planted.params, planted.logits_fn, planted.data)
    new = repaired['layers_0']['mlp']
    chex.assert_trees_all_equal(new['fc2'], old['fc2'])
    chex.assert_trees_all_equal(new['fc1']['bias'], old['fc1']['bias'])
    found.append(new['fc1']['kernel'])
  assert (found[0] != old['fc1']['kernel']).any()
  assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
  ('make', 'options', 'message'),
  [
    (masking.anp, {'eps': -0.1}, 'eps must be at least 0, got -0.1'),
    (masking.anp, {'alpha': 1.5}, r'alpha must be in \[0, 1\], got 1.5'),
    (masking.anp, {'max_drop': -1}, r'max_drop must be .* got -1'),
    (masking.anp, {'steps': 0}, 'steps must be at least 1, got 0'),
    (masking.anp, {'adversary_steps': 0}, 'adversary_steps .* got 0'),
    (masking.anp, {'batch': 0}, 'batch must be at least 1, got 0'),
    (masking.anp, {'thresholds': ()}, r'thresholds .* got \(\)'),
    (masking.anp, {'thresholds': (0.5, 2.0)}, r'got \(0.5, 2.0\)'),
    (masking.awm, {'alpha': -1}, r'alpha must be in \[0, 1\], got -1'),
    (masking.awm, {'decay': 0}, r'decay must be in \(0, 1\], got 0'),
    (masking.awm, {'gamma': -1e-8}, 'gamma .* got -1e-08'),
    (masking.awm, {'lr': 0.0}, 'lr must be positive and finite, got 0.0'),
    (masking.awm, {'adversary_lr': -1}, 'adversary_lr .* got -1'),
    (masking.awm, {'l1_norm': 0}, 'l1_norm .* got 0'),
    (masking.awm, {'rounds': 0}, 'rounds must be at least 1, got 0'),
    (masking.awm, {'epochs': 0}, 'epochs must be at least 1, got 0'),
  ],
)
def test_bad_options_are_named(make, options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_a_rule_must_match_a_floating_point_leaf(planted):
  for defence in (masking.anp(kernels='step'), masking.awm(leaves='step')):
    with pytest.raises(ValueError, match="'step' matches no floating-point"):
      defence(planted.params, planted.logits_fn, planted.data)
