"""What holds for merges whatever the numbers are."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj

seeds = hypothesis.given(seed=st.integers(0, 2**16))
few = hypothesis.settings(max_examples=5)
K = 3


def make_deltas(seed, num=K):
  rng = np.random.default_rng(seed)
  deltas = {
    'kernel': rng.normal(size=(num, 6, 5)),
    'bias': rng.normal(size=(num, 4)) * 10.0 ** rng.integers(-3, 3),
  }
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), deltas)


BASE = jax.tree.map(lambda x: x[0], make_deltas(99))


@functools.lru_cache
def jitted(tx):
  return jax.jit(lambda deltas: tx.update(deltas, tx.init(BASE), BASE)[0])


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


# What a merge gives for twice the task vectors is twice what it gave.
SCALES = {
  'average': dj.average(),
  'task_arithmetic': dj.task_arithmetic(0.3),
  'ties': dj.ties(0.4),
  'ties_mergekit': dj.ties(0.4, reading='mergekit'),
  'dare': dj.dare(0.5),
  'della': dj.della(),
  'breadcrumbs': dj.breadcrumbs(0.5),
  'magmax': dj.magmax(),
  'sce': dj.sce(0.5),
  'pcb': dj.pcb(0.5),
  'consensus': dj.consensus(),
  'emr': dj.emr(),
  'model_stock': dj.model_stock(),
  'nuslerp': dj.nuslerp(),
  'karcher': dj.karcher(space='delta'),
  'tsv_m': dj.tsv_m(),
  'iso_c': dj.iso_c(),
  'iso_cts': dj.iso_cts(common=0.5),
  'wudi_exact': dj.wudi(solver='exact', others=dj.average()),
}


@pytest.mark.parametrize('name', SCALES)
@few
@seeds
def test_scales_with_the_task_vectors(name, seed):
  merge = jitted(SCALES[name])
  deltas = make_deltas(seed, 2 if name == 'nuslerp' else K)
  got = flat(merge(jax.tree.map(lambda x: 4 * x, deltas)))
  want = 4 * flat(merge(deltas))
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-5 * abs(want).max())


# One expert alone is what comes out.
ALONE = {
  'average': dj.average(),
  'task_arithmetic': dj.task_arithmetic(1.0),
  'ties': dj.ties(1.0),
  'dare': dj.dare(0.0, 1.0),
  'della': dj.della(1.0, epsilon=0.0),
  'breadcrumbs': dj.breadcrumbs(1.0, 1.0, gamma=0.0),
  'magmax': dj.magmax(1.0),
  'sce': dj.sce(1.0),
  'pcb': dj.pcb(1.0),
  'consensus': dj.consensus(0.0, 1.0, min_tasks=1),
  'emr': dj.emr(),
  'karcher': dj.karcher(),
  'tsv_m': dj.tsv_m(),
  'wudi': dj.wudi(others=dj.average()),
  'knots': dj.knots(dj.ties(1.0)),
}


@pytest.mark.parametrize('name', ALONE)
@few
@seeds
def test_one_expert_comes_out_as_it_is(name, seed):
  deltas = make_deltas(seed, 1)
  got = flat(jitted(ALONE[name])(deltas))
  want = flat(deltas)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


@few
@seeds
def test_trim_keeps_its_density_and_is_idempotent(seed):
  deltas = make_deltas(seed)
  for reading, more in (('paper', 1), ('mergekit', 0)):
    tx = dj.transforms.trim(0.3, reading=reading)
    once = jitted(tx)(deltas)
    kept = [np.count_nonzero(flat(dj.tree.unstack(once)[k])) for k in range(K)]
    assert kept == [int(0.3 * 34) + more] * K
    again = jitted(tx)(once)
    np.testing.assert_array_equal(flat(again), flat(once))


@few
@seeds
def test_breadcrumbs_keeps_its_density_in_each_leaf(seed):
  kept = jitted(dj.pruning.keep_middle(0.5, gamma=0.1))(make_deltas(seed))
  for x in jax.tree.leaves(kept):
    size = x[0].size
    for k in range(K):
      assert np.count_nonzero(x[k]) == int(0.5 * size)


@pytest.mark.parametrize('name', ['ties', 'ties_mergekit', 'emr', 'sce'])
@few
@seeds
def test_elected_entries_have_a_sign_that_some_expert_has(name, seed):
  deltas = make_deltas(seed)
  got = flat(jitted(SCALES[name])(deltas))
  own = np.stack([flat(d) for d in dj.tree.unstack(deltas)])
  some = (np.sign(own) == np.sign(got)).any(axis=0)
  assert (some | (got == 0)).all()


@few
@seeds
def test_mean_of_those_that_agree_lies_among_them(seed):
  deltas = make_deltas(seed)
  got = flat(jitted(dj.ties(1.0))(deltas))
  own = np.stack([flat(d) for d in dj.tree.unstack(deltas)])
  low, high = own.min(axis=0), own.max(axis=0)
  slack = 1e-5 * abs(own).max(axis=0)
  assert (got >= low - slack).all()
  assert (got <= high + slack).all()
