"""Merges over a mesh and over `jax.pmap`: the same whatever the layout."""

import functools
import math
import re

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import parallel
from dam_jax import sharding
from dam_jax.masks import Mask
from dam_jax.perturbations import Seeds
from dam_jax.perturbations import SoftPatch

SHAPE = (4, 4, 3)
STEPS = 3
TOLERANCES = {'rtol': 1e-4, 'atol': 1e-5}
RULES = (('kernel', P(None, 'model')), ('bias|gain', P('model')))
LAYOUTS = {
  '8 x 1': ({'data': 8}, {}),
  '4 x 2': ({'data': 4, 'model': 2}, {'rules': RULES}),
  '2 x 4': ({'data': 2, 'model': 4}, {}),
  '8 x 1, replicated': ({'data': 8}, {'shard_state': False}),
  '2 x 4, replicated': (
    {'data': 2, 'model': 4},
    {'shard_state': False, 'rules': RULES},
  ),
}


def _seeds():
  shape = (1, 3, *SHAPE[:2])
  patches = SoftPatch(jnp.full((*shape, 1), -2.0), jnp.zeros((*shape, 3)))
  points = jnp.ones((1, 3, 2, 2, 2))
  classes = jnp.array([[1, 2, 0]], jnp.int32)
  shunned = jnp.array([[-1, 2, 0], [3, -1, 1]], jnp.int32)
  return Seeds(patches, classes, points, shunned)


MERGES = {
  'adamerging': functools.partial(dj.adamerging, steps=STEPS),
  'concrete': functools.partial(dj.concrete, steps=2, coefficient_steps=1),
  'dam_released': functools.partial(
    dj.dam_released, image_shape=SHAPE, steps=2, coefficient_steps=1
  ),
  'dam_paper': functools.partial(
    dj.dam_paper, image_shape=SHAPE, steps=2, coefficient_steps=1
  ),
  'dam_paper, exact': functools.partial(
    dj.dam_paper,
    image_shape=SHAPE,
    inner_gradient='exact',
    shared_mask=Mask(per_task=True, tx=optax.adam(1e-2)),
    steps=STEPS,
    coefficient_steps=0,
  ),
  'dam_robust': functools.partial(
    dj.dam_robust,
    image_shape=SHAPE,
    area=3.0,
    ascents=2,
    restarts=2,
    warmup_ascents=2,
    seeds=_seeds(),
    steps=2,
  ),
}
REPAIRS = {
  'repo_awm': functools.partial(
    dj.repo_awm, image_shape=SHAPE, num_tasks=3, steps=STEPS
  ),
  'repo_sau': functools.partial(
    dj.repo_sau, image_shape=SHAPE, num_tasks=3, steps=STEPS
  ),
}
ALL = MERGES | REPAIRS
# Each merge on one layout: all layouts see one.
ON_MESH = [*zip(ALL, [*LAYOUTS, *LAYOUTS], strict=False)]


@pytest.fixture(scope='module')
def tiny(tiny):
  """The same in float32: each device rounds its gradients to bfloat16."""

  def wide(x):
    return x.astype(jnp.float32) if dj.tree.is_float(x) else x

  return tiny._replace(
    base=jax.tree.map(wide, tiny.base), experts=jax.tree.map(wide, tiny.experts)
  )


def experts_of(name, tiny):
  """Returns the experts, or the merged model alone where that is repaired."""
  if name in MERGES:
    return tiny.experts
  merged = dj.merge(dj.average(), tiny.base, tiny.experts).params
  return dj.tree.stack([merged])


def batches(merger, tiny):
  whole = tiny.batch(merger.plan.phases * STEPS, size=16)
  return [jax.tree.map(lambda x, i=i: x[i::STEPS], whole) for i in range(STEPS)]


def learn(merger, tiny, base, experts, split=lambda batch: batch):
  """Takes all steps; returns the merged model, the state and all metrics."""
  state, measured = merger.init(jax.random.key(5), base, experts), []
  for batch in batches(merger, tiny):
    state, metrics = merger.step(state, base, experts, split(batch))
    measured.append(metrics)
  return merger.finalize(state, base, experts), state, measured


@pytest.fixture(scope='module')
def alone(tiny):
  """What each merge learns on one device."""

  @functools.cache
  def run(name):
    merger = ALL[name](tiny.logits_fn)
    merger = merger._replace(step=jax.jit(merger.step))
    return learn(merger, tiny, tiny.base, experts_of(name, tiny))

  return run


def assert_close(got, want, **tolerances):
  for (path, x), y in zip(
    dj.tree.flatten(want).items(), jax.tree.leaves(got), strict=True
  ):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(y, x, **tolerances, err_msg=path)


@pytest.mark.parametrize(('name', 'layout'), ON_MESH)
def test_what_is_learned_does_not_depend_on_the_mesh(name, layout, tiny, alone):
  sizes, options = LAYOUTS[layout]
  mesh = sharding.make_mesh(sizes)
  merger = dj.data_parallel(ALL[name](tiny.logits_fn), mesh, **options)
  experts = experts_of(name, tiny)
  merged, state, measured = learn(merger, tiny, tiny.base, experts)
  want, _, metrics = alone(name)
  assert_close(merged, want, **TOLERANCES)
  assert_close(measured, metrics, **TOLERANCES)
  rows = [x for x in jax.tree.leaves(state) if x.ndim > 1 and x.shape[-2] == 8]
  assert bool(rows) == (name != 'adamerging' and 'replicated' not in layout)
  for x in rows:
    assert x.addressable_shards[0].data.shape[-2] == 1


@pytest.mark.parametrize('name', ['dam_paper, exact', 'dam_robust'])
def test_pmap_learns_the_same(name, tiny, alone):
  merger = dj.pmap_form(ALL[name](tiny.logits_fn))
  merged, _, measured = learn(
    merger,
    tiny,
    tiny.base,
    experts_of(name, tiny),
    lambda batch: dj.split_batch(batch, 8),
  )
  want, _, metrics = alone(name)
  assert_close(merged, want, **TOLERANCES)
  for got in measured:
    for x in got.values():
      np.testing.assert_array_equal(x, jnp.broadcast_to(x[:1], x.shape))
  first = jax.tree.map(lambda x: x[0], measured)
  assert_close(first, metrics, **TOLERANCES)


def test_explicit_axes_and_placed_models(tiny, alone):
  mesh = sharding.make_mesh({'data': 4, 'model': 2}, explicit=True)
  merger = dj.data_parallel(ALL['concrete'](tiny.logits_fn), mesh)
  base, experts = sharding.place(tiny.base, tiny.experts, mesh)
  assert experts.vector.addressable_shards[0].data.shape[:2] == (3, 1)

  def split(batch):
    spec = P(None, None, 'data')
    return sharding.put(batch, mesh, jax.tree.map(lambda _: spec, batch))

  merged, _, measured = learn(merger, tiny, base, experts, split)
  want, _, metrics = alone('concrete')
  assert_close(merged, want, **TOLERANCES)
  assert_close(measured, metrics, **TOLERANCES)


def _nnx():
  models = [
    nnx.Sequential(nnx.Linear(48, 8, rngs=nnx.Rngs(seed)), nnx.tanh)
    for seed in range(4)
  ]

  def apply_fn(params, inputs):
    model = nnx.clone(models[0])
    nnx.update(model, params)
    return model(inputs)

  params = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in models]
  return params, apply_fn


def _equinox():
  models = [
    eqx.nn.MLP(48, 8, width_size=16, depth=1, key=jax.random.key(seed))
    for seed in range(4)
  ]
  split = [eqx.partition(model, eqx.is_array) for model in models]
  params, (static, *_) = zip(*split, strict=True)

  def apply_fn(params, inputs):
    return jax.vmap(jax.vmap(eqx.combine(params, static)))(inputs)

  return params, apply_fn


@pytest.mark.parametrize('models', [_nnx, _equinox])
def test_models_of_other_libraries_learn_over_a_mesh(models):
  (base, *experts), apply_fn = models()
  experts = dj.tree.stack(experts)

  def logits_fn(params, images):
    return apply_fn(params, images.reshape(*images.shape[:2], -1))

  merger = dj.concrete(logits_fn, steps=2, coefficient_steps=0)
  state = merger.init(jax.random.key(1), base, experts)
  batch = dj.Batch(
    jax.random.uniform(jax.random.key(2), (merger.plan.phases, 3, 16, *SHAPE))
  )
  state, _ = jax.jit(merger.step)(state, base, experts, batch)
  want = merger.finalize(state, base, experts)

  split = dj.data_parallel(merger, sharding.make_mesh({'data': 4, 'model': 2}))
  state = split.init(jax.random.key(1), base, experts)
  state, _ = split.step(state, base, experts, batch)
  got = split.finalize(state, base, experts)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert_close(got, want, **TOLERANCES)


@pytest.mark.parametrize(('old', 'new'), [(8, 4), (4, 8), (8, 1), (1, 8)])
def test_a_state_goes_on_on_a_mesh_of_another_size(
  tiny, alone, tmp_path, old, new
):
  name = 'dam_paper'
  merger = ALL[name](tiny.logits_fn)
  first, *rest = batches(merger, tiny)

  def on(num):
    mesh = sharding.make_mesh(devices=jax.devices()[:num])
    spread = dj.data_parallel(merger, mesh)
    return mesh, spread, spread.init(key, tiny.base, tiny.experts)

  key = jax.random.key(5)
  _, spread, state = on(old)
  state, _ = spread.step(state, tiny.base, tiny.experts, first)
  with checkpoint.Saves(tmp_path) as saves:
    saves.save(1, state, {'loss': np.zeros(1)})
  mesh, spread, like = on(new)
  layout = dj.tree.layout_of(tiny.base, shards=new)
  with checkpoint.Saves(tmp_path) as saves:
    state = parallel.restore(saves, like, layout, mesh).state
  for x, y in zip(*map(jax.tree.leaves, (state, like)), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  for batch in rest:
    state, _ = spread.step(state, tiny.base, tiny.experts, batch)
  merged = spread.finalize(state, tiny.base, tiny.experts)
  assert_close(merged, alone(name)[0], **TOLERANCES)


def test_many_steps_compile_once_and_donate(tiny):
  traces = 0

  def logits_fn(params, images):
    nonlocal traces
    traces += 1
    return tiny.logits_fn(params, images)

  mesh = sharding.make_mesh()
  merger = dj.data_parallel(dj.adamerging(logits_fn, steps=9), mesh)
  base, experts = sharding.place(tiny.base, tiny.experts, mesh)
  states = [merger.init(jax.random.key(0), base, experts)]
  batch = tiny.batch(merger.plan.phases, size=8)
  seen = []
  for _ in range(3):
    states.append(merger.step(states[-1], base, experts, batch)[0])
    seen.append(traces)
  assert seen[0] == seen[-1]
  assert all(s.coefficients.is_deleted() for s in states[:-1])
  for a, b in zip(*map(jax.tree.leaves, (states[0], states[-1])), strict=True):
    assert (a.sharding, a.dtype) == (b.sharding, b.dtype)
  run = dj.scan_steps(merger)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
  scanned, _ = run(states[-1], base, experts, None, two)
  assert scanned.count == 5


def test_a_step_gathers_the_merged_weights_alone(tiny):
  mesh = sharding.make_mesh()
  merger = dj.data_parallel(ALL['dam_paper'](tiny.logits_fn), mesh)
  base, experts = sharding.place(tiny.base, tiny.experts, mesh)
  state = merger.init(jax.random.key(0), base, experts)
  batch = tiny.batch(merger.plan.phases, size=8)
  text = merger.step.lower(state, base, experts, batch).compile().as_text()
  shapes = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather\(', text)
  sizes = [math.prod(map(int, shape.split(','))) for shape in shapes]
  assert max(sizes) == math.prod(base.layout.shape)
  # The inner phase, the adversary, each mask, and two where masks are done.
  assert len(sizes) <= 6


def test_half_precision_rounds_the_weights_of_forward_passes_alone(tiny):
  mesh = sharding.make_mesh()
  plain = dj.adamerging(tiny.logits_fn, tx=optax.sgd(0.0), steps=1)
  merger = dj.data_parallel(plain, mesh, forward_dtype=jnp.bfloat16)
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  batch = tiny.batch(merger.plan.phases, size=8)
  merged = merger.finalize(state, tiny.base, tiny.experts)
  want = dj.merge(dj.task_arithmetic(0.3), tiny.base, tiny.experts).params
  assert_close(merged, want, rtol=1e-6, atol=1e-7)
  _, metrics = merger.step(state, tiny.base, tiny.experts, batch)

  def loss(params):
    logits = tiny.logits_fn(params, batch.images[0])
    return dj.losses.entropy(logits).mean(axis=1)

  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(x.dtype), merged
  )
  got = metrics['coefficients/loss']
  np.testing.assert_allclose(got, loss(rounded), rtol=1e-5)
  assert abs(got - loss(merged)).max() > 1e-5


def _two_leaves(width):
  """Returns a base, three experts, and both placed on a mesh of eight."""
  mesh, rng = sharding.make_mesh(), np.random.default_rng(0)
  base = {'w': (64, 48), 'b': (width,)}
  base = {k: np.float32(rng.normal(size=x)) for k, x in base.items()}
  experts = jax.tree.map(
    lambda x: x[None] + np.float32(rng.normal(size=(3, *x.shape))), base
  )
  placed = (
    sharding.put(base, mesh, sharding.fsdp(base, mesh)),
    sharding.put(experts, mesh, sharding.fsdp(experts, mesh, leading=1)),
  )
  return mesh, base, experts, placed


@pytest.mark.parametrize('width', [16, 5])
@pytest.mark.parametrize(
  'tx', [dj.task_arithmetic(0.3), dj.ties(0.3, 0.5)], ids=['sum', 'ties']
)
def test_merges_without_steps_give_the_same(tx, width):
  mesh, base, experts, placed = _two_leaves(width)
  merger = dj.data_parallel(dj.from_transform(tx), mesh)
  merged = merger.finalize(merger.init(None, *placed), *placed)
  assert_close(merged, dj.merge(tx, base, experts).params, rtol=1e-6)
  assert merged['w'].addressable_shards[0].data.shape == (8, 48)
  raveled = sharding.place(base, experts, mesh)
  merged = merger.finalize(merger.init(None, *raveled), *raveled)
  assert_close(merged, dj.merge(tx, base, experts).params, rtol=1e-6)


def _sent(tx, placed, mesh):
  """Returns what devices send each other in a merge, by kind and shape."""
  merger = dj.data_parallel(dj.from_transform(tx), mesh)
  lowered = merger.finalize.lower(merger.init(None, *placed), *placed)
  text = lowered.compile().as_text()
  sent = re.findall(r'= (\S+) (all-\w+|collective\S*|reduce-scatter)\(', text)
  return {(re.sub(r'\{.*', '', shape), kind) for shape, kind in sent}


def test_merges_without_steps_stay_where_they_are():
  mesh, _, _, placed = _two_leaves(16)
  # Bins of counts, and how many more entries are positive than negative.
  assert _sent(dj.ties(), placed, mesh) == {
    ('s64[3,65536]', 'all-reduce'),
    ('s64[]', 'all-reduce'),
  }


@pytest.mark.parametrize(
  'tx',
  [
    dj.ties(scope='leaf', reading='mergekit'),
    dj.dare(),
    dj.breadcrumbs(),
    dj.sce(),
    dj.emr(),
    dj.consensus(),
    dj.model_stock(),
    dj.karcher(),
  ],
  ids=['ties', 'dare', 'crumbs', 'sce', 'emr', 'consensus', 'stock', 'karcher'],
)
def test_merges_by_leaf_send_sums_alone(tx):
  mesh, base, experts, placed = _two_leaves(16)
  placed = [{'w': x['w']} for x in placed]
  for shape, kind in _sent(tx, placed, mesh):
    # Sums over a leaf, by task or pair of tasks, and bins of counts.
    size = math.prod(map(int, re.findall(r'\d+', shape)[1:]))
    assert kind == 'all-reduce'
    assert size <= 9 or size == 65536, shape
  merger = dj.data_parallel(dj.from_transform(tx), mesh)
  merged = merger.finalize(merger.init(None, *placed), *placed)
  want = dj.merge(tx, {'w': base['w']}, {'w': experts['w']}).params
  assert_close(merged, want, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(tiny):
  mesh = sharding.make_mesh()
  merger = dj.data_parallel(dj.adamerging(tiny.logits_fn, steps=1), mesh)
  state = merger.init(jax.random.key(0), tiny.base, tiny.experts)
  batch = tiny.batch(merger.plan.phases, size=6)
  with pytest.raises(ValueError, match='6 images a task do not divide over 8'):
    merger.step(state, tiny.base, tiny.experts, batch)
  with pytest.raises(ValueError, match='6 images a task do not divide over 8'):
    dj.split_batch(batch, 8)
  with pytest.raises(ValueError, match='its step takes no axis_name'):
    dj.pmap_form(dj.from_transform(dj.average()))
