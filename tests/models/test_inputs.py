"""What the tower's linear layers read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import inputs

CONFIG = clip.VisionConfig(
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=6,
  patch_size=3,
  projection_dim=5,
)
NUM, TOKENS = 3, 5


@pytest.fixture(scope='module')
def found():
  """Parameters, pixels, and the inputs of all layers."""
  tower = clip.VisionTower(CONFIG, scan_layers=True)
  pixels = jax.random.normal(jax.random.key(0), (NUM, *CONFIG.image_shape))
  params = jax.jit(tower.init)(jax.random.key(1), pixels)['params']
  inputs_fn = jax.jit(inputs.dense_inputs(tower))
  return params, pixels, inputs_fn(params, jnp.int32(0), pixels)


def test_every_dense_kernel_has_its_inputs(found):
  params, _, read = found
  leaves = tree.flatten(params)
  assert set(read) == {path for path in leaves if path.endswith('/kernel')}
  for path, x in read.items():
    rows = NUM if path.startswith('visual') else NUM * TOKENS
    assert x.shape == (rows, leaves[path].shape[0])


def test_inputs_are_what_the_outputs_are_made_of(found):
  params, pixels, read = found
  tower = clip.VisionTower(CONFIG, every_token=True)
  capture = jax.jit(functools.partial(tower.apply, capture_intermediates=True))
  seen = capture({'params': params}, pixels)[1]['intermediates']
  params, read = jax.device_get((params, read))
  for i in range(CONFIG.num_hidden_layers):
    mlp, layer = params[f'layers_{i}']['mlp'], f'layers_{i}/mlp'
    x = (
      read[f'{layer}/fc1/kernel'] @ mlp['fc1']['kernel']
      + mlp['fc1']['bias'][None]
    )
    want = x / (1 + np.exp(-1.702 * x))
    np.testing.assert_allclose(
      read[f'{layer}/fc2/kernel'], want, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      read[f'layers_{i}/self_attn/v_proj/kernel'],
      seen[f'layers_{i}']['layer_norm1']['__call__'][0],
      rtol=1e-5,
      atol=1e-6,
    )
  features = jax.jit(clip.VisionTower(CONFIG).apply)({'params': params}, pixels)
  kernel = params['visual_projection']['kernel']
  np.testing.assert_allclose(
    read['visual_projection/kernel'] @ kernel, features, rtol=1e-4, atol=1e-5
  )


def test_levels_cover_all_that_has_inputs(found):
  params, _, read = found
  levels = inputs.levels(CONFIG)
  at = {
    path: next(
      (i for i, rule in enumerate(levels) if re.fullmatch(rule, path)), None
    )
    for path in tree.names(params)
  }
  assert [p for p, level in at.items() if level is None] == [
    p for p in at if p.startswith(('embeddings/', 'pre_layernorm/'))
  ]
  assert {at[path] for path in read} == {0, 1, 2}
  assert at['layers_1/mlp/fc1/kernel'] == 1
  assert at['post_layernorm/scale'] == at['visual_projection/kernel'] == 2
