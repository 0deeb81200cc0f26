"""The contract that every merge without data passes, from one table."""

from collections.abc import Callable
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import dam_jax as dj


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """What the contract needs to know about one merge.

  Attributes:
    tx: the transformation.
    num: number of experts.
    sweep: from a numeric hyper-parameter to the transformation, if it has one.
    permuted: the transformation for experts in another order; None where the
      draws depend on it.
    same: a transformation of this kind that gives the expert which all are.
    tolerance: in roundings of a leaf's dtype; decompositions have many.
  """

  tx: optax.GradientTransformation
  num: int = 3
  sweep: Callable | None = None
  permuted: Callable | None = None
  same: optax.GradientTransformation | None = None
  tolerance: int = 16

  @functools.cached_property
  def traces(self):
    """One entry for each time that `merge` was traced."""
    return []

  @functools.cached_property
  def compiled(self):
    def merge(base, experts, state):
      self.traces.append(None)
      return dj.merge(self.tx, base, experts, state=state)

    return jax.jit(merge)

  def merge(self, base, experts, state=None):
    """Merges in the one program that all tests of the method share."""
    state = self.tx.init(BASE) if state is None else state
    return self.compiled(base, experts, state)


def symmetric(tx, **options):
  return Method(tx=tx, permuted=lambda order: tx, **options)


def weighted(weights, *, normalize):
  def make(order):
    return dj.weighted_average(weights[order], normalize=normalize)

  tx = make(np.arange(3))
  return Method(tx=tx, permuted=make, same=tx)


def ties(merge, scope):
  make = functools.partial(dj.ties, merge=merge, scope=scope)
  return symmetric(
    make(0.5, 0.4),
    sweep=functools.partial(make, 0.5),
    same=make(1.0, 1 / 3 if merge == 'sum' else 1.0),
  )


def spectral(tx, tolerance=256, **options):
  # An SVD's error is some roundings of the largest singular value, about ten
  # times an entry here, and two follow one another.
  return symmetric(tx, tolerance=tolerance, **options)


def partition(scale):
  def label(params):
    rules = [('.*head.*', 'keep')]
    return dj.tree.label_by_path(params, rules, default='merge')

  return optax.partition(
    {'merge': dj.task_arithmetic(scale), 'keep': dj.keep_base()}, label
  )


def precise(order=(0, 1, 2), *, epsilon=0.1):
  rng = np.random.default_rng(9)
  precisions = {
    'body': {
      'kernel': rng.uniform(size=(3, 16, 3)),
      'bias': rng.uniform(size=(3, 8)),
    },
    'head': rng.uniform(size=(3, 16, 3)),
    'step': np.zeros((3, 2)),
  }
  return dj.weighted.precision_weighted(
    jax.tree.map(
      lambda x: jnp.asarray(x[np.array(order)], jnp.float32), precisions
    ),
    epsilon=epsilon,
    normalize=True,
  )


def regressed(order=(0, 1, 2), *, scale=0.5):
  rng = np.random.default_rng(9)
  inputs = {
    path: rng.normal(size=(3, 40, size))[np.array(order)]
    for path, size in {'body/kernel': 16, 'head': 16}.items()
  }
  grams = {
    path: jnp.asarray(np.einsum('kni,knj->kij', x, x), jnp.float32)
    for path, x in inputs.items()
  }
  return dj.weighted.gram_weighted(grams, scale=scale)


METHODS = {
  'average': symmetric(dj.average(), same=dj.average()),
  'weighted_average': weighted(np.array([3.0, 2.0, 1.0]), normalize=True),
  'weighted_sum': weighted(np.array([0.5, 0.25, 0.25]), normalize=False),
  'task_arithmetic': symmetric(
    dj.task_arithmetic(0.3),
    sweep=dj.task_arithmetic,
    same=dj.task_arithmetic(1 / 3),
  ),
  'ties': ties('mean', 'model'),
  'ties_leaf': ties('mean', 'leaf'),
  'ties_sum': ties('sum', 'model'),
  'ties_max': symmetric(dj.ties(0.25, merge='max'), sweep=dj.ties),
  'dare': Method(tx=dj.dare(0.5, 0.3), sweep=dj.dare),
  'dare_ties': Method(
    tx=dj.dare(0.5, rescale=False, seed=1, then=dj.ties(0.5))
  ),
  'slerp': Method(
    tx=dj.slerp(0.25),
    num=2,
    sweep=dj.slerp,
    permuted=lambda order: dj.slerp(0.25 if order[0] == 0 else 0.75),
    same=dj.slerp(0.25),
  ),
  'tsv_m': spectral(dj.tsv_m(), sweep=dj.tsv_m),
  'iso_c': spectral(dj.iso_c(), sweep=dj.iso_c),
  'iso_cts': spectral(
    dj.iso_cts(common=0.5),
    sweep=lambda scale: dj.iso_cts(scale, 0.5),
  ),
  'wudi': spectral(
    dj.wudi(), sweep=lambda rate: dj.wudi(rate / 1000, iterations=3)
  ),
  'wudi_exact': spectral(
    dj.wudi(solver='exact', others=dj.average()),
    sweep=lambda ridge: dj.wudi(solver='exact', ridge=ridge),
    same=dj.wudi(solver='exact', others=dj.average()),
  ),
  'knots': spectral(
    dj.knots(),
    tolerance=4096,  # singular vectors of nearly equal singular values turn
    sweep=lambda density: dj.knots(dj.ties(density)),
    same=dj.knots(dj.ties(1.0)),
  ),
  'knots_dare': Method(
    tx=dj.knots(dj.dare(0.5, 1.0), scaled=True), tolerance=256
  ),
  'nuslerp': Method(
    tx=dj.nuslerp([3.0, 1.0]),
    num=2,
    sweep=lambda w: dj.nuslerp([1 - w, w]),
    permuted=lambda order: dj.nuslerp([[3.0, 1.0][i] for i in order]),
    same=dj.nuslerp(),
  ),
  'karcher': Method(
    tx=dj.karcher([3.0, 2.0, 1.0]),
    permuted=lambda order: dj.karcher([[3.0, 2.0, 1.0][i] for i in order]),
    same=dj.karcher(),
  ),
  'model_stock': symmetric(dj.model_stock(), same=dj.model_stock()),
  'della': Method(
    tx=dj.della(0.5, 0.4), sweep=functools.partial(dj.della, 0.5)
  ),
  'breadcrumbs': symmetric(
    dj.breadcrumbs(0.5, gamma=0.1),
    sweep=dj.breadcrumbs,
    same=dj.breadcrumbs(1.0, 1 / 3),
  ),
  'magmax': symmetric(dj.magmax(), sweep=dj.magmax, same=dj.magmax(1.0)),
  'sce': symmetric(dj.sce(0.5), sweep=dj.sce, same=dj.sce(1.0)),
  'pcb': symmetric(dj.pcb(0.5), sweep=dj.pcb, same=dj.pcb(1.0)),
  'consensus': symmetric(
    dj.consensus(), sweep=dj.consensus, same=dj.consensus(0.4, 1 / 3)
  ),
  'emr': symmetric(dj.emr(), same=dj.emr()),
  'partition': symmetric(partition(0.3), sweep=partition),
  'precision_weighted': Method(
    tx=precise(),
    sweep=lambda epsilon: precise(epsilon=epsilon),
    permuted=precise,
    same=precise(),
  ),
  'gram_weighted': Method(
    tx=regressed(),
    sweep=lambda scale: regressed(scale=scale),
    permuted=regressed,
    same=regressed(),
  ),
}


@pytest.fixture(params=METHODS)
def method(request):
  return METHODS[request.param]


OF_A_TREE = ('partition', 'precision_weighted', 'gram_weighted')


def those_with(field):
  """Runs a test for the methods of which this field is known."""
  names = [n for n, m in METHODS.items() if getattr(m, field) is not None]
  return pytest.mark.parametrize('method', names, indirect=True)


def make_params(seed):
  """Returns parameters of three kinds and two floating-point dtypes."""
  rng = np.random.default_rng(seed)
  return {
    'body': {
      'kernel': jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
      'bias': jnp.asarray(rng.normal(size=8), jnp.bfloat16),
    },
    'head': jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
    'step': jnp.array([seed, 7]),
  }


BASE = make_params(0)
EXPERTS = {
  num: dj.tree.stack([make_params(1 + k) for k in range(num)]) for num in (2, 3)
}


def assert_close(got, want, roundings=16):
  """Raises unless types agree, and values up to some roundings."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    exact = not jnp.issubdtype(g.dtype, jnp.floating)
    tolerance = 0 if exact else roundings * float(jnp.finfo(g.dtype).eps)
    np.testing.assert_allclose(
      np.asarray(g, np.float64),
      np.asarray(w, np.float64),
      rtol=tolerance,
      atol=tolerance,
    )


def test_jit_gives_what_eager_gives(method):
  experts = EXPERTS[method.num]
  eager = dj.merge(method.tx, BASE, experts).params
  assert_close(method.merge(BASE, experts).params, eager, method.tolerance)
  moved = eager['body']['kernel'] - BASE['body']['kernel']
  assert jnp.abs(moved).max() > 0.1


def test_compiles_once_for_new_values_and_states(method):
  experts = EXPERTS[method.num]
  state = method.merge(BASE, experts).state
  before = len(method.traces)
  twice = jax.tree.map(lambda x: x + x, experts)
  method.merge(make_params(5), twice, state)
  assert len(method.traces) == before


@those_with('sweep')
def test_vmap_over_a_hyperparameter_gives_what_a_loop_gives(method):
  def merge(value):
    return dj.merge(method.sweep(value), BASE, EXPERTS[method.num]).params

  values, single = jnp.array([0.25, 0.75]), jax.jit(merge)
  swept = jax.jit(jax.vmap(merge))(values)
  for i, value in enumerate(values):
    one = jax.tree.map(lambda x, i=i: x[i], swept)
    assert_close(one, single(value), method.tolerance)


def test_keeps_structure_dtypes_and_integers(method):
  merged = method.merge(BASE, EXPERTS[method.num]).params
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, BASE)
  np.testing.assert_array_equal(merged['step'], BASE['step'])
  assert not any(x.weak_type for x in jax.tree.leaves(merged))


def test_state_keeps_its_type(method):
  before = jax.eval_shape(method.tx.init, BASE)
  after = jax.eval_shape(method.merge, BASE, EXPERTS[method.num]).state
  assert after == before


def test_shapes_need_no_arrays(method):
  base, experts = jax.eval_shape(lambda: (BASE, EXPERTS[method.num]))
  state = jax.eval_shape(method.tx.init, base)
  assert state == jax.eval_shape(lambda: method.tx.init(BASE))
  assert jax.eval_shape(method.merge, base, experts).params == base


def test_no_task_vectors_give_the_base_bit_for_bit(method):
  experts = dj.tree.stack([BASE] * method.num)
  chex.assert_trees_all_equal(method.merge(BASE, experts).params, BASE)


def test_degenerate_task_vectors_stay_finite(method):
  def degrade(path, b):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    d = jnp.full_like(b, name == 'head')
    if name == 'body/kernel':  # opposite, of rank one, and to zero weights
      d = -b
    return jnp.stack([b + d, b - d, b + d][: method.num])

  experts = jax.tree_util.tree_map_with_path(degrade, BASE)
  for x in jax.tree.leaves(method.merge(BASE, experts).params):
    assert jnp.isfinite(x).all()


@those_with('same')
def test_identical_experts_give_that_expert(method):
  expert = make_params(1)
  merged = dj.merge(method.same, BASE, dj.tree.stack([expert] * method.num))
  want = {**expert, 'step': BASE['step']}
  assert_close(merged.params, want, method.tolerance)


@those_with('permuted')
def test_order_of_experts_does_not_matter(method):
  experts, order = EXPERTS[method.num], np.roll(np.arange(method.num), 1)
  rolled = jax.tree.map(lambda x: x[order], experts)
  tx = method.permuted(order)
  merge = method.merge if tx is method.tx else functools.partial(dj.merge, tx)
  assert_close(
    merge(BASE, rolled).params,
    method.merge(BASE, experts).params,
    method.tolerance,
  )


def test_extra_arguments_are_accepted(method):
  experts = EXPERTS[method.num]
  plain = jax.make_jaxpr(lambda b, e: dj.merge(method.tx, b, e))
  extra = jax.make_jaxpr(lambda b, e: dj.merge(method.tx, b, e, loss=1.0))
  assert str(extra(BASE, experts)) == str(plain(BASE, experts))


def test_sharded_gives_what_one_device_gives(method):
  mesh = jax.make_mesh(
    (8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def shard(params, *lead):
    def place(x):
      split = 'model' if x.shape[len(lead)] % 8 == 0 else None
      return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*lead, split)))

    return jax.tree.map(place, params)

  experts = EXPERTS[method.num]
  sharded = method.merge(shard(BASE), shard(experts, None)).params
  assert len(sharded['body']['kernel'].sharding.device_set) == 8
  single = method.merge(BASE, experts).params
  assert_close(sharded, single, method.tolerance)


def test_leaf_by_leaf_gives_what_the_whole_gives(method):
  if any(method is METHODS[name] for name in OF_A_TREE):
    pytest.skip('it knows leaves by their path, which a leaf alone has not')
  experts = dj.tree.unstack(EXPERTS[method.num])
  assert_close(
    dj.streaming.merge(method.tx, BASE, experts),
    method.merge(BASE, EXPERTS[method.num]).params,
    method.tolerance,
  )


def test_partition_keeps_the_base_where_it_should():
  experts = EXPERTS[3]
  merged = dj.merge(partition(0.3), BASE, experts).params
  plain = dj.merge(dj.task_arithmetic(0.3), BASE, experts).params
  np.testing.assert_array_equal(merged['head'], BASE['head'])
  chex.assert_trees_all_equal(merged['body'], plain['body'])


def test_weighted_average_normalizes_unless_told():
  base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.0], [4.0]])}

  def merge(**options):
    tx = dj.weighted_average([0.5, 1.5], **options)
    return dj.merge(tx, base, experts).params['w']

  assert merge() == pytest.approx(3.5)
  assert merge(normalize=False) == pytest.approx(7.0)


def test_slerp_is_on_the_sphere_and_linear_between_parallels():
  base = {'w': jnp.array([3.0, -1.0])}

  def angle(a):
    return jnp.array([np.cos(a), np.sin(a)], jnp.float32)

  def merge(t, *models):
    return dj.merge(dj.slerp(t), base, {'w': jnp.stack(models)}).params['w']

  merged = merge(0.3, angle(0.2), angle(1.2))
  np.testing.assert_allclose(merged, angle(0.5), rtol=1e-5)
  merged = merge(0.3, angle(0.2), 3 * angle(0.2))
  np.testing.assert_allclose(merged, 1.6 * angle(0.2), rtol=1e-5)
  merged = merge(0.25, jnp.zeros(2), angle(0.2))
  np.testing.assert_allclose(merged, 0.25 * angle(0.2), rtol=1e-5)


def deviation(kept, rate):
  """Returns by how many deviations a share kept departs from `1 - rate`."""
  return abs(np.mean(kept) - (1 - rate)) / np.sqrt(
    rate * (1 - rate) / np.size(kept)
  )


@pytest.mark.parametrize('seed', range(5))
def test_dare_drops_at_its_rate_and_no_other(seed):
  deltas = {'a': jnp.ones((2, 40, 500)), 'b': jnp.ones((2, 20_000))}
  tx = dj.transforms.drop(0.3, seed=seed)
  first, state = tx.update(deltas, tx.init(deltas))
  second, _ = tx.update(deltas, state)
  draws = [
    np.asarray(x[k]).ravel()
    for updates in (first, second)
    for x in updates.values()
    for k in range(2)
  ]
  for x in draws:
    kept = x != 0
    np.testing.assert_allclose(x[kept], 1 / 0.7, rtol=1e-6)
    assert deviation(kept, 0.3) < 4
    assert deviation(kept, 0.33) > 4
    assert deviation(kept, 0.27) > 4
  # Steps, leaves and experts are drawn apart.
  correlation = np.corrcoef(np.stack(draws) != 0)
  assert np.abs(correlation - np.eye(len(draws))).max() < 5 / np.sqrt(20_000)


def test_dare_seeds_differ_and_repeat():
  def merge(seed):
    return dj.merge(dj.dare(seed=seed), BASE, EXPERTS[3]).params

  chex.assert_trees_all_equal(merge(0), merge(0))
  assert (merge(0)['head'] != merge(1)['head']).any()


def test_dare_rescales_unless_told_and_then_merges():
  def moved(**options):
    merged = dj.merge(dj.dare(0.5, 1.0, **options), BASE, EXPERTS[3]).params
    return merged['head'] - BASE['head']

  np.testing.assert_allclose(moved(), 2 * moved(rescale=False), atol=1e-5)
  np.testing.assert_allclose(moved(then=dj.average()), moved() / 3, atol=1e-5)


def test_what_merges_in_place_of_the_default():
  """`then` reads what was sparsified, and its state is kept."""
  experts = EXPERTS[3]

  def moved(tx):
    params = dj.merge(tx, BASE, experts).params
    return params['head'] - BASE['head']

  for make, whole in (
    (functools.partial(dj.della, 1.0, epsilon=0.0), dj.ties(1.0)),
    (functools.partial(dj.breadcrumbs, 1.0), dj.task_arithmetic(0.3)),
    (
      functools.partial(dj.consensus, min_tasks=0),
      dj.task_arithmetic(0.3),
    ),
  ):
    np.testing.assert_allclose(moved(make()), moved(whole), atol=1e-6)
  kept = dj.della(0.5, then=dj.task_arithmetic(1.0))
  pruned = dj.chain(dj.pruning.magprune(0.5), dj.task_arithmetic(1.0))
  np.testing.assert_array_equal(moved(kept), moved(pruned))
  ties = dj.ties(0.5, merge='sum')
  agreed = dj.consensus(0.0, 1.0, then=ties)
  np.testing.assert_array_equal(moved(agreed), moved(ties))
  drawn = dj.consensus(then=dj.dare())
  assert isinstance(drawn.init(BASE)[0], dj.transforms.DropState)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: dj.ties(0.0), r'density must be in \(0, 1\], got 0.0'),
    (lambda: dj.ties(1.5), r'density must be in \(0, 1\], got 1.5'),
    (lambda: dj.ties(float('nan')), 'density.*got nan'),
    (lambda: dj.ties(scale=float('inf')), 'scale must be finite, got inf'),
    (lambda: dj.ties(merge='median'), "merge.*got 'median'"),
    (lambda: dj.ties(scope='layer'), "scope.*got 'layer'"),
    (lambda: dj.dare(1.0), r'rate must be in \[0, 1\), got 1.0'),
    (lambda: dj.dare(-0.1), r'rate must be in \[0, 1\), got -0.1'),
    (lambda: dj.dare(scale=float('nan')), 'scale must be finite, got nan'),
    (lambda: dj.task_arithmetic(-np.inf), 'scale must be finite, got -inf'),
    (lambda: dj.slerp(float('nan')), 't must be finite, got nan'),
    (lambda: dj.nuslerp([1.0]), r'nuslerp needs 2 weights, got \[1.0\]'),
    (lambda: dj.nuslerp([1.0, -1.0]), r'not sum to zero, got \[1.0, -1.0\]'),
    (lambda: dj.nuslerp([1.0, np.nan]), r'finite.*got \[1.0, nan\]'),
    (lambda: dj.nuslerp(space='head'), "space.*got 'head'"),
    (lambda: dj.nuslerp(unit_axis=1), 'unit_axis must be None, 0 or -1, got 1'),
    (lambda: dj.karcher([1.0, -1.0]), r'negative.*got \[1.0, -1.0\]'),
    (lambda: dj.karcher(0.0), 'nor all zero, got 0.0'),
    (lambda: dj.karcher(space='head'), "space.*got 'head'"),
    (lambda: dj.karcher(max_iter=-1), 'max_iter.*negative, got -1'),
    (lambda: dj.karcher(tol=float('nan')), 'tol.*got 10 and nan'),
    (lambda: dj.model_stock(pairs='norm'), "pairs.*got 'norm'"),
    (lambda: dj.model_stock(unit_axis=2), 'unit_axis.*got 2'),
    (lambda: dj.della(0.1), r'epsilon must be in \(0, 1\], got 0.1 \+- 0.15'),
    (lambda: dj.della(0.9), r'got 0.9 \+- 0.15'),
    (lambda: dj.della(epsilon=-0.1), r'got 0.5 \+- -0.1'),
    (lambda: dj.della(scale=float('inf')), 'scale must be finite, got inf'),
    (lambda: dj.della(rescale='l2'), "rescale.*got 'l2'"),
    (lambda: dj.breadcrumbs(0.0), r'density must be in \(0, 1\], got 0.0'),
    (lambda: dj.breadcrumbs(gamma=1.0), r'gamma must be in \[0, 1\), got 1.0'),
    (lambda: dj.breadcrumbs(unit_axis='row'), "unit_axis.*got 'row'"),
    (lambda: dj.magmax(float('nan')), 'scale must be finite, got nan'),
    (lambda: dj.sce(0.0), r'density must be in \(0, 1\], got 0.0'),
    (lambda: dj.sce(floor=float('nan')), 'floor must be finite, got nan'),
    (lambda: dj.sce(merge='none'), "merge.*got 'none'"),
    (lambda: dj.pcb(1.5), r'density must be in \(0, 1\], got 1.5'),
    (lambda: dj.pcb(scale=float('nan')), 'scale must be finite, got nan'),
    (lambda: dj.pcb(reading='blog'), "reading.*got 'blog'"),
    (lambda: dj.consensus(min_tasks=-1), 'min_tasks.*negative, got -1'),
    (lambda: dj.consensus(scale=float('nan')), 'scale must be finite, got nan'),
    (lambda: dj.emr(float('nan')), 'scale must be finite, got nan'),
    (lambda: dj.weighted_average([1.0, -1.0]), r'got \[1.0, -1.0\]'),
    (lambda: dj.weighted_average([1.0, np.nan]), r'got \[1.0, nan\]'),
  ],
)
def test_bad_hyperparameters_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ('tx', 'message'),
  [
    (dj.weighted_average([1.0, 2.0]), r'weights are \[2\].*3 experts'),
    (dj.slerp(), 'slerp interpolates 2 experts, got 3'),
    (dj.nuslerp(), 'slerp interpolates 2 experts, got 3'),
    (dj.karcher([1.0, 2.0]), r'weights are \[2\].*3 experts'),
    (dj.consensus([0.4, 0.2]), r'threshold are \[2\].*3 experts'),
    (dj.consensus(np.nan), 'threshold must be finite, got nan'),
    (dj.transforms.trim(0.5), 'does not fit the base'),
  ],
)
def test_bad_fits_are_named(tx, message):
  with pytest.raises(ValueError, match=message):
    dj.merge(tx, BASE, EXPERTS[3])


@pytest.mark.parametrize('make', [dj.slerp, dj.karcher])
def test_merging_weights_without_weights_is_refused(make):
  deltas = EXPERTS[2]
  tx = make()
  with pytest.raises(ValueError, match='pass params'):
    tx.update(deltas, tx.init(deltas))


def test_task_arithmetic_takes_a_scale_for_each_task():
  base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.0], [4.0]])}
  merged = dj.merge(dj.task_arithmetic([1.0, 0.5]), base, experts).params
  assert merged['w'] == pytest.approx(3.5)
  with pytest.raises(ValueError, match=r'weights are \[3\].*2 experts'):
    dj.merge(dj.task_arithmetic([1.0, 0.5, 0.1]), base, experts)
  with pytest.raises(ValueError, match=r'scale must be finite, got \[1.0, inf'):
    dj.task_arithmetic([1.0, np.inf])
