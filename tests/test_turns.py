"""Merges that want whole leaves, over a mesh: no device holds the models."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax import sharding

# More of a shape than devices; split on another axis; whole on each device.
SHAPES = {
  'blocks': {str(i): (32, 40) for i in range(9)},
  'embedding': (33, 64),
  'bias': (6,),
}
MERGES = {
  'della': dj.della(),
  'della, rows': dj.della(unit_axis=0, then=dj.task_arithmetic(1.0)),
  'tsv_m': dj.tsv_m(),
  'iso_c': dj.iso_c(0.5),
  'iso_cts': dj.iso_cts(input_axis=1),
  'wudi': dj.wudi(iterations=3),
  'knots': dj.knots(others=dj.ties(0.6)),
  'knots, drawn': dj.knots(dj.dare(), others=dj.ties(0.6)),
  'sce': dj.sce(),
  'karcher': dj.karcher(),
  'model_stock': dj.model_stock(),
  'nuslerp': dj.nuslerp(),
  'ties, mergekit': dj.ties(0.3, reading='mergekit'),
  'dare, ties': dj.dare(then=dj.ties(0.6)),
  'breadcrumbs': dj.breadcrumbs(unit_axis=-1),
  'breadcrumbs, ties': dj.breadcrumbs(0.4, then=dj.ties(0.6, merge='sum')),
}
ENTRYWISE = {
  'pcb': dj.pcb(),
  'pcb, code': dj.pcb(0.3, 0.7, reading='code'),
  'ties': dj.ties(0.3),
  'consensus, ties': dj.consensus(then=dj.ties(merge='sum')),
}
PLACEWISE = {
  'average': dj.average(),
  'dare': dj.dare(),
  'dare, mergekit': dj.dare(rescale='l1'),
}


def models(shapes, num=3):
  """Returns a base and experts, and both placed on a mesh of eight."""
  rng, mesh = np.random.default_rng(0), sharding.make_mesh()
  base = jax.tree.map(
    lambda shape: np.float32(rng.normal(size=shape)),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  base['step'] = np.int32(3)
  experts = jax.tree.map(
    lambda x: x[None] + rng.normal(size=(num, *x.shape)).astype(x.dtype), base
  )
  placed = (
    sharding.put(base, mesh, sharding.fsdp(base, mesh)),
    sharding.put(experts, mesh, sharding.fsdp(experts, mesh, leading=1)),
  )
  return mesh, base, experts, placed


def run(tx, mesh, placed):
  """Returns the merged model, and the compiled program."""
  merger = dj.data_parallel(dj.from_transform(tx), mesh)
  state = merger.init(jax.random.key(0), *placed)
  compiled = merger.finalize.lower(state, *placed).compile()
  return compiled(state, *placed), compiled


def assert_close(got, want):
  for (path, x), y in zip(
    dj.tree.flatten(want).items(), jax.tree.leaves(got), strict=True
  ):
    assert x.dtype == y.dtype
    # The factors of iso_cts nearly repeat, which makes rounding 4e-5.
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4, err_msg=path)


def sends(compiled):
  """Returns what a program sends between devices: shapes and kinds."""
  return re.findall(
    r'= (.*) (all-[a-z-]+|collective-\w+|reduce-scatter)\(', compiled.as_text()
  )


@pytest.mark.parametrize('name', [*MERGES, *ENTRYWISE, *PLACEWISE])
def test_merges_where_the_models_lie(name):
  tx = (MERGES | ENTRYWISE | PLACEWISE)[name]
  mesh, base, experts, placed = models(SHAPES, 2 if name == 'nuslerp' else 3)
  merged, compiled = run(tx, mesh, placed)
  assert_close(merged, dj.merge(tx, base, experts).params)
  assert merged['blocks']['0'].sharding.shard_shape((32, 40)) == (4, 40)
  sent = sends(compiled)
  assert {kind for _, kind in sent} <= {'all-reduce', 'all-to-all'}
  moved = [shape for shape, kind in sent if kind == 'all-to-all']
  assert bool(moved) == (name in MERGES)
  for shape in moved:
    parts = re.findall(r'f32\[([\d,]+)\]', shape)
    sizes = [math.prod(map(int, part.split(','))) for part in parts]
    assert sum(sizes) <= 3 * 33 * 64


def test_what_wants_whole_leaves_is_said():
  for tx in MERGES.values():
    plan = dj.from_transform(tx).plan
    assert (plan.entrywise, plan.leafwise) == (False, True)
  for tx in ENTRYWISE.values():
    plan = dj.from_transform(tx).plan
    assert (plan.entrywise, plan.leafwise) == (True, True)
  for tx in PLACEWISE.values():
    assert dj.from_transform(tx).plan.placewise
  # A leaf alone has no path.
  tx = optax.partition({'x': dj.tsv_m()}, {'w': 'x'})
  assert not dj.from_transform(tx).plan.leafwise


def test_parts_are_merged_where_they_lie():
  mesh, base, experts, placed = models(SHAPES)
  rules = [('blocks/[0-3]', 'tsv_m'), ('blocks/.*', 'ties'), ('bias', 'keep')]
  labels = dj.tree.label_by_path(base, rules, default='rest')
  txs = {
    'tsv_m': dj.tsv_m(),
    'ties': dj.ties(0.3),
    'keep': dj.keep_base(),
    'rest': dj.dare(then=dj.ties()),
  }
  mergers = {
    label: dj.data_parallel(dj.from_transform(tx), mesh)
    for label, tx in txs.items()
  }
  merger = dj.partition(mergers, labels)
  state = merger.init(jax.random.key(0), *placed)
  compiled = jax.jit(merger.finalize).lower(state, *placed).compile()
  merged = compiled(state, *placed)
  want = dj.merge(optax.partition(txs, labels), base, experts).params
  assert_close(merged, want)
  assert merged['embedding'].sharding.shard_shape((33, 64)) == (33, 8)
  kinds = {kind for _, kind in sends(compiled)}
  assert kinds == {'all-reduce', 'all-to-all'}


def test_halves_stay_halves():
  mesh, base, experts, _ = models({'w': (64, 32), 'v': (32, 16)})
  low = [
    jax.tree.map(
      lambda x: jnp.asarray(x, jnp.bfloat16) if dj.tree.is_float(x) else x, x
    )
    for x in (base, experts)
  ]
  tx = dj.iso_c()
  merged, _ = run(tx, mesh, low)
  want = dj.merge(tx, *low).params
  for path, x in dj.tree.flatten(want).items():
    got = dj.tree.flatten(merged)[path]
    assert got.dtype == x.dtype
    np.testing.assert_allclose(
      np.float32(got), np.float32(x), rtol=1e-2, atol=1e-2
    )
