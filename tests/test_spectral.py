"""Merges by singular values, against NumPy in float64 and their properties."""

import functools
import math
import re
import subprocess
import sys

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from tests import papers

SHAPES = {'wide': (7, 10), 'tall': (10, 7), 'square': (9, 9)}


def each(matrix_fn, **options):
  """Makes of a function of one leaf's task vectors one of all leaves'."""
  return lambda leaves: [matrix_fn(list(taus), **options) for taus in leaves]


# Each as it is for torch's weights, with what it should give.
METHODS = {
  'tsv_m': (dj.tsv_m(), each(papers.tsv_m)),
  'iso_c': (dj.iso_c(), each(papers.iso_c)),
  'iso_cts': (dj.iso_cts(input_axis=1), each(papers.iso_cts)),
  'wudi': (
    dj.wudi(1e-2, iterations=20, input_axis=1),
    each(papers.wudi, rate=1e-2, iterations=20),
  ),
  'wudi_exact': (
    dj.wudi(solver='exact', input_axis=1),
    each(papers.wudi_exact),
  ),
  'wudi_ridge': (
    dj.wudi(solver='exact', ridge=0.5, input_axis=1),
    each(papers.wudi_exact, omega=0.5),
  ),
  'knots': (dj.knots(input_axis=1), papers.knots),
  'knots_scaled': (
    dj.knots(dj.ties(0.4), scaled=True, rank=4, input_axis=1),
    functools.partial(papers.knots, density=0.4, scaled=True, rank=4),
  ),
}
FLAX = {
  'iso_cts': dj.iso_cts(),
  'wudi': dj.wudi(1e-2, iterations=20),
  'wudi_exact': dj.wudi(solver='exact'),
  'knots': dj.knots(),
}


def those(*names):
  return pytest.mark.parametrize('name', names)


def task_vectors(seed=0, num=3, rank=None):
  """Returns leaves of three shapes, `[K, out, in]`."""
  rng = np.random.default_rng(seed)

  def leaf_fn(rows, columns):
    if rank is None:
      return rng.normal(size=(num, rows, columns))
    left = rng.normal(size=(num, rows, rank))
    return left @ rng.normal(size=(num, rank, columns))

  return {name: leaf_fn(*shape) for name, shape in SHAPES.items()}


def single(deltas):
  """Makes float64, and nothing else, float32; no compilation in sight."""
  return jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, deltas
  )


def compiled(tx):
  """Returns what merges task vectors in float32, compiled once."""

  @jax.jit
  def run(deltas):
    return tx.update(deltas, tx.init(jax.tree.map(lambda x: x[0], deltas)))[0]

  return lambda deltas: jax.tree.map(np.asarray, run(single(deltas)))


def update(tx, deltas):
  return compiled(tx)(deltas)


@functools.cache
def compiled_method(name):
  return compiled(METHODS[name][0])


def merge(name, deltas):
  """Merges `task_vectors()` by a method, compiled once."""
  return compiled_method(name)(deltas)


def assert_close(got, want, tolerance=3e-5):
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=tolerance * np.abs(w).max())


def singular_values(x):
  return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@those(*METHODS)
def test_agrees_with_the_paper(name):
  deltas = task_vectors()
  want = METHODS[name][1](list(deltas.values()))
  assert_close(merge(name, deltas), dict(zip(deltas, want, strict=True)))


def transposed(deltas):
  return {
    'wide': deltas['tall'].swapaxes(-1, -2),
    'tall': deltas['wide'].swapaxes(-1, -2),
    'square': deltas['square'].swapaxes(-1, -2),
  }


@those('tsv_m', 'iso_c')
def test_is_the_same_for_the_transpose(name):
  deltas = task_vectors()
  merged = merge(name, deltas)
  assert_close(transposed(merge(name, transposed(deltas))), merged)


@those(*FLAX)
def test_flax_kernels_give_the_transpose_of_torch_weights(name):
  deltas = task_vectors()
  flax, torch = compiled(FLAX[name]), merge(name, deltas)
  assert_close(transposed(flax(transposed(deltas))), torch)
  for key, x in flax(deltas).items():
    assert np.abs(x - torch[key]).max() > 0.01 * np.abs(x).max()


few = hypothesis.settings(max_examples=6)
seeds = hypothesis.given(seed=st.integers(0, 2**16))


@those('tsv_m', 'iso_c', 'iso_cts', 'wudi_exact', 'knots', 'knots_scaled')
@hypothesis.given(
  seed=st.integers(0, 2**16), exponent=st.floats(-12, 6, width=16)
)
@few
def test_scaled_task_vectors_give_the_scaled_update(name, seed, exponent):
  deltas, scale = task_vectors(seed), 10.0**exponent
  scaled = merge(name, jax.tree.map(lambda x: scale * x, deltas))
  want = jax.tree.map(lambda x: scale * x, merge(name, deltas))
  assert_close(scaled, want, 1e-3)


@those('tsv_m', 'iso_c', 'iso_cts', 'wudi_exact', 'wudi_ridge', 'knots')
@seeds
@few
def test_turned_task_vectors_give_the_turned_update(name, seed):
  rng = np.random.default_rng(seed)

  def rotation(size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]

  deltas = task_vectors(seed)
  outs = {key: rotation(shape[0]) for key, shape in SHAPES.items()}
  # What merges `V` entry by entry knows the inputs apart.
  ins = {
    key: np.eye(shape[1]) if name == 'knots' else rotation(shape[1])
    for key, shape in SHAPES.items()
  }

  def turned(tree):
    return {key: outs[key] @ x @ ins[key] for key, x in tree.items()}

  assert_close(merge(name, turned(deltas)), turned(merge(name, deltas)), 1e-3)


@those(*METHODS)
@seeds
@few
def test_low_rank_and_zero_give_no_nan_and_no_new_directions(name, seed):
  low = task_vectors(seed, rank=1)
  low['wide'][1:] = 0
  low['square'][:] = 0
  merged = merge(name, low)
  np.testing.assert_array_equal(merged['square'], 0)
  for key, most in (('tall', 3), ('wide', 1)):
    assert np.isfinite(merged[key]).all()
    values = singular_values(merged[key])
    if name != 'wudi':  # Adam's steps are as large for any entry.
      assert (values > 1e-4 * values[0]).sum() <= most


@those('tsv_m', 'iso_c', 'iso_cts', 'wudi_exact', 'knots')
@seeds
@few
def test_order_of_tasks_does_not_matter(name, seed):
  deltas = task_vectors(seed)
  rolled = jax.tree.map(lambda x: x[[2, 0, 1]], deltas)
  assert_close(merge(name, rolled), merge(name, deltas), 1e-3)


def test_tsv_m_keeps_the_singular_values_it_takes():
  deltas = task_vectors()
  for key, x in merge('tsv_m', deltas).items():
    each = min(SHAPES[key]) // 3
    taken = np.concatenate([singular_values(t)[:each] for t in deltas[key]])
    got = singular_values(x)[: 3 * each]
    np.testing.assert_allclose(got, np.sort(taken)[::-1], rtol=1e-5)


def test_tsv_m_of_one_expert_many_times_is_its_best_approximation():
  deltas = jax.tree.map(lambda x: np.stack([x[0]] * 3), task_vectors())
  for key, x in merge('tsv_m', deltas).items():
    u, s, vt = np.linalg.svd(deltas[key][0], full_matrices=False)
    each = min(SHAPES[key]) // 3
    assert_close(x, u[:, :each] * s[:each] @ vt[:each])


def test_tsv_m_of_more_tasks_than_singular_values_takes_one_each():
  deltas = {'w': np.random.default_rng(0).normal(size=(5, 2, 4))}
  merged = update(dj.tsv_m(), deltas)['w']
  top = [np.linalg.svd(tau, full_matrices=False) for tau in deltas['w']]
  left = papers.polar(np.stack([u[:, 0] for u, _, _ in top], axis=1))
  right = papers.polar(np.stack([vt[0] for _, _, vt in top], axis=1))
  assert_close(merged, left * np.array([s[0] for _, s, _ in top]) @ right.T)


def test_one_task_is_itself():
  deltas = {'w': task_vectors(num=1)['tall']}
  want = single(jax.tree.map(lambda x: x[0], deltas))
  assert_close(update(dj.tsv_m(), deltas), want)
  assert_close(update(dj.wudi(solver='exact'), deltas), want)
  chex.assert_trees_all_equal(update(dj.wudi(), deltas), want)


@those('iso_c', 'iso_cts')
def test_iso_makes_singular_values_equal(name):
  deltas = task_vectors()
  for key, x in merge(name, deltas).items():
    values = singular_values(x)
    np.testing.assert_allclose(values, values.mean(), rtol=1e-5)
    if name == 'iso_c':
      mean = singular_values(deltas[key].sum(0)).mean()
      np.testing.assert_allclose(values.mean(), mean, rtol=1e-5)


def test_iso_keeps_what_it_gave_and_the_nuclear_norm_of_low_rank():
  tx = compiled(dj.iso_c())
  first = tx(jax.tree.map(lambda x: x[:1], task_vectors(rank=2)))
  again = tx(jax.tree.map(lambda x: x[None], first))
  assert_close(again, first)
  for key, x in first.items():
    values = singular_values(task_vectors(rank=2)[key][0])
    want = np.where(values > 1e-9, values.sum() / 2, 0)
    np.testing.assert_allclose(singular_values(x), want, atol=1e-4)


@pytest.mark.parametrize(
  ('common', 'same'),
  [(0.3, 0.3), (1.0, 1.0), (0.0, 0.25)],  # 8 / 3 rounds to 9 / 3: too many.
)
def test_iso_cts_shares_directions_as_told(common, same):
  taus = np.random.default_rng(0).normal(size=(3, 8, 9))
  tx = dj.iso_cts(common=common, input_axis=1)
  want = papers.iso_cts(list(taus), same)
  assert_close(update(tx, {'w': taus})['w'], want)
  assert np.allclose(want, papers.iso_c(list(taus))) == (common == 1)


def interference(delta, taus):
  """What WUDI minimises, of matrices `[out, in]`."""
  return sum(
    np.linalg.norm((delta - tau) @ tau.T) ** 2 / np.linalg.norm(tau) ** 2
    for tau in taus
  )


def test_wudi_lowers_interference_and_exact_lowers_it_most():
  deltas = task_vectors()
  exact, stepped = merge('wudi_exact', deltas), merge('wudi', deltas)
  for key, taus in deltas.items():
    rates = [
      interference(x, taus) for x in (exact[key], stepped[key], taus.sum(0))
    ]
    assert rates == sorted(rates)
    assert rates[1] < 0.9 * rates[2]
    noise = 1e-2 * np.random.default_rng(0).normal(size=taus.shape[1:])
    assert interference(exact[key] + noise, taus) > rates[0]


def test_wudi_with_a_large_ridge_is_a_weighted_mean():
  deltas = task_vectors()
  deltas = {
    key: x * np.arange(1, 4)[:, None, None] for key, x in deltas.items()
  }
  merged = update(dj.wudi(solver='exact', ridge=1e6), deltas)
  for key, taus in deltas.items():
    weights = [1 / np.linalg.norm(tau) ** 2 for tau in taus]
    assert_close(merged[key], np.average(taus, axis=0, weights=weights), 1e-3)


def test_knots_of_what_is_linear_is_that_itself():
  deltas = task_vectors()
  for scaled in (False, True):
    tx = dj.knots(dj.task_arithmetic(0.3), scaled=scaled)
    want = jax.tree.map(lambda x: 0.3 * x.sum(0), deltas)
    assert_close(update(tx, deltas), want)


def test_knots_keeps_the_task_axis_with_what_keeps_it():
  tx = dj.knots(dj.scale_tasks([1.0, 2.0, 0.0]), others=optax.identity())
  deltas = {**task_vectors(), 'bias': np.ones((3, 4))}
  got = update(tx, deltas)
  weights = np.array([1.0, 2.0, 0.0])[:, None, None]
  for key in SHAPES:
    assert_close(got[key], weights * deltas[key])
  np.testing.assert_array_equal(got['bias'], deltas['bias'])


def test_knots_takes_a_convolution_for_a_matrix():
  conv = np.random.default_rng(0).normal(size=(3, 2, 2, 3, 5))
  deltas = {'conv': conv, 'matrix': conv.reshape(3, 12, 5)}
  flax = update(dj.knots(dj.ties(1.0)), deltas)
  assert_close(flax['conv'], flax['matrix'].reshape(2, 2, 3, 5))
  torch = update(
    dj.knots(dj.ties(1.0), input_axis=1),
    {
      'conv': conv.transpose(0, 4, 3, 1, 2),
      'matrix': deltas['matrix'].swapaxes(1, 2),
    },
  )
  assert_close(torch['conv'].transpose(2, 3, 1, 0), flax['conv'])


def test_knots_draws_anew_each_time():
  tx = dj.knots(dj.dare(0.5))
  deltas = single({'w': task_vectors()['tall']})
  run = jax.jit(tx.update)
  first, state = run(deltas, tx.init(deltas))
  second, _ = run(deltas, state)
  assert np.mean(np.asarray(first['w']) != second['w']) > 0.9


def factors(ranks=(2, 2, 2)):
  """Returns LoRA's `B` and `A` of two leaves, and their products."""
  rng = np.random.default_rng(0)
  most = max(ranks)
  kept = np.arange(most) < np.array(ranks)[:, None]
  b = {'p': rng.normal(size=(3, 40, most)), 'q': rng.normal(size=(3, 5, most))}
  a = {'p': rng.normal(size=(3, most, 30)), 'q': rng.normal(size=(3, most, 4))}
  b = {key: x * kept[:, None] for key, x in b.items()}
  a = {key: x * kept[:, :, None] for key, x in a.items()}
  return single(b), single(a), {key: b[key] @ a[key] for key in b}


@pytest.mark.parametrize('scaled', [False, True])
def test_knots_of_factors_is_that_of_their_products(scaled):
  b, a, products = factors()
  left, right = jax.jit(functools.partial(dj.knots_lora, scaled=scaled))(b, a)
  assert {key: x.shape for key, x in left.items()} == {
    'p': (40, 6),
    'q': (5, 5),
  }
  got = {key: np.asarray(x) @ np.asarray(right[key]) for key, x in left.items()}
  want = papers.knots(list(products.values()), scaled=scaled, rank=6)
  assert_close(got, dict(zip(products, want, strict=True)), 1e-4)


def test_knots_of_factors_takes_ranks_that_differ_and_keeps_dtypes():
  b, a, products = factors(ranks=(1, 0, 2))
  b['p'] = b['p'].astype(jnp.bfloat16)
  run = jax.jit(functools.partial(dj.knots_lora, then=dj.average()))
  left, right = jax.tree.map(np.asarray, run(b, a))
  assert (left['p'].dtype, right['p'].dtype) == (jnp.bfloat16, jnp.float32)
  assert_close(left['q'] @ right['q'], products['q'].mean(0))
  assert_close(
    left['p'].astype(np.float32) @ right['p'], products['p'].mean(0), 0.02
  )


def test_knots_of_factors_forms_no_product():
  b, a, _ = factors()
  text = jax.jit(dj.knots_lora).lower(b, a).as_text()
  shapes = [
    [int(size) for size in found.split('x')]
    for found in re.findall(r'tensor<([\dx]+)xf32>', text)
  ]
  assert [3, 2, 30] in shapes
  assert max(map(math.prod, shapes)) < 40 * 30


@pytest.mark.parametrize(
  ('tx', 'factor'),
  [
    (dj.tsv_m(0.5), 0.5 / 3),
    (dj.iso_c(0.5), 0.5 / 3),
    (dj.iso_cts(0.5), 0.5 / 3),
    (dj.wudi(iterations=1), 0.0),
    (dj.wudi(iterations=1, others=dj.average()), 1 / 3),
    (dj.tsv_m(2.0, others=dj.task_arithmetic(1.0)), 2.0),
  ],
)
def test_what_is_no_matrix_is_merged_by_others(tx, factor):
  rng = np.random.default_rng(0)
  floats = {'gain': rng.normal(size=(3, 4)), 'scale': rng.normal(size=3)}
  floats['conv'] = rng.normal(size=(3, 2, 2, 3, 5))
  deltas = {**floats, 'ids': np.ones((3, 1, 7), np.int32)}
  deltas['kernel'] = rng.normal(size=(3, 4, 2))
  merged = update(tx, deltas)
  want = jax.tree.map(lambda x: factor * x.sum(0), floats)
  assert_close({key: merged[key] for key in floats}, want)
  assert merged['ids'].shape == (1, 7)
  assert merged['ids'].dtype == np.int32
  assert np.abs(merged['kernel']).max() > 0


def test_knots_without_matrices_merges_the_others():
  merged = update(dj.knots(), {'bias': np.ones((3, 4))})
  np.testing.assert_array_equal(merged['bias'], 1)


def test_paths_choose_what_is_merged_so():
  deltas = task_vectors()
  rules = [('tall', 'average')]
  tx = optax.partition(
    {'merge': dj.iso_c(), 'average': dj.average()},
    lambda tree: dj.tree.label_by_path(tree, rules, default='merge'),
  )
  want = {**merge('iso_c', deltas), 'tall': deltas['tall'].mean(0)}
  assert_close(update(tx, deltas), want)


def test_small_floats_are_merged_as_float32():
  tx = compiled(dj.tsv_m())
  small = {'w': task_vectors()['tall'].astype(jnp.bfloat16)}
  wide = tx({'w': small['w'].astype(np.float32)})['w']
  merged = tx(small)['w']
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: dj.tsv_m(np.inf), 'scale must be finite, got inf'),
    (lambda: dj.iso_c(np.nan), 'scale must be finite, got nan'),
    (lambda: dj.iso_cts(-np.inf), 'scale must be finite, got -inf'),
    (lambda: dj.iso_cts(common=1.5), r'common must be in \[0, 1\], got 1.5'),
    (lambda: dj.iso_cts(common=np.nan), 'common.*got nan'),
    (lambda: dj.iso_cts(input_axis=-1), 'input_axis must be 0 or 1, got -1'),
    (lambda: dj.wudi(0.0), 'learning_rate must be positive and finite, got 0'),
    (lambda: dj.wudi(iterations=-1), 'iterations must not be neg.*got -1'),
    (lambda: dj.wudi(solver='sgd'), "solver must be one of .*got 'sgd'"),
    (lambda: dj.wudi(ridge=-1.0), 'ridge must not be negative.*got -1.0'),
    (lambda: dj.wudi(input_axis=2), 'input_axis must be 0 or 1, got 2'),
    (lambda: dj.knots(rank=0), 'rank must be positive or None, got 0'),
    (lambda: dj.knots(input_axis='in'), "input_axis must be 0 or 1, got 'in'"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_factors_that_do_not_fit_are_all_named():
  b = {
    'p': np.ones((3, 8, 2)),
    'q': np.ones((8, 2)),
    'r': np.ones((3, 8, 2)),
  }
  a = {
    'p': np.ones((3, 1, 4)),
    'q': np.ones((2, 4)),
    's': np.ones((3, 8, 2)),
  }
  with pytest.raises(ValueError, match='factors must be') as error:
    dj.knots_lora(b, a)
  assert str(error.value).splitlines()[1:] == [
    '  p: got [3, 8, 2] and [3, 1, 4]',
    '  q: got [8, 2] and [2, 4]',
    '  r: got [3, 8, 2] and []',
    '  s: got [] and [3, 8, 2]',
  ]


MANY_LEAVES = """
import jax
import dam_jax as dj

def draw(*shape):
  keys = jax.random.split(jax.random.key(0), 40)
  return {str(i): jax.random.normal(keys[i], shape) for i in range(40)}

base, experts = draw(64, 64), draw(2, 64, 64)
merge = jax.jit(lambda *models: dj.merge(dj.tsv_m(), *models).params)
for _ in range(20):
  jax.block_until_ready(merge(base, experts))
"""


def test_leaves_that_are_decomposed_at_the_same_time_end():
  subprocess.run([sys.executable, '-c', MANY_LEAVES], check=True, timeout=120)
