"""Models written leaf by leaf: whole or not at all, resumed, and readable."""

from concurrent import futures
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

from absl import logging
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from dam_jax import checkpoint
from dam_jax.checkpoint import layout
from dam_jax.checkpoint import writer as writer_lib
from dam_jax.models import convert
from tests import threads

ROOT = pathlib.Path(__file__).parents[2]
PLAN = {'method': 'average', 'experts': ['a1', 'b2']}


def make(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'a/b': rng.normal(size=(3,)).astype(jnp.bfloat16),
    'a/w': rng.normal(size=(5, 4)).astype(np.float32),
    'empty': np.ones((0, 2), np.float32),
    'flag': np.array([True, False, True]),
    'scalar': np.array(1.5, np.float32),
    'step': np.array([7], np.int32),
  }


def abstract(params):
  return {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in params.items()}


def write(path, params, *, only=None, **options):
  with checkpoint.ModelWriter(path, abstract(params), **options) as writer:
    for name, leaf in params.items():
      if name not in writer.done and (only is None or name in only):
        writer.put(name, leaf)
  return writer


def check(path, params):
  model = checkpoint.open_model(path)
  assert model.leaves == abstract(params)
  for name, leaf in params.items():
    assert model.read(name).tobytes() == leaf.tobytes(), name
  return model


def lines(error):
  return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize('target', ['new/x.safetensors', 'new/folder'])
def test_what_is_written_is_read(tmp_path, target):
  write(tmp_path / target, make())
  model = check(tmp_path / target, make())
  assert model.metadata == {'format': 'pt'}
  assert [p.name for p in (tmp_path / 'new').iterdir()] == [target[4:]]
  assert [path.name for path in model.files] == [
    'x.safetensors' if target.endswith('s') else 'model.safetensors'
  ]
  np.testing.assert_array_equal(load_file(model.files[0])['a.w'], make()['a/w'])


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path):
  params = make()
  write(tmp_path / 'm', params, max_shard_bytes=16, metadata={'k': 'v'})
  model = check(tmp_path / 'm', params)
  assert model.metadata == {'k': 'v'}
  names = [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == [
    *names,
    'model.safetensors.index.json',
  ]
  text = (tmp_path / 'm' / 'model.safetensors.index.json').read_text()
  index = json.loads(text)
  assert text == json.dumps(index, indent=2, sort_keys=True) + '\n'
  assert index == {
    'metadata': {'total_size': sum(x.nbytes for x in params.values())},
    'weight_map': {
      'a.b': names[1],
      'a.w': names[0],
      'empty': names[1],
      'flag': names[1],
      'scalar': names[1],
      'step': names[2],
    },
  }


@hypothesis.given(
  st.dictionaries(st.text(min_size=1), st.integers(0, 20)), st.integers(1, 30)
)
def test_split_keeps_every_name_once_and_the_bound(sizes, max_bytes):
  parts = layout.split(sizes, max_bytes)
  assert sorted(n for part in parts for n in part) == sorted(sizes)
  for part in parts:
    assert part
    total = sum(sizes[n] for n in part)
    assert total <= max_bytes or len(part) == 1
  small = [part for part in parts if sizes[part[0]] <= max_bytes]
  assert [n for part in small for n in part] == [
    n for n in sizes if sizes[n] <= max_bytes
  ]
  for one, two in itertools.pairwise(small):
    assert sum(sizes[n] for n in one) + sizes[two[0]] > max_bytes


@hypothesis.given(
  shapes=st.lists(
    st.tuples(
      st.sampled_from(['float32', 'float16', 'bfloat16', 'uint8', 'int64']),
      st.lists(st.integers(0, 3), max_size=3),
    ),
    min_size=1,
    max_size=8,
  ),
  max_bytes=st.integers(1, 100),
)
def test_any_model_returns(tmp_path_factory, shapes, max_bytes):
  rng = np.random.default_rng(0)
  params = {
    f'x{i}': rng.integers(0, 9, shape).astype(jnp.dtype(dtype))
    for i, (dtype, shape) in enumerate(shapes)
  }
  path = tmp_path_factory.mktemp('any') / 'm'
  write(path, params, max_shard_bytes=max_bytes)
  model = check(path, params)
  for name in params:
    assert model.read(name).flags.aligned
  for file in path.glob('*.safetensors'):
    with safetensors.safe_open(file, framework='numpy') as opened:
      assert set(opened.keys()) <= set(params)


def test_order_and_threads_do_not_matter(tmp_path):
  params = {
    f'l{i}/w': np.full((64, 65), i, np.float32) for i in range(30)
  } | make()
  write(tmp_path / 'one', params, max_shard_bytes=50_000)
  with checkpoint.ModelWriter(
    tmp_path / 'two', abstract(params), max_shard_bytes=50_000
  ) as writer:
    names = sorted(params, reverse=True)
    with futures.ThreadPoolExecutor(8) as executor:
      list(executor.map(lambda name: writer.put(name, params[name]), names))
  for path in (tmp_path / 'one').iterdir():
    assert path.read_bytes() == (tmp_path / 'two' / path.name).read_bytes()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_floating_leaves_are_rounded(tmp_path, dtype):
  params = make()
  write(tmp_path / 'm', params, dtype=dtype)
  want = {
    p: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    for p, x in params.items()
  }
  check(tmp_path / 'm', want)


def test_bfloat16_is_rounded_to_nearest_even(tmp_path):
  # Halfway between 1 and 1 + 2^-7, and between that and 1 + 2^-6.
  values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
  write(tmp_path / 'm', {'w': values}, dtype='bfloat16')
  got = checkpoint.open_model(tmp_path / 'm').read('w').astype(np.float32)
  np.testing.assert_array_equal(got, [1, 1 + 2**-6, 1 + 2**-7])


def test_a_merge_in_float32_is_written_in_the_leafs_dtype(tmp_path):
  leaves = {'w': jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
  with checkpoint.ModelWriter(tmp_path / 'm', leaves) as writer:
    writer.put('w', jnp.array([1.25, 3.0], jnp.float32))
  read = checkpoint.open_model(tmp_path / 'm').read('w')
  np.testing.assert_array_equal(read, np.array([1.25, 3.0], jnp.bfloat16))


def test_long_leaves_are_written_in_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(writer_lib, '_BLOCK', 7)
  params = {'w': np.arange(100, dtype=np.float32), 'v': np.ones(7, np.float32)}
  write(tmp_path / 'm', params, dtype='float16')
  check(tmp_path / 'm', {p: x.astype(np.float16) for p, x in params.items()})


def test_all_that_overflows_is_named_and_nothing_written(tmp_path):
  big = np.array([1, 7e4], np.float32)
  params = {'a': big, 'b': np.ones(2, np.float32), 'c': -big}
  with pytest.raises(ValueError, match='m is not written:') as error:
    write(tmp_path / 'm', params, dtype='float16', plan=PLAN)
  assert lines(error) == [f'{p}: float16 cannot hold it' for p in 'ac']
  assert not (tmp_path / 'm').exists()
  write(tmp_path / 'm', params, dtype='bfloat16', plan=PLAN)
  infinite = {'a': np.array([np.inf, np.nan], np.float32)}
  write(tmp_path / 'n', infinite, dtype='float16')  # not the cast's doing


def test_memory_layout_does_not_matter(tmp_path):
  whole = np.arange(24, dtype=np.float32).reshape(4, 6)
  params = {'t': whole.T, 's': whole[::2, 1::2], 'f': np.asfortranarray(whole)}
  write(tmp_path / 'm', params)
  model = checkpoint.open_model(tmp_path / 'm')
  for name, want in params.items():
    np.testing.assert_array_equal(model.read(name), want)
  big_endian = whole.astype('>f4')
  with checkpoint.ModelWriter(tmp_path / 'e', abstract({'w': whole})) as writer:
    writer.put('w', big_endian)
  np.testing.assert_array_equal(
    checkpoint.open_model(tmp_path / 'e').read('w'), whole
  )


def test_names_and_layouts_are_the_files(tmp_path):
  params = {
    'visual_projection/kernel': np.arange(12, dtype=np.float32).reshape(4, 3),
    'embeddings/patch_embedding': np.arange(
      2 * 5 * 3 * 4, dtype=np.float32
    ).reshape(2, 5, 3, 4),
  }
  path = tmp_path / 'a.safetensors'
  write(path, params, name_map=convert.clip_vision)
  tensors = load_file(path)
  np.testing.assert_array_equal(
    tensors['visual_projection.weight'], params['visual_projection/kernel'].T
  )
  loaded = checkpoint.load_params(path, name_map=convert.clip_vision)
  chex.assert_trees_all_equal(
    loaded['embeddings']['patch_embedding'],
    params['embeddings/patch_embedding'],
  )


def test_alias_is_written_where_the_base_has_it(tmp_path):
  params = {'embed': np.ones((2, 3), np.float32), 'norm': np.ones(1)}
  alias = {'head': 'embed'}
  write(tmp_path / 'tied', params, alias=alias)
  check(tmp_path / 'tied', params)
  both = {**params, 'head': params['embed'].astype(jnp.bfloat16)}
  write(tmp_path / 'both', both, alias=alias, only=params)
  check(tmp_path / 'both', both)
  with pytest.raises(ValueError, match='head: is written with embed'):
    write(tmp_path / 'm', both, alias=alias)


def test_files_beside_the_weights_are_carried(tmp_path):
  base = tmp_path / 'base'
  (base / 'additional_chat_templates').mkdir(parents=True)
  config = {
    'torch_dtype': 'float32',
    'text_config': {'dtype': 'float32', 'hidden': 3},
    'quantization_config': {'dtype': 'int8'},
    'dtype': None,
  }
  carried = {
    'tokenizer.json': 'x',
    'tokenizer_config.json': '{}',
    'spiece.model': 'y',
    'vocab.txt': 'z',
    'preprocessor_config.json': '{}',
    'processor_config.json': '{}',
    'chat_template.jinja': '{{ }}',
    'generation_config.json': '{}',
    'LICENSE': 'all rights',
  }
  left = ['pytorch_model.bin', 'README.md', 'tokenizer.pkl', 'modeling_x.py']
  for name, text in carried.items():
    (base / name).write_text(text)
  for name in left:
    (base / name).write_text('left')
  (base / 'additional_chat_templates' / 'a.jinja').write_text('t')
  (base / 'config.json').write_text(json.dumps(config))
  params = {'w': np.ones(3, np.float32)}
  with checkpoint.ModelWriter(
    tmp_path / 'm', abstract(params), dtype='bfloat16', carry=base
  ) as writer:
    writer.put('w', params['w'])
    writer.add_file('README.md', 'a card')
  merged = {p.name: p for p in (tmp_path / 'm').iterdir()}
  assert sorted(merged) == sorted(
    [
      *carried,
      'README.md',
      'additional_chat_templates',
      'config.json',
      'model.safetensors',
    ]
  )
  for name, text in carried.items():
    assert merged[name].read_text() == text
  assert merged['README.md'].read_text() == 'a card'
  assert checkpoint.open_model(tmp_path / 'm').config == {
    'torch_dtype': 'bfloat16',
    'text_config': {'dtype': 'bfloat16', 'hidden': 3},
    'quantization_config': {'dtype': 'int8'},
    'dtype': None,
  }
  (base / 'config.json').write_text(
    '{"auto_map": {"AutoModel": "modeling_x.X"}}'
  )
  write(tmp_path / 'n', params, carry=base)
  assert (tmp_path / 'n' / 'modeling_x.py').read_text() == 'left'


def test_interrupted_run_goes_on(tmp_path):
  target, params = tmp_path / 'm', make()

  def fail():
    with checkpoint.ModelWriter(
      target, abstract(params), plan=PLAN, max_shard_bytes=16
    ) as writer:
      writer.put('a/w', params['a/w'])
      writer.put('step', params['step'])
      raise RuntimeError('stop')

  with pytest.raises(RuntimeError, match='stop'):
    fail()
  assert [p.name for p in tmp_path.iterdir()] == ['.m.partial']
  other = {p: x + x if p in ('a/w', 'step') else x for p, x in params.items()}
  writer = write(
    target,
    other,
    plan=dict(reversed(PLAN.items())),
    max_shard_bytes=16,
    metadata={'created': 'later'},
  )
  assert writer.done == {'a/w', 'step'}
  assert check(target, params).metadata == {'created': 'later'}
  assert list(tmp_path.iterdir()) == [target]


KILLED = """
import os, signal, sys, time, numpy as np, jax
from dam_jax import checkpoint
leaves = {n: jax.ShapeDtypeStruct((1000,), np.float32) for n in 'abcd'}
writer = checkpoint.ModelWriter(sys.argv[1], leaves, plan=[1])
with writer:
  for i, name in enumerate('abcd'):
    if name == 'c':
      time.sleep(1)  # then all of them are flushed
    writer.put(name, np.full(1000, i, np.float32))
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('name', ['m', 'm.safetensors'])
def test_killed_run_goes_on(tmp_path, name):
  target = tmp_path / name
  done = subprocess.run([sys.executable, '-c', KILLED, target], cwd=ROOT)
  assert done.returncode == -signal.SIGKILL
  assert not target.exists()
  journal = tmp_path / f'.{name}.partial' / 'journal'
  with journal.open('ab') as file:
    file.write(b'"d')  # a line that was cut short
  want = {n: np.full(1000, i, np.float32) for i, n in enumerate('abcd')}
  writer = write(target, want, plan=[1])
  assert writer.done == {'a', 'b', 'c'}
  check(target, want)
  assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
  'change',
  [
    {'plan': {'method': 'ties'}},
    {'plan': None},
    {'dtype': 'float16'},
    {'max_shard_bytes': 16},
    {'metadata': {'long': 'x' * 5000}},
    {'leaves': {**make(), 'more': np.ones(1)}},
    {'leaves': {**make(), 'step': np.ones(1, np.float32)}},
    {'damage': 'model/model.safetensors'},
    {'damage': 'journal'},
  ],
  ids=str,
)
def test_another_plan_starts_over_and_says_so(tmp_path, caplog, change):
  target, params = tmp_path / 'm', make()
  with pytest.raises(ValueError, match='missing'):
    write(target, params, only=['a/w'], plan=PLAN)
  if 'damage' in change:
    os.truncate(tmp_path / '.m.partial' / change['damage'], 5)
  options = {'plan': PLAN, **change}
  options.pop('damage', None)
  params = options.pop('leaves', params)
  logging.get_absl_logger().propagate = True
  with caplog.at_level('WARNING', 'absl'):
    writer = write(target, params, **options)
  assert writer.done == frozenset()
  assert 'starts over' in caplog.text
  assert set(checkpoint.open_model(target).leaves) == set(params)


def test_run_that_failed_at_the_end_goes_on_without_its_remains(tmp_path):
  base, params = tmp_path / 'base', {'w': np.ones(2), 'v': np.zeros(2)}
  (base / 'additional_chat_templates').mkdir(parents=True)
  (base / 'vocab.txt').write_text('old')
  leaves = abstract({**params, 'u': params['w']})
  options = {'carry': base, 'plan': PLAN, 'alias': {'u': 'w'}}

  def run(*, fail):
    with checkpoint.ModelWriter(tmp_path / 'm', leaves, **options) as writer:
      for name in params.keys() - writer.done:
        writer.put(name, params[name])
      writer.add_file('notes' if fail else 'README.md', 'text')
      if fail:
        writer.add_file('n' * 300, 'a name that no disk takes')
    return writer

  with pytest.raises(OSError, match='too long'):
    run(fail=True)
  assert not (tmp_path / 'm').exists()
  assert run(fail=False).done == {'u', 'v', 'w'}
  check(tmp_path / 'm', {**params, 'u': params['w']})
  assert sorted(path.name for path in (tmp_path / 'm').iterdir()) == [
    'README.md',
    'additional_chat_templates',
    'model.safetensors',
    'vocab.txt',
  ]


def test_all_missing_leaves_are_named(tmp_path):
  with pytest.raises(ValueError, match='is not written') as error:
    write(tmp_path / 'm', make(), only=['a/b', 'scalar', 'empty', 'step'])
  assert lines(error) == ['a/w: missing', 'flag: missing']


def test_existing_target_is_refused_or_replaced(tmp_path):
  old, new = {'w': np.ones(2)}, {'v': np.zeros(3)}
  for target in (tmp_path / 'm', tmp_path / 'm.safetensors'):
    write(target, old)
    with pytest.raises(ValueError, match='exists: pass overwrite=True'):
      checkpoint.ModelWriter(target, abstract(new))
    check(target, old)
    write(target, new, overwrite=True)
    check(target, new)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'm.safetensors']
  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'letter').write_text('dear')
  (tmp_path / 'file').write_text('dear')
  (tmp_path / 'x.safetensors').mkdir()
  for name, message in (
    ('home', 'home holds no model'),
    ('file', 'file is a file'),
    ('x.safetensors', 'x.safetensors is a folder'),
  ):
    with pytest.raises(ValueError, match=message):
      checkpoint.ModelWriter(tmp_path / name, abstract(new), overwrite=True)


def test_kill_between_two_renames_is_mended(tmp_path):
  target, params = tmp_path / 'm', make()
  write(target, {'w': np.ones(2)})
  with pytest.raises(ValueError, match='missing'):
    write(target, params, only=['a/w'], plan=PLAN, overwrite=True)
  target.rename(tmp_path / '.m.replaced')
  write(target, params, plan=PLAN, overwrite=True)
  check(target, params)
  assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_target_are_refused(tmp_path):
  leaves = abstract({'w': np.ones(2)})
  with checkpoint.ModelWriter(tmp_path / 'm', leaves) as writer:
    with (
      pytest.raises(ValueError, match='another process writes it'),
      checkpoint.ModelWriter(tmp_path / 'm', leaves),
    ):
      pass
    writer.put('w', np.ones(2))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'dtype': 'int8'}, "dtype: want one of .*, got 'int8'"),
    ({'max_shard_bytes': 0}, 'max_shard_bytes: want at least 1: 0'),
    ({'leaves': {}}, 'no leaves'),
    ({'leaves': {'w': np.ones(2, np.complex128)}}, 'w: complex128 is not'),
    ({'leaves': {'a.b': np.ones(1), 'a/b': np.ones(1)}}, 'have the same name'),
    ({'name_map': convert.clip_vision}, '(?s)a/b: has no name.*step: has no'),
    ({'metadata': {'a': 1}}, "metadata: 'a': 1 is no text"),
    ({'plan': {'a': {1, 2}}}, 'plan: want JSON values'),
    ({'carry': '/nowhere'}, 'carry: want a folder'),
    ({'carry': '.', 'path': 'm.safetensors'}, 'carry: want a folder'),
    ({'alias': {'step': 'head'}}, 'step: its source head is not written'),
    ({'alias': {'step': 'a/b'}}, 'step: its source a/b has another shape'),
    (
      {'alias': {'step': 'flag', 'flag': 'step'}},
      '(?s)step: its source flag is not.*flag: its source step is not',
    ),
  ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, options, message):
  path = tmp_path / options.pop('path', 'm')
  leaves = abstract(options.pop('leaves', make()))
  with pytest.raises(ValueError, match=message):
    checkpoint.ModelWriter(path, leaves, **options)
  assert list(tmp_path.iterdir()) == []


def test_bad_puts_are_refused(tmp_path):
  leaves = abstract(make())
  writer = checkpoint.ModelWriter(tmp_path / 'm', leaves)
  with pytest.raises(ValueError, match='a/b: the writer is not open'):
    writer.put('a/b', make()['a/b'])
  with writer:
    for path, array, message in (
      ('x', np.ones(1), 'x: no such leaf'),
      ('a/w', np.ones((4, 5)), r'a/w: got float64\[4, 5\], want float32\[5, 4'),
      ('step', np.ones(1), r'step: got float64\[1\], want int32\[1\]'),
      ('scalar', np.int32(1), r'scalar: got int32\[\], want float32\[\]'),
    ):
      with pytest.raises(ValueError, match=message):
        writer.put(path, array)
    for path, array in make().items():
      writer.put(path, array)
    with pytest.raises(ValueError, match='a/b: was written before'):
      writer.put('a/b', make()['a/b'])
    for name in ('../x', 'a/b', 'model.safetensors', '', '..'):
      with pytest.raises(ValueError, match='cannot add the file'):
        writer.add_file(name, 'text')
  check(tmp_path / 'm', make())
  with pytest.raises(ValueError, match='a/b: the writer is not open'):
    writer.put('a/b', make()['a/b'])


def test_full_disk_is_told_before_any_work(tmp_path):
  leaves = {'w': jax.ShapeDtypeStruct((1 << 50,), np.float32)}
  with (
    pytest.raises(ValueError, match='want .* bytes of disk, .* free'),
    checkpoint.ModelWriter(tmp_path / 'm', leaves),
  ):
    pass


def test_hosts_write_one_model_and_go_on_together(tmp_path):
  target, params = tmp_path / 'm', make()
  own = {0: {'a/b', 'a/w', 'empty'}, 1: {'flag', 'scalar', 'step'}}

  def run(only):
    def one(hosts):
      mine = own[hosts.index] & only
      return write(target, params, only=mine, plan=PLAN, hosts=hosts)

    return threads.together(2, one)

  for error in run({'a/w', 'flag', 'step'}):
    assert isinstance(error, ValueError)
    assert 'scalar: missing' in str(error)
    assert 'flag' not in str(error)
  assert not target.exists()
  journal = tmp_path / '.m.partial' / 'journal_1'
  with journal.open('ab') as file:
    file.write(b'"sc')  # a line that was cut short
  for writer in run({*params}):
    assert writer.done == {'a/w', 'flag', 'step'}
  check(target, params)
  assert list(tmp_path.iterdir()) == [target]


def test_hosts_start_over_together(tmp_path):
  target, params = tmp_path / 'm', make()
  own = {0: {'a/b', 'a/w', 'empty'}, 1: {'flag', 'scalar', 'step'}}

  def run(only, plan):
    def one(hosts):
      mine = own[hosts.index] & only
      return write(target, params, only=mine, plan=plan, hosts=hosts)

    return threads.together(2, one)

  run({'a/w', 'flag'}, plan=[1])
  for writer in run({*params}, plan=[2]):
    assert not writer.done
  check(target, params)


def test_what_a_dtype_cannot_hold_stops_all_hosts(tmp_path):
  params = {'a': np.ones(2, np.float32), 'b': np.float32([1e6])}

  def one(hosts):
    only = {'ab'[hosts.index]}
    write(tmp_path / 'm', params, only=only, dtype='float16', hosts=hosts)

  for error in threads.together(2, one):
    assert isinstance(error, ValueError)
    assert 'b: float16 cannot hold it' in str(error)
  assert not (tmp_path / 'm').exists()
