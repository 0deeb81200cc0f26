"""Files: what is written is what is read, and errors name all that is wrong."""

import hashlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from dam_jax import checkpoint
from dam_jax.checkpoint import tensors
from dam_jax.models import convert

LAYER = {
  **{
    f'layer_norm{i}.{kind}': (4,) for i in (1, 2) for kind in ('weight', 'bias')
  },
  **{f'self_attn.{n}_proj.weight': (4, 4) for n in ('q', 'k', 'v', 'out')},
  **{f'self_attn.{n}_proj.bias': (4,) for n in ('q', 'k', 'v', 'out')},
  'mlp.fc1.weight': (6, 4),
  'mlp.fc1.bias': (6,),
  'mlp.fc2.weight': (4, 6),
  'mlp.fc2.bias': (4,),
}
TOWER = {
  'vision_model.embeddings.class_embedding': (4,),
  'vision_model.embeddings.patch_embedding.weight': (4, 3, 2, 5),
  'vision_model.embeddings.position_embedding.weight': (5, 4),
  **{
    f'vision_model.{norm}.{kind}': (4,)
    for norm in ('pre_layrnorm', 'post_layernorm')
    for kind in ('weight', 'bias')
  },
  **{
    f'vision_model.encoder.layers.{i}.{name}': shape
    for i in range(2)
    for name, shape in LAYER.items()
  },
  'visual_projection.weight': (3, 4),
}
"""Tensors of a small image tower, as the hub's files have them."""


def make_tower(seed, dtype=np.float16):
  rng = np.random.default_rng(seed)
  return {n: rng.normal(size=s).astype(dtype) for n, s in TOWER.items()}


def write(path, tensors):
  save_file(tensors, path, metadata={'format': 'pt'})
  return path


def test_half_precision_tower_returns_byte_for_byte(tmp_path):
  tensors = make_tower(0)
  ids = np.arange(5, dtype=np.int64)[None]
  path = write(
    tmp_path / 'in.safetensors',
    {**tensors, 'vision_model.embeddings.position_ids': ids},
  )
  params = checkpoint.load_params(path, name_map=convert.clip_vision)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  np.testing.assert_array_equal(
    params['layers_1']['mlp']['fc1']['kernel'],
    tensors['vision_model.encoder.layers.1.mlp.fc1.weight'].T,
  )
  patch = tensors['vision_model.embeddings.patch_embedding.weight']
  np.testing.assert_array_equal(
    params['embeddings']['patch_embedding'][1, 4, 2, 3], patch[3, 2, 1, 4]
  )
  out = tmp_path / 'new' / 'out.safetensors'
  checkpoint.save_params(
    out, params, name_map=convert.clip_vision, dtype=np.float16
  )
  written = load_file(out)
  assert set(written) == set(tensors)
  for name, tensor in tensors.items():
    assert written[name].dtype == tensor.dtype
    assert written[name].tobytes() == tensor.tobytes(), name
  assert checkpoint.load_metadata(out) == {'format': 'pt'}


def test_paths_keep_every_dtype(tmp_path):
  params = {
    'a': {
      'half': np.array([1.5], jnp.bfloat16),
      'wide': np.ones((2, 1), np.float32),
    },
    'flag': np.array([True, False]),
    'step': np.array(7, np.int32),
  }
  path = tmp_path / 'a.safetensors'
  checkpoint.save_params(path, params)
  abstract = checkpoint.load_abstract(path)
  assert abstract == jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  loaded = checkpoint.load_params(path, dtype=jnp.bfloat16, like=abstract)
  assert loaded['a']['wide'].dtype == jnp.bfloat16
  chex.assert_trees_all_equal(loaded['a']['half'], params['a']['half'])
  for name in ('flag', 'step'):
    assert loaded[name].dtype == params[name].dtype
    np.testing.assert_array_equal(loaded[name], params[name])


def test_experts_are_stacked_in_the_given_order(tmp_path):
  base = write(tmp_path / 'base.safetensors', make_tower(0))
  paths = {
    name: write(tmp_path / f'{name}.safetensors', make_tower(seed))
    for name, seed in (('svhn', 1), ('cars', 2), ('mnist', 3))
  }
  loaded, experts = checkpoint.load_experts(
    base, paths, name_map=convert.clip_vision
  )
  one = lambda path: checkpoint.load_params(  # noqa: E731
    path, name_map=convert.clip_vision
  )
  chex.assert_trees_all_equal(loaded, one(base))
  for k, path in enumerate(paths.values()):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x, k=k: x[k], experts), one(path)
    )


def test_experts_that_differ_are_refused_before_a_weight_is_read(
  tmp_path, monkeypatch
):
  params = {'a': np.ones(2), 'b': np.ones((2, 3)), 'c': np.ones(1)}
  params = {n: x.astype(np.float32) for n, x in params.items()}
  base = write(tmp_path / 'base.safetensors', params)
  cars = {'a': np.ones(3, np.float32), 'b': params['b'], 'd': np.ones(1)}
  svhn = {**params, 'b': np.ones((2, 3), np.float16)}
  experts = {
    'cars': write(tmp_path / 'cars.safetensors', cars),
    'good': base,
    'svhn': write(tmp_path / 'svhn.safetensors', svhn),
  }
  monkeypatch.setattr(tensors, '_read', lambda *_: pytest.fail('has read'))
  with pytest.raises(ValueError, match='experts differ') as error:
    checkpoint.load_experts(base, experts)
  assert str(error.value).splitlines()[1:] == [
    '  cars: c: missing',
    '  cars: d: unexpected',
    '  cars: a: got float32[3], want float32[2]',
    '  svhn: b: got float16[2, 3], want float32[2, 3]',
  ]
  like = {'a': np.ones(1), 'b': {'x': np.ones(1)}, 'c': np.ones(1)}
  with pytest.raises(ValueError, match=r'(?s)not fit.*b/x: missing.*a: got'):
    checkpoint.load_experts(base, {'good': base}, like=like)
  with pytest.raises(ValueError, match='no experts'):
    checkpoint.load_experts(base, {})


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_all_named(tmp_path, dtype):
  good = {'a': np.ones((2, 2), np.float32), 'b': np.ones(3, np.float32)}
  bad = {'a': np.array([[np.nan, 1], [np.inf, 1]]), 'b': np.full(3, -np.inf)}
  bad = {name: x.astype(np.float32) for name, x in bad.items()}
  base = write(tmp_path / 'base.safetensors', {**good, 'b': bad['b']})
  expert = write(tmp_path / 'expert.safetensors', bad)
  with pytest.raises(ValueError, match='^weights:') as error:
    checkpoint.load_experts(base, {'good': base, 'bad': expert}, dtype=dtype)
  lines = [line.strip() for line in str(error.value).splitlines()[1:]]
  assert lines == [
    f'{base}: b: 3 of 3 not finite',
    f'{base}: b: 3 of 3 not finite',
    f'{expert}: a: 2 of 4 not finite',
    f'{expert}: b: 3 of 3 not finite',
  ]


def test_unreadable_files_are_named(tmp_path):
  whole = write(tmp_path / 'whole.safetensors', {'a': np.ones(99)})
  data = whole.read_bytes()
  for name, content in (
    ('truncated', data[:-8]),
    ('header', data[:20]),
    ('empty', b''),
    ('text', b'PK not a safetensors file, but a text'),
  ):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'{re.escape(str(path))}: not a read'):
      checkpoint.load_params(path)
  with pytest.raises(ValueError, match=r'missing: no such file'):
    checkpoint.load_experts(whole, {'cars': tmp_path / 'missing'})
  with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
    checkpoint.load_metadata(tmp_path)


def test_unknown_tensors_are_all_named(tmp_path):
  tensors = make_tower(0)
  tensors['text_model.bias'] = np.ones(1)
  tensors['logit_scale'] = np.ones(1)
  tensors['visual_projection.weight'] = np.ones(3)
  path = write(tmp_path / 'clip.safetensors', tensors)
  with pytest.raises(ValueError, match='unexpected tensors:') as error:
    checkpoint.load_params(path, name_map=convert.clip_vision)
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
    'logit_scale',
    'text_model.bias',
    'visual_projection.weight (of shape [3])',
  ]
  path = write(tmp_path / 'bytes.safetensors', {'a': np.ones(2, np.uint8)})
  with pytest.raises(ValueError, match=r'bytes.safetensors: a is U8'):
    checkpoint.load_params(path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.safetensors'
  checkpoint.save_params(path, {'a': np.ones(2)})
  before = path.read_bytes()
  params = {'a': np.array([1e6]), 'b': np.ones(1), 'c': {'d': np.array([-1e9])}}
  with pytest.raises(ValueError, match='cannot hold') as error:
    checkpoint.save_params(path, params, dtype=np.float16)
  assert str(error.value).split()[-2:] == ['a', 'c/d']
  with pytest.raises(ValueError, match=r'no name in the file:\n  c/d$'):
    checkpoint.save_params(
      path,
      {
        'c': {'d': np.ones(1)},
        'visual_projection': {'kernel': np.ones((1, 1))},
      },
      name_map=convert.clip_vision,
    )
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_replacing_is_all_or_nothing(tmp_path):
  path = tmp_path / 'file'
  with checkpoint.replacing(path) as temporary:
    temporary.write_text('old')
    assert temporary.parent == tmp_path
    assert not path.exists()

  def fail():
    with checkpoint.replacing(path) as temporary:
      temporary.write_text('half')
      raise RuntimeError('disk full')

  with pytest.raises(RuntimeError, match='disk full'):
    fail()
  assert path.read_text() == 'old'
  with checkpoint.replacing(path) as temporary:
    temporary.write_text('new')
  assert path.read_text() == 'new'
  assert list(tmp_path.iterdir()) == [path]
  assert path.stat().st_mode & 0o777 == 0o644


def test_record_travels_in_the_file(tmp_path):
  record = checkpoint.MergeRecord(
    method='ties',
    hyperparameters={'density': 0.2, 'scope': 'model'},
    seed=3,
    base={'clip': 'a1'},
    experts={'svhn': 'b2', 'cars': 'c3'},
    extra={'accuracy': [0.5, 0.75]},
  )
  assert record.versions['jax'] == jax.__version__
  path = tmp_path / 'merged.safetensors'
  checkpoint.save_params(path, {'a': np.ones(1)}, metadata=record.metadata())
  metadata = checkpoint.load_metadata(path)
  assert metadata['format'] == 'pt'
  read = checkpoint.MergeRecord.from_json(metadata['merge_record'])
  assert read == record
  assert list(read.experts) == ['svhn', 'cars']
  want = hashlib.sha256(path.read_bytes()).hexdigest()
  assert checkpoint.file_hash(path) == want


def test_state_returns_with_its_typed_key(tmp_path):
  def make(seed):
    w = jnp.arange(3.0) + seed
    return {
      'key': jax.random.key(seed),
      'keys': jax.random.split(jax.random.key(seed, impl='rbg')),
      'adam': optax.adam(0.1).init({'w': w}),
      'half': w.astype(jnp.bfloat16),
      'none': None,
    }

  path, state = tmp_path / 'state', make(1)
  checkpoint.save_state(path, make(2))
  checkpoint.save_state(path, state)  # in its place
  restored = checkpoint.restore_state(path, make(0))
  draw = lambda s: jax.random.normal(s['key'], (3,))  # noqa: E731
  np.testing.assert_array_equal(draw(restored), draw(state))
  assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, state)
  for name in ('key', 'keys'):
    assert restored[name].dtype == state[name].dtype
    restored[name], state[name] = map(
      jax.random.key_data, (restored[name], state[name])
    )
  chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
  chex.assert_trees_all_equal(restored, state)
  with pytest.raises(ValueError, match='nowhere: no such state'):
    checkpoint.restore_state(tmp_path / 'nowhere', state)
