"""Chains of transformations, and loops of steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj

BASE = {'w': jnp.array([1.0, 2.0]), 'b': jnp.array(3.0)}
EXPERTS = {
  'w': jnp.array([[2.0, 2.0], [1.0, 6.0], [0.0, 0.0]]),
  'b': jnp.array([3.0, 5.0, 4.0]),
}


def test_chain_applies_its_links_in_order():
  shift = optax.stateless(
    lambda updates, params=None: jax.tree.map(lambda x: x + 1, updates)
  )
  first = dj.chain(shift, dj.scale_tasks([1.0, 2.0, 0.0]), dj.average())
  last = dj.chain(dj.scale_tasks([1.0, 2.0, 0.0]), shift, dj.average())
  deltas = np.array([[1.0, 0.0], [0.0, 4.0], [-1.0, -2.0]])
  weights = np.array([[1.0], [2.0], [0.0]])
  np.testing.assert_allclose(
    dj.merge(first, BASE, EXPERTS).params['w'],
    np.asarray(BASE['w']) + (weights * (deltas + 1)).mean(axis=0),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    dj.merge(last, BASE, EXPERTS).params['w'],
    np.asarray(BASE['w']) + (weights * deltas + 1).mean(axis=0),
    rtol=1e-6,
  )


def test_chain_passes_states_and_extra_arguments_on():
  def update_fn(updates, state, params=None, *, factor):
    return jax.tree.map(lambda x: factor * x, updates), state + 1

  counting = optax.GradientTransformationExtraArgs(lambda _: 0, update_fn)
  tx = dj.chain(counting, dj.average())
  once = dj.merge(tx, BASE, EXPERTS, factor=3.0)
  twice = dj.merge(tx, BASE, EXPERTS, factor=3.0, state=once.state)
  assert (once.state[0], twice.state[0]) == (1, 2)
  plain = dj.merge(dj.average(), BASE, EXPERTS).params
  np.testing.assert_allclose(
    once.params['w'] - BASE['w'], 3 * (plain['w'] - BASE['w']), rtol=1e-6
  )


@pytest.mark.parametrize(
  ('links', 'index'),
  [
    ([dj.average(), dj.average()], 0),
    ([dj.transforms.trim(0.5), dj.average(), dj.scale_tasks([1.0])], 1),
  ],
)
def test_chain_names_the_link_that_reduces_too_early(links, index):
  ran = []

  def record(updates, params=None):
    ran.append(isinstance(updates['w'], jax.core.Tracer))
    return updates

  tx = dj.chain(optax.stateless(record), *links)
  with pytest.raises(
    ValueError, match=rf'link {index + 1} of the chain.*'
  ) as e:
    dj.merge(tx, BASE, EXPERTS)
  assert 'w: got float32[2], want float32[3, 2]' in str(e.value)
  assert ran == [True]  # shapes only, before anything is computed


def test_merge_refuses_a_transformation_that_keeps_the_task_axis():
  with pytest.raises(ValueError, match=r'(?s)b: got.*w: got float32\[3, 2\]'):
    dj.merge(dj.transforms.trim(0.5), BASE, EXPERTS)


def test_merge_uses_the_state_it_is_given():
  tx = dj.dare(0.5, 1.0)
  base, experts = {'w': jnp.zeros(64)}, {'w': jnp.ones((1, 64))}
  first = dj.merge(tx, base, experts)
  again = dj.merge(tx, base, experts, state=tx.init(base))
  later = dj.merge(tx, base, experts, state=first.state)
  np.testing.assert_array_equal(first.params['w'], again.params['w'])
  assert (first.params['w'] != later.params['w']).any()


def test_from_transform_merges_at_the_end_and_has_no_step():
  tx = dj.dare(0.5, 1.0, seed=3)
  merger = dj.from_transform(tx)
  assert merger.plan == dj.Plan(placewise=True, leafwise=True)
  state = merger.init(jax.random.key(0), BASE, EXPERTS)
  chex.assert_trees_all_equal(
    merger.finalize(state, BASE, EXPERTS), dj.merge(tx, BASE, EXPERTS).params
  )
  with pytest.raises(ValueError, match='reads no data'):
    merger.step(state, BASE, EXPERTS, None)


def test_partition_is_that_of_optax():
  txs = {'a': dj.ties(0.5), 'b': dj.dare(0.5), 'c': dj.keep_base()}
  txs['of no leaf'] = dj.tsv_m()
  rng = np.random.default_rng(0)
  shapes = {'x': (4, 3), 'y': {'z': (5,), 'w': (2, 2)}, 'v': (7,)}
  base = jax.tree.map(
    lambda shape: np.float32(rng.normal(size=shape)),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  experts = jax.tree.map(lambda x: np.stack([x, 2 * x, x - 1]), base)
  labels = {'x': 'a', 'y': {'z': 'b', 'w': 'a'}, 'v': 'c'}
  merger = dj.partition(
    {label: dj.from_transform(tx) for label, tx in txs.items()}, labels
  )
  state = merger.init(jax.random.key(0), base, experts)
  want = dj.merge(optax.partition(txs, labels), base, experts).params
  chex.assert_trees_all_equal(merger.finalize(state, base, experts), want)


def test_partition_says_what_cannot_be_put_together():
  mergers = {
    'learns': dj.adamerging(lambda params, images: images, steps=1),
    'merges': dj.from_transform(dj.average()),
  }
  with pytest.raises(ValueError, match=r"\['learns'\].*\['none'\]"):
    dj.partition(mergers, {'w': 'merges', 'v': 'none'})


def _summing():
  """A merger whose state tells the order of its batches."""

  def step(state, base, experts, batch):
    state = 2 * state + batch * base['b'] + jnp.sum(experts['b'])
    return state, {'batch': batch}

  return dj.Merger(
    init=lambda key, base, experts: jnp.zeros([]),
    step=step,
    finalize=lambda state, base, experts: base,
  )


@pytest.mark.parametrize('batch_fn', [None, lambda data, index: data[index]])
def test_scan_steps_is_a_loop(batch_fn):
  merger, data = _summing(), jnp.array([5.0, 7.0, 11.0])
  indices = jnp.array([2, 0, 0, 1])
  indices = data[indices] if batch_fn is None else indices
  run = dj.scan_steps(merger, batch_fn)
  state, metrics = run(jnp.zeros([]), BASE, EXPERTS, data, indices)
  want = merger.init(None, BASE, EXPERTS)
  for i, batch in enumerate([11.0, 5.0, 5.0, 7.0]):
    want, _ = merger.step(want, BASE, EXPERTS, batch)
    assert metrics['batch'][i] == batch
  assert state == want


def test_scan_steps_consumes_the_state_and_nothing_else():
  run = dj.scan_steps(_summing())
  base = jax.tree.map(jnp.copy, BASE)
  state = jnp.zeros([])
  run(state, base, EXPERTS, None, jnp.ones(3))
  assert state.is_deleted()
  assert not any(x.is_deleted() for x in jax.tree.leaves((base, EXPERTS)))


@pytest.mark.parametrize('tx', [dj.average(), dj.task_arithmetic(0.3)])
def test_a_donated_base_is_overwritten_in_place(tx):
  base = {'w': jnp.ones((64, 8)), 'b': jnp.ones(8)}
  experts = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), base)
  merge = jax.jit(lambda b, e: dj.merge(tx, b, e).params, donate_argnums=0)
  compiled = merge.lower(base, experts).compile()
  assert ' copy(' not in compiled.as_text()
  size = sum(x.nbytes for x in jax.tree.leaves(base))
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == size
  assert memory.temp_size_in_bytes < size
