"""Merges leaf by leaf give what merges of the whole model give."""

import threading
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from tests import threads


def make_params(seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    'body': {
      'kernel': draw(12, 7),
      'other': draw(12, 7),
      'bias': jnp.asarray(draw(9), jnp.bfloat16),
    },
    'head': draw(5, 2),
    'step': np.array([seed, 7], np.int32),
  }


BASE = make_params(0)
EXPERTS = [make_params(1 + k) for k in range(3)]
METHODS = {
  'average': dj.average(),
  'ties': dj.ties(0.3, 0.5),
  'ties_mergekit': dj.ties(0.3, weights=[1.0, 0.5, 0.2], reading='mergekit'),
  'dare': dj.dare(0.5),
  'pcb': dj.pcb(0.4),
  'pcb_code': dj.pcb(0.4, reading='code'),
}


class Model:
  """A source that counts its reads."""

  def __init__(self, params):
    self.arrays = dj.tree.flatten(params)
    self.leaves = {
      path: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
      for path, x in self.arrays.items()
    }
    self.reads = []

  def read(self, path):
    self.reads.append(path)
    return self.arrays[path]


def stream(tx, base=BASE, experts=EXPERTS, **options):
  """Returns the merged leaves by path, and the base that was read."""
  merged, source = {}, Model(base)
  named = {str(k): Model(expert) for k, expert in enumerate(experts)}
  dj.streaming.merge_leaves(tx, source, named, merged.__setitem__, **options)
  return merged, source


@pytest.mark.parametrize('tx', METHODS.values(), ids=METHODS)
def test_gives_what_the_whole_merge_gives(tx):
  whole = jax.jit(lambda b, e: dj.merge(tx, b, e).params)
  want = whole(BASE, dj.tree.stack(EXPERTS))
  got = dj.streaming.merge(tx, BASE, EXPERTS)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(got['step'], BASE['step'])


def test_a_donated_base_is_given_up_leaf_by_leaf():
  base = jax.tree.map(jnp.array, BASE)
  got = dj.streaming.merge(dj.ties(), base, EXPERTS, donate_base=True)
  want = dj.streaming.merge(dj.ties(), BASE, EXPERTS)
  chex.assert_trees_all_equal(got, want)
  for path, leaf in dj.tree.flatten(base).items():
    assert leaf.is_deleted() == (path != 'step')


def test_a_donated_base_is_a_jax_array_and_its_own():
  base = jax.tree.map(jnp.array, BASE) | {'step': np.int32(1)}
  experts = [{**EXPERTS[0], 'head': base['head']}, EXPERTS[1]]
  with pytest.raises(ValueError, match='(?s)expert 0.*want jax.Array'):
    dj.streaming.merge(dj.ties(), base, experts, donate_base=True)


def test_a_tie_of_signs_goes_to_the_whole_models_majority():
  base = {'a': np.zeros(1, np.float32), 'b': np.zeros(3, np.float32)}
  experts = [
    {'a': np.float32([1]), 'b': np.float32([-1, -2, -3])},
    {'a': np.float32([-1]), 'b': np.float32([-1, -2, -3])},
  ]
  merged = dj.streaming.merge(dj.ties(1.0), base, experts)
  assert merged['a'].tolist() == [-1.0]


def test_labels_have_thresholds_of_their_own():
  rules = [('head', 'keep'), ('body/kernel', 'much')]
  labels = dj.tree.label_by_path(BASE, rules, default='little')
  txs = {'little': dj.ties(0.2), 'much': dj.average()}
  partition = optax.partition({**txs, 'keep': dj.keep_base()}, labels)
  want = dj.merge(partition, BASE, dj.tree.stack(EXPERTS)).params
  merged, _ = stream({**txs, 'keep': None}, labels=dj.tree.flatten(labels))
  for path, leaf in dj.tree.flatten(want).items():
    np.testing.assert_allclose(
      np.asarray(merged[path], np.float32),
      np.asarray(leaf, np.float32),
      rtol=1e-2 if leaf.dtype == jnp.bfloat16 else 1e-6,
    )
  assert merged['head'] is BASE['head']


def test_whole_model_questions_cost_a_pass_each_and_merging_one():
  reads = {
    name: stream(METHODS[name])[1].reads.count('head')
    for name in ('average', 'ties_mergekit', 'ties')
  }
  assert reads == {'average': 1, 'ties_mergekit': 1, 'ties': 4}


def test_what_is_skipped_counts_in_whole_model_questions():
  tx = dj.chain(dj.transforms.trim(0.3), dj.aggregators.mean())
  whole, _ = stream(tx)
  rest, source = stream(tx, skip={'head', 'step'})
  assert set(whole) - set(rest) == {'head', 'step'}
  for path, leaf in rest.items():
    np.testing.assert_array_equal(leaf, whole[path])
  assert 'step' not in source.reads


def test_draws_depend_on_a_leafs_path_alone():
  deltas = {'a': {'b': jnp.ones((2, 3))}, 'c': jnp.ones((2, 3))}
  whole = dj.transforms.leaf_keys(jax.random.key(3), deltas)
  salt = zlib.crc32(b'a/b')
  alone = dj.transforms.leaf_keys(jax.random.key(3), deltas['c'], salt)
  assert (
    jax.random.key_data(alone) == jax.random.key_data(whole['a']['b'])
  ).all()
  assert (alone != whole['c']).all()


@pytest.mark.parametrize(
  ('tx', 'most'), [(METHODS['ties_mergekit'], 2), (METHODS['average'], 4)]
)
def test_holds_few_leaves_at_a_time(tx, most, monkeypatch):
  monkeypatch.setattr(dj.blocks, 'SIZE', 6)  # two of them have three
  held, seen, lock = 0, 0, threading.Lock()

  class Watched(Model):
    def read(self, path):
      nonlocal held, seen
      with lock:
        held += 1
        seen = max(seen, held)
      return super().read(path)

  def put(path, leaf):
    nonlocal held
    del path, leaf
    with lock:
      held -= 1

  params = {str(i): np.ones((2, 2), np.float32) for i in range(20)}
  base, expert = Watched(params), Model(params)
  experts = dict.fromkeys('abc', expert)
  dj.streaming.merge_leaves(tx, base, experts, put, workers=2)
  assert seen <= most


@pytest.mark.parametrize('block', [16, 160])
@pytest.mark.parametrize('name', ['average', 'ties', 'pcb'])
def test_blocks_give_what_leaves_give(name, block, monkeypatch):
  tx = METHODS[name]
  assert isinstance(tx, dj.base.Entrywise)
  leaves, _ = stream(optax.GradientTransformationExtraArgs(*tx))
  monkeypatch.setattr(dj.blocks, 'SIZE', block)
  blocks, source = stream(tx)
  assert set(blocks) == set(leaves)
  assert set(source.reads) == set(leaves)
  # Sums of floats are rounded as they are cut, counts are not.
  near = 1e-5 if name == 'pcb' else 0
  for path, leaf in leaves.items():
    np.testing.assert_allclose(blocks[path], leaf, rtol=near, atol=near)


def test_a_leaf_may_be_empty():
  base = {**BASE, 'none': np.zeros((0, 3), np.float32)}
  merged, _ = stream(
    dj.average(),
    base=base,
    experts=[{**e, 'none': base['none']} for e in EXPERTS],
  )
  assert merged['none'].shape == (0, 3)


def test_an_error_while_putting_ends_the_merge():
  def put(path, leaf):
    raise OSError(f'{path}: disk full')

  with pytest.raises(OSError, match='disk full'):
    dj.streaming.merge_leaves(
      dj.average(), Model(BASE), {'e': Model(EXPERTS[0])}, put
    )


def test_reports_every_read():
  seen = []
  stream(
    METHODS['average'], on_leaf=lambda path, size: seen.append((path, size))
  )
  assert dict(seen)['head'] == 4 * BASE['head'].nbytes


def test_floats_may_differ_in_dtype_and_are_computed_in_float32():
  halves = [
    jax.tree.map(
      lambda x: x.astype(jnp.float16) if x.dtype == np.float32 else x, e
    )
    for e in EXPERTS
  ]
  merged, _ = stream(dj.average(), experts=halves)
  want = np.mean([np.float32(e['head']) for e in halves], axis=0)
  np.testing.assert_allclose(merged['head'], want, rtol=1e-6, atol=1e-6)
  assert merged['head'].dtype == np.float32


def test_everything_that_does_not_fit_is_named():
  first = {**EXPERTS[0], 'head': np.zeros((4, 2), np.float32)}
  second = {k: x for k, x in EXPERTS[1].items() if k != 'step'}
  third = {**EXPERTS[2], 'head': np.zeros((5, 2), np.int32)}
  with pytest.raises(ValueError, match='experts differ') as error:
    stream(dj.average(), experts=[first, second, third])
  for line in (
    '0: head: got float32[4, 2], want float32[5, 2]',
    '1: step: missing',
    '2: head: got int32, want float32',
  ):
    assert line in str(error.value)
  wide = {**BASE, 'head': np.zeros((5, 2))}
  with pytest.raises(ValueError, match='base: head: float64'):
    stream(dj.average(), base=wide)
  with pytest.raises(ValueError, match='no experts'):
    stream(dj.average(), experts=[])


def test_labels_that_fit_no_transformation_are_named():
  with pytest.raises(ValueError, match=r"head.*labels without.*\['x'\]"):
    stream(
      {'': dj.average()},
      labels={p: 'x' for p in dj.tree.flatten(BASE) if p != 'head'},
    )


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
  head = np.where(np.arange(10).reshape(5, 2) == 3, value, 1)
  broken = {**EXPERTS[1], 'head': head.astype(np.float32)}
  with pytest.raises(ValueError, match='not finite:\n  1: head$'):
    stream(dj.ties(), experts=[EXPERTS[0], broken])


def test_tied_leaves_are_those_that_agree_everywhere():
  kernel = BASE['body']['kernel']
  base = {**BASE, 'tied': kernel.copy(), 'untied': kernel.copy()}
  experts = [
    {**e, 'tied': e['body']['kernel'], 'untied': e['body']['other']}
    for e in EXPERTS
  ]
  found = dj.streaming.tied(Model(base), [Model(e) for e in experts])
  assert found == {'tied': 'body/kernel'}


def test_two_kinds_of_leaves_do_not_share_their_sums():
  tx = dj.knots(dj.ties(0.3), others=dj.ties(0.6))
  base = {name: BASE['body'][name] for name in ('kernel', 'other')}
  base['bias'] = np.arange(9, dtype=np.float32)
  experts = [
    {**e['body'], 'bias': np.float32(e['body']['bias']) * 100} for e in EXPERTS
  ]
  want = dj.merge(tx, base, dj.tree.stack(experts)).params
  got = dj.streaming.merge(tx, base, experts)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', METHODS)
def test_hosts_read_and_put_their_own_leaves_and_agree(name):
  tx = METHODS[name]
  alone, _ = stream(tx)
  found = threads.together(3, lambda hosts: stream(tx, hosts=hosts))
  paths = [path for merged, _ in found for path in merged]
  assert sorted(paths) == sorted(alone)
  for merged, source in found:
    assert set(source.reads) == set(merged)
    for path, leaf in merged.items():
      near = {'rtol': 1e-5, 'atol': 1e-5} if 'pcb' in name else {'rtol': 1e-6}
      np.testing.assert_allclose(leaf, alone[path], **near, err_msg=path)


def test_a_host_without_leaves_of_its_own_still_answers():
  base = {'a': np.zeros(4, np.float32), 'b': np.zeros(2, np.float32)}
  experts = [{k: x + t for k, x in base.items()} for t in (1, 2)]
  tx = dj.ties(0.5)
  found = threads.together(3, lambda h: stream(tx, base, experts, hosts=h))
  merged = {k: x for each, _ in found for k, x in each.items()}
  chex.assert_trees_all_close(merged, stream(tx, base, experts)[0])
  assert [len(each) for each, _ in found] == [1, 1, 0]


def test_weights_that_are_not_finite_stop_all_hosts():
  experts = [{**EXPERTS[0], 'head': np.full((5, 2), np.nan, np.float32)}]
  found = threads.together(
    2, lambda hosts: stream(dj.average(), experts=experts, hosts=hosts)
  )
  for error in found:
    assert isinstance(error, ValueError)
    assert '0: head' in str(error)
