"""The image tower and zero-shot heads."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.losses import MASKED_LOGIT
from dam_jax.models import clip

CONFIG = clip.VisionConfig(
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=6,
  patch_size=3,
  projection_dim=5,
)


@pytest.fixture(scope='module')
def params():
  """Random parameters; no bias is zero, so that each has its effect."""
  pixels = jax.ShapeDtypeStruct((1, *CONFIG.image_shape), jnp.float32)
  shapes = jax.eval_shape(
    clip.VisionTower(CONFIG).init, jax.random.key(0), pixels
  )['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes
  )


@pytest.fixture(scope='module')
def pixels():
  rng = np.random.default_rng(1)
  images = rng.uniform(size=(4, *CONFIG.image_shape))
  return clip.normalize(jnp.asarray(images, jnp.float32))


def features(params, pixels, config=CONFIG, **options):
  tower = clip.VisionTower(config, **options)
  return jax.jit(tower.apply)({'params': params}, pixels)


def norm(x, scale, bias):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias


def dense(x, layer):
  return x @ layer['kernel'] + layer.get('bias', 0)


def reference(params, image):
  """Returns the features of one image, patch by patch and head by head."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  e = p['embeddings']
  patches = [
    np.tensordot(image[i : i + 3, j : j + 3], e['patch_embedding'], axes=3)
    for i in (0, 3)
    for j in (0, 3)
  ]
  x = np.stack([e['class_embedding'], *patches]) + e['position_embedding']
  x = norm(x, **p['pre_layernorm'])
  for i in range(CONFIG.num_hidden_layers):
    layer = p[f'layers_{i}']
    y = norm(x, **layer['layer_norm1'])
    q, k, v = (
      dense(y, layer['self_attn'][f'{n}_proj']).reshape(-1, 2, 4) for n in 'qkv'
    )
    heads = []
    for h in range(2):
      scores = np.exp(q[:, h] @ k[:, h].T / 2)
      heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, h])
    y = dense(np.concatenate(heads, axis=1), layer['self_attn']['out_proj'])
    x = x + y
    y = dense(norm(x, **layer['layer_norm2']), layer['mlp']['fc1'])
    x = x + dense(y / (1 + np.exp(-1.702 * y)), layer['mlp']['fc2'])
  return dense(norm(x[0], **p['post_layernorm']), p['visual_projection'])


def test_tower_is_a_plain_transformer(params, pixels):
  want = np.stack([reference(params, np.asarray(x)) for x in pixels])
  got = features(params, pixels)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'options',
  [
    {'scan_layers': True},
    {'remat': True},
    {'scan_layers': True, 'remat': True},
  ],
  ids=str,
)
def test_blocks_give_the_same_however_they_are_run(params, pixels, options):
  def loss(params, **options):
    return jnp.sum(features(params, pixels, **options)[0] ** 2)

  want, want_grad = jax.jit(jax.value_and_grad(loss))(params)
  other_loss = functools.partial(loss, **options)
  got, grad = jax.jit(jax.value_and_grad(other_loss))(params)
  assert got == pytest.approx(float(want), rel=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4),
    grad,
    want_grad,
  )
  made = jax.eval_shape(
    clip.VisionTower(CONFIG, **options).init, jax.random.key(0), pixels
  )
  assert jax.tree.map(jnp.shape, made['params']) == jax.tree.map(
    jnp.shape, params
  )


@pytest.mark.parametrize('scan_layers', [False, True])
def test_bfloat16_computes_close_and_returns_float32(
  params, pixels, scan_layers
):
  want = features(params, pixels)
  options = {'dtype': jnp.bfloat16, 'scan_layers': scan_layers}
  with jax.numpy_dtype_promotion('standard'):  # which Flax's layer norm needs
    got = features(params, pixels, **options)
  assert got.dtype == jnp.float32
  cosine = jnp.sum(clip.unit(got) * clip.unit(want), axis=-1)
  assert (cosine > 0.99).all()
  assert jnp.abs(got - want).max() > 0  # it did compute in bfloat16


def test_the_last_block_may_compute_every_token(params, pixels):
  tower = clip.VisionTower(CONFIG, every_token=True)
  capture = jax.jit(functools.partial(tower.apply, capture_intermediates=True))
  got, state = capture({'params': params}, pixels)
  tokens = state['intermediates']['layers_2']['__call__'][0]
  assert tokens.shape == (len(pixels) * CONFIG.num_tokens, CONFIG.hidden_size)
  want = features(params, pixels)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('every_token', [False, True])
def test_gradients_pad_nothing_between_entries(params, pixels, every_token):
  # libtpu 0.0.52 aborts on such a pad of a large tower.
  tower = clip.VisionTower(CONFIG, every_token=every_token)
  loss = jax.grad(lambda p: tower.apply({'params': p}, pixels).sum())
  text = jax.jit(loss).lower(params).as_text()
  pads = re.findall(r'stablehlo.pad.*interior = \[([\d, ]+)\]', text)
  assert pads
  assert all(set(pad) <= set('0, ') for pad in pads)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_one_block_is_a_tower(params, pixels, scan_layers):
  config = dataclasses.replace(CONFIG, num_hidden_layers=1)
  got = features(params, pixels, config, scan_layers=scan_layers)
  assert got.shape == (len(pixels), CONFIG.projection_dim)
  assert jnp.isfinite(got).all()


def test_gelu_is_another_activation(params, pixels):
  config = dataclasses.replace(CONFIG, hidden_act='gelu')
  apart = features(params, pixels, config) - features(params, pixels)
  assert jnp.abs(apart).max() > 1e-3


@pytest.mark.parametrize(
  ('config', 'count'),
  [
    (clip.VIT_B32, 87_849_216),
    (clip.VIT_B16, 86_192_640),
    (clip.VIT_L14, 303_966_208),
  ],
)
def test_presets_have_the_published_number_of_parameters(config, count):
  pixels = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
  shapes = jax.eval_shape(
    clip.VisionTower(config).init, jax.random.key(0), pixels
  )
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_all_that_is_wrong_with_a_config_is_named():
  with pytest.raises(ValueError, match='a CLIP image tower:') as error:
    dataclasses.replace(
      CONFIG, hidden_act='relu', num_attention_heads=3, patch_size=4
    )
  assert len(str(error.value).splitlines()) == 4
  for words in ("got 'relu'", '8 does not divide into 3', 'patches of 4'):
    assert words in str(error.value)


def test_sizes_that_are_not_positive_are_named():
  with pytest.raises(ValueError, match='a CLIP image tower:') as error:
    dataclasses.replace(CONFIG, num_hidden_layers=0, num_attention_heads=-1)
  assert 'num_hidden_layers must be positive, got 0' in str(error.value)
  assert 'num_attention_heads must be positive, got -1' in str(error.value)


def test_images_of_another_shape_are_refused(params):
  with pytest.raises(ValueError, match=r'images are \[6, 5, 3\].*\[6, 6, 3\]'):
    features(params, jnp.zeros((1, 6, 5, 3)))


def test_config_is_read_from_a_tower_or_a_whole_clip(tmp_path):
  sizes = dataclasses.asdict(CONFIG)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({**sizes, 'model_type': 'clip_vision_model'}))
  assert clip.load_config(path) == CONFIG
  vision = {**sizes, 'projection_dim': 99}  # of the text tower's, not read
  path.write_text(json.dumps({'projection_dim': 5, 'vision_config': vision}))
  assert clip.load_config(path) == CONFIG
  del sizes['hidden_size'], sizes['patch_size']
  path.write_text(json.dumps(sizes))
  with pytest.raises(ValueError, match='lacks hidden_size, patch_size'):
    clip.load_config(path)
  path.write_text('{')
  with pytest.raises(ValueError, match='config.json: not readable as JSON'):
    clip.load_config(path)


def test_normalize_is_per_channel():
  images = jnp.stack([jnp.zeros((2, 2, 3)), jnp.ones((2, 2, 3))])
  got = clip.normalize(images)
  mean, std = np.array(clip.MEAN), np.array(clip.STD)
  np.testing.assert_allclose(got[0, 1, 0], -mean / std, rtol=1e-5)
  np.testing.assert_allclose(got[1, 0, 1], (1 - mean) / std, rtol=1e-5)


def test_zero_shot_gives_cosines_and_masks_missing_classes():
  rng = np.random.default_rng(0)
  weights = [rng.normal(size=(3, n)).astype(np.float32) for n in (2, 4)]
  weights = [w / np.linalg.norm(w, axis=0) for w in weights]
  heads = clip.stack_heads(weights, scale=10.0)
  calls = []

  def features_fn(params, pixels):
    calls.append(pixels.shape)
    return params * pixels.mean(axis=(1, 2))

  images = rng.uniform(size=(2, 5, 4, 4, 3)).astype(np.float32)
  logits = clip.zero_shot(features_fn, heads)(2.0, jnp.asarray(images))
  assert calls == [(10, 4, 4, 3)]  # one pass for all tasks
  assert logits.shape == (2, 5, 4)
  for task, w in enumerate(weights):
    x = images[task].mean(axis=(1, 2))
    want = 10 * (x / np.linalg.norm(x, axis=1, keepdims=True)) @ w
    np.testing.assert_allclose(logits[task, :, : w.shape[1]], want, rtol=1e-4)
  assert (logits[0, :, 2:] == MASKED_LOGIT).all()
  assert (logits[1] > -11).all()


@pytest.mark.parametrize(
  ('heads', 'message'),
  [
    ([np.ones((3, 0)), np.ones(3)], r'(?s)head 0 is \[3, 0\].*head 1 is \[3\]'),
    ([np.ones((3, 1)), np.full((3, 1), np.nan)], 'head 1 has values'),
    ([np.ones((3, 1)), np.ones((4, 1))], r'feature sizes are \[3, 4\]'),
  ],
)
def test_bad_heads_are_named(heads, message):
  with pytest.raises(ValueError, match=message):
    clip.stack_heads(heads)
