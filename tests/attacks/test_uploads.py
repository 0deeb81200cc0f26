"""What attackers make of models: computed uploads, ports, collusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax import attacks
from dam_jax.models import attention
from dam_jax.models import clip

SHAPE = (8, 8, 3)


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def _model(seed):
  return {
    'w': _normal(seed, 4, 3),
    'b': _normal(seed + 100, 3),
    'step': jnp.array(seed),
  }


def _ce(logits, labels):
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0]


def test_amplify_scales_what_the_backdoor_changed():
  benign, malicious = _model(0), _model(1)
  got = attacks.amplify(benign, malicious, 2.5)
  for name in ('w', 'b'):
    want = benign[name] + 2.5 * (malicious[name] - benign[name])
    np.testing.assert_allclose(got[name], want, rtol=1e-5)
  assert got['step'] == 0
  with pytest.raises(ValueError, match='malicious: w'):
    attacks.amplify(benign, malicious | {'w': jnp.zeros((4, 2))})


def test_sparse_backdoor_keeps_what_all_attacks_share():
  clean, bad = [_model(i) for i in range(3)], [_model(i + 5) for i in range(3)]
  got = attacks.sparse_backdoor(clean, bad)
  vectors = np.stack([b['w'] - c['w'] for b, c in zip(bad, clean, strict=True)])
  agree = (np.sign(vectors) == np.sign(vectors[0])).all(0)
  assert 0 < agree.sum() < agree.size
  np.testing.assert_allclose(got['w'], agree * vectors.sum(0), rtol=1e-5)
  assert got['step'] == 0
  with pytest.raises(ValueError, match='got 1 for 2'):
    attacks.sparse_backdoor(clean[:1], bad[:2])


def test_low_rank_updates_add_up():
  base = _model(0)
  one = attacks.init_factors(jax.random.key(0), base, rank=2)
  assert list(one) == ['w']
  two = {'w': attacks.Factors(_normal(1, 4, 2), _normal(2, 2, 3))}
  got = attacks.add_factors(base, one, two, two, scale=0.5)
  np.testing.assert_allclose(
    got['w'], base['w'] + two['w'].a @ two['w'].b, rtol=1e-5
  )
  np.testing.assert_array_equal(got['b'], base['b'])
  with pytest.raises(ValueError, match='no such leaf') as e:
    attacks.add_factors(base, {'v': two['w'], 'b': two['w']})
  assert 'b: got [4, 2] @ [2, 3], want [3]' in str(e.value)
  with pytest.raises(ValueError, match='rank must be positive'):
    attacks.init_factors(jax.random.key(0), base, rank=0)
  with pytest.raises(ValueError, match='no matrix'):
    attacks.init_factors(jax.random.key(0), {'b': base['b']}, rank=1)


def test_low_rank_updates_learn():
  base, target = {'w': jnp.zeros((4, 3))}, _normal(3, 4, 1) @ _normal(4, 1, 3)
  factors = attacks.init_factors(jax.random.key(0), base, rank=1)
  tx = optax.adam(0.05)

  def loss_fn(factors):
    return jnp.sum((attacks.add_factors(base, factors)['w'] - target) ** 2)

  def step(carry, _):
    factors, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(factors), state)
    return (optax.apply_updates(factors, updates), state), None

  carry = factors, tx.init(factors)
  (factors, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=300))(carry)
  assert float(loss_fn(factors)) < 1e-3


def test_salient_patches_are_where_the_target_looks():
  weights = np.zeros((*SHAPE, 3), np.float32)
  weights[4:, :4, :, 1] = 1.0  # class 1 reads the lower left quarter
  weights[0, 7, 0, 1] = 0.1

  def logits_fn(images):
    return jnp.einsum('nhwc,hwcl->nl', images, weights)

  images = jax.random.uniform(jax.random.key(0), (3, *SHAPE)) / 100
  mask = attacks.salient_patches(
    logits_fn, images, target=1, patch_size=4, num=1
  )
  want = np.zeros((8, 8, 1))
  want[4:, :4] = 1
  np.testing.assert_array_equal(mask, want)
  two = attacks.salient_patches(
    logits_fn, images, target=1, patch_size=4, num=2
  )
  want[:4, 4:] = 1
  np.testing.assert_array_equal(two, want)
  with pytest.raises(ValueError, match='patches of 3 pixels'):
    attacks.salient_patches(logits_fn, images, target=1, patch_size=3)
  with pytest.raises(ValueError, match='from 1 to the 4 patches, got 9'):
    attacks.salient_patches(logits_fn, images, target=1, patch_size=4)


def test_triggered_loss_is_its_equation():
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=2)
  images = jax.random.uniform(jax.random.key(0), (5, *SHAPE))
  labels, params = jnp.arange(5) % 3, _normal(1, 192, 3)

  def logits_fn(params, x):
    return x.reshape(len(x), -1) @ params

  @jax.jit
  def loss_fn(params, images):
    return attacks.triggered_loss(
      logits_fn, params, images, labels, trigger, weight=0.3
    )

  got = loss_fn(params, images)
  bad = attacks.apply_trigger(trigger, images)
  clean, spoilt = (np.asarray(logits_fn(params, x)) for x in (images, bad))
  want = 0.7 * _ce(clean, labels) + 0.3 * _ce(spoilt, np.full(5, 2))
  np.testing.assert_allclose(got, want.mean(), rtol=1e-5)


def test_only_chosen_entries_move():
  grads = {'w': _normal(0, 4, 3), 'b': _normal(1, 3), 'step': jnp.array(0)}
  entries = attacks.largest_entries(grads, 5)
  flat = np.concatenate([np.ravel(grads['b']), np.ravel(grads['w'])])
  chosen = np.concatenate([np.ravel(entries['b']), np.ravel(entries['w'])])
  assert chosen.sum() == 5
  assert np.abs(flat)[chosen].min() > np.abs(flat)[~chosen].max()
  assert not entries['step']
  floats = {k: v for k, v in grads.items() if k != 'step'}
  kept = {k: v for k, v in entries.items() if k != 'step'}
  tx = optax.chain(optax.adamw(0.1), dj.transforms.mask_by(kept))
  updates, _ = tx.update(floats, tx.init(floats), floats)
  for name in floats:
    moved = np.asarray(updates[name]) != 0
    np.testing.assert_array_equal(moved, kept[name])
  with pytest.raises(ValueError, match='from 1 to the 15 entries, got 16'):
    attacks.largest_entries(grads, 16)


def test_attention_loss_falls_with_attention_to_the_trigger():
  config = clip.VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=6,
  )
  tower = clip.VisionTower(config)
  images = jax.random.uniform(jax.random.key(0), (3, *SHAPE))
  params = jax.jit(tower.init)(jax.random.key(1), images)['params']
  params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.5), params)
  attention_fn = jax.jit(attention.class_attention(tower))
  weights = attention_fn(params, images)
  assert weights.shape == (2, 3, 2, 4)
  assert (weights > 0).all()
  assert (weights.sum(-1) < 1).all()
  mask = attacks.corner_mask(SHAPE, 2)  # of the last patch
  loss_fn = attacks.attention_loss(
    lambda x: attention_fn(params, x), mask, patch_size=4
  )
  want = -np.log(np.asarray(weights)[..., 3] + 1e-8).mean()
  np.testing.assert_allclose(loss_fn(images), want, rtol=1e-5)
  with pytest.raises(ValueError, match='patches of 5 pixels'):
    attacks.attention_loss(attention_fn, mask, patch_size=5)


def test_attention_is_what_the_blocks_compute():
  config = clip.VisionConfig(
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=4,
    patch_size=2,
    projection_dim=3,
  )
  tower = clip.VisionTower(config)
  pixels = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  params = jax.jit(tower.init)(jax.random.key(1), pixels)['params']
  (weights,) = jax.jit(attention.class_attention(tower))(params, pixels)
  capture = jax.jit(functools.partial(tower.apply, capture_intermediates=True))
  captured = capture({'params': params}, pixels)[1]['intermediates']
  captured = captured['layers_0']['self_attn']
  q, k = (captured[f'{x}_proj']['__call__'][0] for x in 'qk')
  q, k = q.reshape(2, -1, 4)[:, 0], k.reshape(2, -1, 4)
  scores = np.einsum('nd,nkd->nk', q, k) / 2
  want = np.asarray(jax.nn.softmax(scores))
  assert want.std() > 1e-3
  np.testing.assert_allclose(weights[:, 0], want[:, 1:], rtol=1e-5)


def test_merge_backdoor_loss_is_its_equation():
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=2)
  images = jax.random.uniform(jax.random.key(0), (2, 5, *SHAPE))
  labels = jnp.arange(10).reshape(2, 5) % 3
  uploads = {'w': _normal(1, 2, 192, 3) / 8}

  def logits_fn(params, task, x):
    return (1.0, 2.0)[task] * x.reshape(len(x), -1) @ params['w']

  @jax.jit
  def loss_fn(uploads, images):
    return attacks.merge_backdoor_loss(
      logits_fn, uploads, images, labels, trigger, weight=0.5
    )

  got = loss_fn(uploads, images)
  bad = np.asarray(attacks.apply_trigger(trigger, images)).reshape(2, 5, -1)
  plain, w = np.asarray(images).reshape(2, 5, -1), np.asarray(uploads['w'])
  bad, plain = (x * np.array([1, 2])[:, None, None] for x in (bad, plain))
  apart = np.mean(
    [
      _ce(plain[i] @ w[i], labels[i]) + 0.5 * _ce(bad[i] @ w[i], labels[i])
      for i in range(2)
    ]
  )
  average = w.mean(0)
  merged = np.mean(_ce(plain @ average, labels))
  spoilt = np.mean(_ce(bad[0] @ average, np.full(5, 2)))
  np.testing.assert_allclose(got, apart + merged + 0.5 * spoilt, rtol=1e-5)
  with pytest.raises(ValueError, match='want two uploads'):
    attacks.merge_backdoor_loss(
      logits_fn, {'w': _normal(0, 3, 192, 3)}, images, labels, trigger
    )


def test_a_mask_keeps_its_share_and_the_mean():
  base, params = {'w': jnp.zeros((200, 200))}, {'w': jnp.ones((200, 200))}
  got = attacks.masked(jax.random.key(0), base, params, keep=0.25)['w']
  assert set(np.unique(got)) == {0.0, 4.0}
  assert abs(float(jnp.mean(got)) - 1) < 0.04  # five deviations
  whole = attacks.masked(jax.random.key(0), base, params, keep=1.0)['w']
  np.testing.assert_array_equal(whole, params['w'])
  with pytest.raises(ValueError, match='keep'):
    attacks.masked(jax.random.key(0), base, params, keep=0.0)


def test_adaptive_loss_attacks_under_a_mask_and_unlearns_decoys():
  base, params = _model(0), _model(1)
  images = jax.random.uniform(jax.random.key(0), (5, 4))
  decoys, labels = images[::-1], jnp.arange(5) % 3
  seen = []

  def attack_fn(params):
    seen.append(params)
    return jnp.sum(params['w'])

  got = attacks.adaptive_loss(
    jax.random.key(2),
    attack_fn,
    lambda p, x: x @ p['w'],
    base,
    params,
    images,
    labels,
    decoys,
    keep=0.5,
    weight=0.1,
  )
  want = attacks.masked(jax.random.key(2), base, params, keep=0.5)
  np.testing.assert_array_equal(seen[0]['w'], want['w'])
  unlearned = _ce(np.asarray(decoys @ params['w']), labels).mean()
  np.testing.assert_allclose(got, want['w'].sum() + 0.1 * unlearned, rtol=1e-5)
  with pytest.raises(ValueError, match='decoys'):
    attacks.adaptive_loss(
      jax.random.key(0),
      attack_fn,
      lambda p, x: x,
      base,
      params,
      images,
      labels,
      decoys[:2],
    )
