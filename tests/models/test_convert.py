"""The hub's names and layouts of image towers, both ways."""

import jax
import jax.numpy as jnp
import pytest

from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import convert

LAYER = [
  f'{module}.{kind}'
  for module in (
    'self_attn.k_proj',
    'self_attn.v_proj',
    'self_attn.q_proj',
    'self_attn.out_proj',
    'layer_norm1',
    'mlp.fc1',
    'mlp.fc2',
    'layer_norm2',
  )
  for kind in ('weight', 'bias')
]
NAMES = [
  'vision_model.embeddings.class_embedding',
  'vision_model.embeddings.patch_embedding.weight',
  'vision_model.embeddings.position_embedding.weight',
  'vision_model.pre_layrnorm.weight',
  'vision_model.pre_layrnorm.bias',
  *[f'vision_model.encoder.layers.{i}.{n}' for i in range(12) for n in LAYER],
  'vision_model.post_layernorm.weight',
  'vision_model.post_layernorm.bias',
  'visual_projection.weight',
]
"""Of `CLIPVisionModelWithProjection`'s parameters, ViT-B/32."""
TEXT_NAMES = [
  'text_model.embeddings.token_embedding.weight',
  'text_model.embeddings.position_embedding.weight',
  *[f'text_model.encoder.layers.{i}.{n}' for i in range(2) for n in LAYER],
  'text_model.final_layer_norm.weight',
  'text_model.final_layer_norm.bias',
  'text_projection.weight',
]
"""Of `CLIPTextModelWithProjection`'s parameters, of two layers."""


@pytest.fixture(scope='module')
def leaves():
  pixels = jax.ShapeDtypeStruct((1, *clip.VIT_B32.image_shape), jnp.float32)
  tower = clip.VisionTower(clip.VIT_B32)
  shapes = jax.eval_shape(tower.init, jax.random.key(0), pixels)['params']
  return tree.flatten(shapes)


def test_names_map_both_ways(leaves):
  to_path, to_name = convert.clip_vision.to_path, convert.clip_vision.to_name
  assert sorted(map(to_name, leaves)) == sorted(NAMES)
  assert sorted(map(to_path, NAMES)) == sorted(leaves)
  assert all(to_path(to_name(path)) == path for path in leaves)


def test_names_of_texts_and_of_both_towers_map_both_ways(golden):
  leaves = tree.flatten(golden['new'].params)
  texts = tree.flatten(golden['new'].params['text'])
  assert sorted(map(convert.clip_text.to_name, texts)) == sorted(TEXT_NAMES)
  names = [convert.clip.to_name(path) for path in leaves]
  assert {*TEXT_NAMES, 'logit_scale'} < set(names)
  layers = [f'vision_model.encoder.layers.{i}.' for i in range(2, 12)]
  images = [x for x in NAMES if not x.startswith(tuple(layers))]
  assert sorted(names) == sorted([*images, *TEXT_NAMES, 'logit_scale'])
  assert [convert.clip.to_path(name) for name in names] == list(leaves)
  for path in texts:
    axes = convert.clip_text.axes(path)
    assert axes == convert.clip.axes(f'text/{path}')
    assert axes == ((1, 0) if path.endswith('kernel') else None)
  assert convert.clip.axes('vision/embeddings/patch_embedding') == (2, 3, 1, 0)
  assert convert.clip.axes('logit_scale') is None


def test_layouts_are_those_of_torch(leaves):
  def torch_shape(name):
    path = convert.clip_vision.to_path(name)
    axes = convert.clip_vision.axes(path)
    shape = leaves[path].shape
    if axes is None:
      return shape
    return tuple(shape[axes.index(i)] for i in range(len(axes)))

  layer = 'vision_model.encoder.layers.11'
  for name, shape in {
    f'{layer}.mlp.fc1.weight': (3072, 768),
    f'{layer}.mlp.fc2.weight': (768, 3072),
    f'{layer}.mlp.fc1.bias': (3072,),
    f'{layer}.layer_norm1.weight': (768,),
    'visual_projection.weight': (512, 768),
    'vision_model.embeddings.patch_embedding.weight': (768, 3, 32, 32),
    'vision_model.embeddings.position_embedding.weight': (50, 768),
    'vision_model.embeddings.class_embedding': (768,),
  }.items():
    assert torch_shape(name) == shape
  # Square kernels are transposed too, which no shape can tell.
  assert convert.clip_vision.axes('layers_0/self_attn/q_proj/kernel') == (1, 0)


@pytest.mark.parametrize(
  'name',
  [
    'logit_scale',
    'text_model.final_layer_norm.bias',
    'vision_model.encoder.layers.x.mlp.fc1.weight',
    'vision_model.encoder.layers.0.mlp.fc3.weight',
    'vision_model.pre_layernorm.weight',
  ],
)
def test_other_names_are_unknown(name):
  assert convert.clip_vision.to_path(name) is None


@pytest.mark.parametrize(
  'name', ['classifier.weight', 'text_model.encoder.layers.0.mlp.fc3.weight']
)
def test_other_names_are_unknown_to_both_towers(name):
  assert convert.clip.to_path(name) is None


@pytest.mark.parametrize('path', ['head', 'head/kernel', 'text/head/kernel'])
def test_other_paths_are_unknown_to_both_towers(path):
  assert convert.clip.to_name(path) is None


@pytest.mark.parametrize(
  'path', ['head/kernel', 'layers_0/mlp/fc3/kernel', 'layers_a/mlp/fc1/kernel']
)
def test_other_paths_are_unknown(path):
  assert convert.clip_vision.to_name(path) is None
