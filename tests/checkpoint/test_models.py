"""Models opened and read leaf by leaf: every kind, and every error."""

from concurrent import futures
import json
import mmap
import pathlib
import re
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest
from safetensors.numpy import save_file

from dam_jax import checkpoint
from dam_jax.checkpoint import headers
from dam_jax.models import convert


def make(seed, *, names=('a.w', 'a.b', 'head')):
  rng = np.random.default_rng(seed)
  return {n: rng.normal(size=(3, 4)).astype(np.float32) for n in names}


def write_raw(path, entries, data, *, text=None, pad=0):
  """Writes a file by hand, since the library writes only what it knows."""
  text = (text or json.dumps(entries)).encode() + b' ' * pad
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


def write_shards(folder, shards, weight_map=None, **more):
  folder.mkdir(exist_ok=True)
  for name, tensors in shards.items():
    save_file(tensors, folder / name, metadata={'format': 'pt', 'in': name})
  if weight_map is None:
    weight_map = {n: file for file, part in shards.items() for n in part}
  index = {'metadata': {'total_size': 1}, 'weight_map': weight_map, **more}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  return path


def is_mapped(array):
  """Says whether an array lies in a memory map, none of it copied."""
  while isinstance(array, np.ndarray) and array.base is not None:
    array = array.base
  return isinstance(array, mmap.mmap)


def lines(error):
  return [line.strip() for line in str(error.value).splitlines()[1:]]


def check(model, tensors):
  assert list(model.leaves) == list(dict.fromkeys(model.leaves))
  assert set(model.leaves) == {n.replace('.', '/') for n in tensors}
  for name, want in tensors.items():
    path = name.replace('.', '/')
    got = model.read(path)
    assert model.leaves[path] == jax.ShapeDtypeStruct(want.shape, want.dtype)
    assert got.dtype == want.dtype
    assert not got.flags.writeable
    np.testing.assert_array_equal(got, want)


def test_lone_file_is_read_without_a_copy(tmp_path):
  tensors = {**make(0), 'scalar': np.array(2.5), 'empty': np.ones((0, 3))}
  path = tmp_path / 'some.safetensors'
  save_file(tensors, path, metadata={'x': 'y'})
  model = checkpoint.open_model(path)
  check(model, tensors)
  assert model.files == (path,)
  assert (model.folder, model.config) == (None, None)
  assert model.metadata == {'x': 'y'}
  assert is_mapped(model.read('a/w'))
  assert checkpoint.open_model(model) is model


def test_reading_holds_about_one_tensor_in_memory(tmp_path):
  def resident():
    status = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'RssFile:\s+(\d+)', status)[1])

  if not pathlib.Path('/proc/self/status').exists():
    pytest.skip('counts memory as Linux does')
  size = 1 << 24
  path = tmp_path / 'big.safetensors'
  save_file({str(k): np.ones(size // 4, np.float32) for k in range(5)}, path)
  model = checkpoint.open_model(path)
  before, most = resident(), 0
  for name in model.leaves:
    first = model.read(name)
    assert first.sum() == size // 4
    most = max(most, resident() - before)
  assert size * 0.9 < most < size * 1.5
  # What was let go of is there when it is asked for again.
  assert first.sum() == model.read('0').sum()


def test_reading_takes_no_memory(tmp_path):
  path = tmp_path / 'big.safetensors'
  save_file({'w': np.ones((1 << 22,), np.float32), 'b': np.ones(1)}, path)
  tracemalloc.start()
  try:
    model = checkpoint.open_model(path)
    array = model.read('w')
    again = model.read('w')
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert array.nbytes == 1 << 24
  assert peak < 1 << 20
  assert np.shares_memory(array, again)


@pytest.mark.parametrize('code', sorted(headers.DTYPES))
def test_dtype_is_read_and_written(tmp_path, code):
  dtype = headers.DTYPES[code]
  data = bytes(range(1, 1 + 4 * dtype.itemsize))
  data = b'\0\1\1\0' if code == 'BOOL' else data
  entry = {'dtype': code, 'shape': [2, 2], 'data_offsets': [0, len(data)]}
  model = checkpoint.open_model(
    write_raw(tmp_path / 'a.safetensors', {'w': entry}, data)
  )
  assert model.leaves == {'w': jax.ShapeDtypeStruct((2, 2), dtype)}
  assert model.read('w').tobytes() == data
  with checkpoint.ModelWriter(tmp_path / 'b', model.leaves) as writer:
    writer.put('w', model.read('w'))
  again = checkpoint.open_model(tmp_path / 'b')
  assert again.leaves == model.leaves
  assert again.read('w').tobytes() == data


@pytest.mark.parametrize('code', ['F4', 'F6_E2M3', 'F6_E3M2'])
def test_unsupported_dtypes_are_all_named(tmp_path, code):
  size = 2 if code == 'F4' else 3
  entries = {
    name: {'dtype': code, 'shape': [4], 'data_offsets': [i, i + size]}
    for name, i in (('v', 0), ('w', size))
  }
  path = write_raw(tmp_path / 'a.safetensors', entries, bytes(2 * size))
  with pytest.raises(ValueError, match='which is not supported') as error:
    checkpoint.open_model(path)
  assert lines(error) == [
    f'{path}: {name} is {code}, which is not supported' for name in 'vw'
  ]


def test_tensors_need_not_be_aligned(tmp_path):
  data = b'x' + np.arange(3, dtype='<f4').tobytes()
  entries = {
    'a': {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]},
    'b': {'dtype': 'F32', 'shape': [3], 'data_offsets': [1, 13]},
  }
  path = write_raw(tmp_path / 'a.safetensors', entries, data, pad=3)
  array = checkpoint.open_model(path).read('b')
  np.testing.assert_array_equal(array, np.arange(3))
  np.testing.assert_array_equal(jnp.asarray(array), np.arange(3))


@pytest.mark.parametrize(
  ('text', 'data', 'message'),
  [
    ('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b'abc', None),
    ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b'abc', None),
    ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,1]}}', b'a', None),
    ('{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}', b'a', None),
    ('{"a":{"dtype":"U8"', b'a', None),
    (
      '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
      '"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
      b'a',
      'given twice: a',
    ),
  ],
)
def test_damaged_files_are_refused(tmp_path, text, data, message):
  path = write_raw(tmp_path / 'a.safetensors', None, data, text=text)
  with pytest.raises(ValueError, match=message or 'not a readable') as error:
    checkpoint.open_model(path)
  assert str(path) in str(error.value)


def test_truncated_file_is_refused_when_it_is_opened(tmp_path):
  path = tmp_path / 'a.safetensors'
  save_file(make(0), path)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match='a.safetensors: not a readable'):
    checkpoint.open_model(path)


def test_folder_has_its_config(tmp_path):
  save_file(make(0), tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text('{"model_type": "x"}')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'never read')
  model = checkpoint.open_model(str(tmp_path))
  check(model, make(0))
  assert model.folder == tmp_path
  assert model.config == {'model_type': 'x'}
  assert model.files == (tmp_path / 'model.safetensors',)
  (tmp_path / 'config.json').write_text('{"a": 1, "a": 2}')
  with pytest.raises(ValueError, match=r'config.json: not readable.*twice: a'):
    checkpoint.open_model(tmp_path)
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match=r'want a JSON object, got \[\]'):
    checkpoint.open_model(tmp_path)


def test_shards_are_one_model(tmp_path):
  parts = {
    'model-00001-of-00002.safetensors': make(0),
    'model-00002-of-00002.safetensors': make(1, names=('z', 'b.c')),
  }
  index = write_shards(tmp_path / 'm', parts)
  for source in (tmp_path / 'm', index):
    model = checkpoint.open_model(source)
    check(model, {n: x for part in parts.values() for n, x in part.items()})
    assert model.files == (*(index.parent / name for name in parts), index)
    assert model.folder == index.parent
    assert model.metadata == {'format': 'pt'}
    assert is_mapped(model.read('b/c'))
  loaded = checkpoint.load_params(index.parent)
  np.testing.assert_array_equal(
    loaded['b']['c'], parts['model-00002-of-00002.safetensors']['b.c']
  )


def test_index_and_shards_that_differ_are_told_at_once(tmp_path):
  one, two, three, four = (
    f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3, 4)
  )
  index = write_shards(
    tmp_path / 'm',
    {
      one: make(0, names=('a', 'extra')),
      two: make(1, names=('b', 'c')),
      four: make(2, names=('d',)),
    },
    {'a': one, 'lost': one, 'b': two, 'c': one, 'gone': three},
  )
  with pytest.raises(ValueError, match='differs from its shards') as error:
    checkpoint.open_model(tmp_path / 'm')
  assert lines(error) == [
    f'{four}: not in the index',
    f'{index.parent / three}: no such file',
    f'extra: in {one}, not in the index',
    f'c: in {two}, the index says {one}',
    f'lost: in the index for {one}, not there',
  ]


@pytest.mark.parametrize(
  'name', ['../a.safetensors', '/a.safetensors', 'x/a.safetensors', 'a.bin', 3]
)
def test_index_cannot_lead_out_of_its_folder(tmp_path, name):
  save_file(make(0), tmp_path / 'a.safetensors')
  write_shards(tmp_path / 'm', {}, {'a': name})
  with pytest.raises(ValueError, match='not names of safetensors') as error:
    checkpoint.open_model(tmp_path / 'm')
  assert lines(error) == [f'a: {name!r}']


def test_folders_without_a_model_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no model: want model.safetensors,'):
    checkpoint.open_model(tmp_path)
  with pytest.raises(ValueError, match='nowhere: no such file'):
    checkpoint.open_model(tmp_path / 'nowhere')
  index = write_shards(tmp_path, {}, {})
  with pytest.raises(ValueError, match='index.json: no weight_map'):
    checkpoint.open_model(tmp_path)
  index.write_text('{')
  with pytest.raises(ValueError, match='index.json: not readable as JSON'):
    checkpoint.open_model(tmp_path)
  save_file(make(0), tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='and an index: name one of them'):
    checkpoint.open_model(tmp_path)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'x.pt', 'y.pth'])
def test_pickles_are_refused_with_a_way_out(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b'\x80\x02.')
  for source in (path, tmp_path):
    with pytest.raises(ValueError, match=f'{name}: a pickle.*save_pretrained'):
      checkpoint.open_model(source)


def test_names_are_mapped_and_kernels_turned(tmp_path):
  kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
  tensors = {
    'visual_projection.weight': kernel,
    'vision_model.embeddings.position_ids': np.arange(3),
  }
  path = tmp_path / 'a.safetensors'
  save_file(tensors, path)
  model = checkpoint.open_model(path, name_map=convert.clip_vision)
  assert model.leaves == {
    'visual_projection/kernel': jax.ShapeDtypeStruct((4, 3), np.float32)
  }
  array = model.read('visual_projection/kernel')
  np.testing.assert_array_equal(array, kernel.T)
  assert is_mapped(array)
  save_file({**tensors, 'other': kernel, 'a/b': kernel}, path)
  with pytest.raises(ValueError, match='unexpected tensors') as error:
    checkpoint.open_model(path, name_map=convert.clip_vision)
  assert lines(error) == ['a/b', 'other']
  with pytest.raises(ValueError, match=r'unexpected tensors:\n  a/b$'):
    checkpoint.open_model(path)


def test_pytree_is_a_model():
  params = {'a': [jnp.ones(2, jnp.bfloat16), np.arange(3)], 'b': np.float32(1)}
  model = checkpoint.open_model(params)
  assert list(model.leaves) == ['a/0', 'a/1', 'b']
  assert model.leaves['a/0'] == jax.ShapeDtypeStruct((2,), jnp.bfloat16)
  array = model.read('a/1')
  assert np.shares_memory(array, params['a'][1])
  assert not array.flags.writeable
  assert params['a'][1].flags.writeable
  with pytest.raises(ValueError, match=r'(?s)arrays:\n  a: str\n  b: float'):
    checkpoint.open_model({'a': 'text', 'b': 1.0})


def test_threads_read_at_once(tmp_path):
  tensors = {str(i): np.full((50, 50), i, np.float32) for i in range(40)}
  save_file(tensors, tmp_path / 'a.safetensors')
  model = checkpoint.open_model(tmp_path / 'a.safetensors')
  with futures.ThreadPoolExecutor(8) as executor:
    found = list(executor.map(model.read, [*tensors] * 5))
  for name, array in zip([*tensors] * 5, found, strict=True):
    np.testing.assert_array_equal(array, tensors[name])


def test_orbax_returns_with_every_dtype(tmp_path):
  params = {
    'a': {'half': np.array([1.5, 2], jnp.bfloat16), 'w': np.ones((2, 3))},
    'n': np.array(7, np.int32),
  }
  checkpoint.save_orbax(tmp_path / 'a', checkpoint.open_model(params))
  model = checkpoint.open_model(tmp_path / 'a')
  assert model.folder == tmp_path / 'a'
  assert model.files
  assert all(path.is_file() for path in model.files)
  check(
    model,
    {'a/half': params['a']['half'], 'a/w': params['a']['w'], 'n': params['n']},
  )
  with futures.ThreadPoolExecutor(4) as executor:
    for array in executor.map(model.read, ['a/w'] * 8):
      np.testing.assert_array_equal(array, params['a']['w'])
  with pytest.raises(ValueError, match='a exists: pass overwrite=True'):
    checkpoint.save_orbax(tmp_path / 'a', model)
  checkpoint.save_orbax(
    tmp_path / 'a', checkpoint.open_model({'b': np.zeros(2)}), overwrite=True
  )
  assert list(checkpoint.open_model(tmp_path / 'a').leaves) == ['b']


def test_orbax_restores_small_leaves_together(tmp_path, monkeypatch):
  params = {
    name: np.full(n, n, np.float32) for n, name in enumerate('abcde', start=1)
  }
  params['f'] = np.arange(40, dtype=np.float32)
  checkpoint.save_orbax(tmp_path / 'a', checkpoint.open_model(params))
  monkeypatch.setattr('dam_jax.checkpoint.state._AT_ONCE', 32)
  model, calls = checkpoint.open_model(tmp_path / 'a'), []
  load = ocp.load

  def count(path, like):
    calls.append(path)
    return load(path, like)

  monkeypatch.setattr(ocp, 'load', count)
  # Of 4 + 8 + 12, 16, 20 and 160 bytes; again and again where asked to.
  reads = ('a', 1), ('c', 1), ('d', 2), ('e', 3), ('f', 4), ('b', 5), ('b', 6)
  for leaf, want in reads:
    np.testing.assert_array_equal(model.read(leaf), params[leaf])
    assert len(calls) == want
  assert not model.read('c').flags.writeable


def test_orbax_state_of_a_run_is_a_model(tmp_path):
  state = {'w': jnp.arange(3.0), 'list': [jnp.ones(2), jnp.zeros(1)]}
  checkpoint.save_state(tmp_path / 'a', state)
  model = checkpoint.open_model(tmp_path / 'a')
  check(
    model,
    {
      'w': np.arange(3, dtype=np.float32),
      'list.0': np.ones(2, np.float32),
      'list.1': np.zeros(1, np.float32),
    },
  )
  checkpoint.save_state(tmp_path / 'b', {**state, 'step': 3, 'name': 'x'})
  with pytest.raises(ValueError, match=r'(?s)not arrays:\n  name\n  step'):
    checkpoint.open_model(tmp_path / 'b')
