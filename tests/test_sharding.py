"""Meshes, rules of how leaves are split, and models placed by them."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import sharding
from dam_jax.models import clip
from dam_jax.models import text
from dam_jax.models import towers


@pytest.mark.parametrize(
  ('sizes', 'want'),
  [
    (None, (8, 1)),
    ({'model': 2, 'data': -1}, (4, 2)),
    ({'data': 2, 'model': -1}, (2, 4)),
    ({'data': 8}, (8, 1)),
  ],
)
def test_a_mesh_has_two_axes(sizes, want):
  mesh = sharding.make_mesh(sizes)
  assert tuple(mesh.shape.items()) == (('data', want[0]), ('model', want[1]))
  assert set(mesh.axis_types) == {AxisType.Auto}
  explicit = sharding.make_mesh(sizes, explicit=True)
  assert set(explicit.axis_types) == {AxisType.Explicit}
  assert sharding.auto(explicit) == mesh


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, 'data=3 is not the number of devices, 8'),
    ({'data': -1, 'model': 3}, 'data=2 x model=3 is not the number'),
    ({'data': -1, 'model': -1}, 'only one axis can be -1'),
    ({'rows': 8, 'data': 0}, "'rows' is none of .*\n.*'data' must be positive"),
  ],
)
def test_a_mesh_that_makes_no_sense_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sizes)


def test_rules_of_a_vit_split_its_heads_and_hidden_units():
  config = clip.VisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
    projection_dim=6,
  )
  tower = clip.VisionTower(config)
  params = jax.eval_shape(
    tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )['params']
  mesh = sharding.make_mesh({'data': 2, 'model': 4})
  found = dj.tree.flatten(sharding.specs(params, sharding.VIT, mesh))
  assert found['layers_1/self_attn/q_proj/kernel'] == P(None, 'model')
  assert found['layers_0/mlp/fc1/bias'] == P('model')
  assert found['layers_0/mlp/fc2/kernel'] == P('model', None)
  assert found['layers_0/mlp/fc2/bias'] == P()
  assert found['visual_projection/kernel'] == P()
  experts = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), params
  )
  stacked = dj.tree.flatten(
    sharding.specs(experts, sharding.VIT, mesh, leading=1)
  )
  assert stacked['layers_0/mlp/fc2/kernel'] == P(None, 'model', None)


_SIZES = {
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'projection_dim': 6,
}


def test_rules_of_a_clip_split_both_towers_and_the_vocabulary():
  config = towers.CLIPConfig(
    vision=clip.VisionConfig(**_SIZES, image_size=8, patch_size=4),
    text=text.TextConfig(
      **_SIZES, vocab_size=24, max_position_embeddings=5, eos_token_id=23
    ),
  )
  model = towers.CLIP(config)
  pixels = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  tokens = jnp.array([[22, 3, 5, 7, 23], [22, 9, 23, 23, 23]])
  params = jax.jit(model.init)(jax.random.key(0), pixels, tokens)['params']
  mesh = sharding.make_mesh({'data': 2, 'model': 4})
  splits = sharding.specs(params, sharding.CLIP, mesh)
  found = dj.tree.flatten(splits)
  for tower in ('vision', 'text'):
    block = f'{tower}/layers_1'
    assert found[f'{block}/self_attn/k_proj/kernel'] == P(None, 'model')
    assert found[f'{block}/self_attn/out_proj/kernel'] == P('model', None)
    assert found[f'{block}/self_attn/out_proj/bias'] == P()
    assert found[f'{block}/mlp/fc1/bias'] == P('model')
    assert found[f'{tower}/layers_0/layer_norm1/scale'] == P()
  assert found['text/embeddings/token_embedding'] == P('model', None)
  assert found['text/embeddings/position_embedding'] == P()
  assert found['logit_scale'] == P()

  def loss_fn(params):
    logits = model.apply({'params': params}, pixels, tokens).logits
    return jnp.sum(logits * jnp.arange(8.0).reshape(4, 2)), logits

  descend = jax.jit(jax.grad(loss_fn, has_aux=True))
  placed = sharding.put(params, mesh, splits)
  kernel = placed['text']['layers_0']['mlp']['fc1']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 8)
  want, got = descend(params), descend(placed)
  for path, x in dj.tree.flatten(want[0]).items():
    y = dj.tree.flatten(got[0])[path]
    atol = 1e-3 * np.abs(x).max() + 1e-4
    np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=path)
  np.testing.assert_allclose(want[1], got[1], rtol=1e-5)


def test_rules_fit_a_clip_of_true_size():
  mesh = sharding.make_mesh({'data': 2, 'model': 4})
  params = towers.abstract_params(towers.VIT_L14)
  splits = dj.tree.flatten(sharding.specs(params, sharding.CLIP, mesh))
  sizes = {path: x.size for path, x in dj.tree.flatten(params).items()}
  split = sum(size for path, size in sizes.items() if splits[path] != P())
  assert split > 0.95 * sum(sizes.values())


def test_all_that_does_not_divide_is_said_at_once():
  params = {'a': jnp.zeros((6, 5)), 'b': jnp.zeros(7), 'c': jnp.zeros(8)}
  mesh = sharding.make_mesh({'data': 2, 'model': 4})
  rules = [('a', P('data', 'model')), ('b|c', P(('data', 'model'), None))]
  with pytest.raises(ValueError, match='cannot be split so') as e:
    sharding.specs(params, rules, mesh)
  said = str(e.value)
  assert 'a: axis 1 of [6, 5] does not divide into 4' in said
  assert 'b: ' in said
  assert 'c: ' in said
  assert 'speaks of more axes than [8] has' in said
  with pytest.raises(ValueError, match="leaf 'b' matches no rule"):
    sharding.specs(params, rules[:1], mesh)


def test_fsdp_splits_the_first_axis_that_divides():
  params = {
    'wide': jnp.zeros((12, 128)),
    'tall': jnp.zeros((1024, 2048)),
    'odd': jnp.zeros((100, 33)),
    'small': jnp.zeros(64),
  }
  mesh = sharding.make_mesh({'data': 4, 'model': 2})
  both = ('data', 'model')
  assert sharding.fsdp(params, mesh) == {
    'wide': P(None, both),
    'tall': P(both),
    'odd': P(),
    'small': P(),
  }
  stacked = {'wide': jnp.zeros((8, 12, 128))}
  split = sharding.fsdp(stacked, mesh, leading=1)
  assert split == {'wide': P(None, None, both)}
  assert sharding.fsdp(params, mesh, least=64)['small'] == P(both)


@pytest.mark.parametrize('num', [1, 8])
@pytest.mark.parametrize('kind', [np.asarray, jnp.asarray])
def test_placed_models_are_raveled_a_row_a_device(tiny, num, kind):
  mesh = sharding.make_mesh(devices=jax.devices()[:num])
  base, experts = jax.tree.map(kind, (tiny.base, tiny.experts))
  flat, stacked = sharding.place(base, experts, mesh)
  want = dj.tree.ravel(tiny.base, shards=num)
  assert flat.layout == stacked.layout == want.layout
  np.testing.assert_array_equal(flat.vector, want.vector)
  np.testing.assert_array_equal(
    stacked.vector,
    dj.tree.ravel(tiny.experts, leading=1, shards=num).vector,
  )
  assert len(flat.vector.sharding.device_set) == num
  for model, like in ((flat, tiny.base), (stacked, tiny.experts)):
    assert not dj.tree.differences(like, model.unravel())
  again = sharding.place(flat, stacked, sharding.make_mesh())
  np.testing.assert_array_equal(
    again[1].vector, dj.tree.ravel(tiny.experts, leading=1, shards=8).vector
  )
