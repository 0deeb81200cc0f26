"""Which merge of ours must equal which merge of a peer, as data.

A difference is explained by a named option, which a case passes to both sides.
A case whose option we do not have yet has a `gap`, and must differ until then.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dam_jax as dj

EVERY = ('plain', 'tied', 'still')
"""The kinds of problems with three experts, see `benchmarks.parity_runs`."""
DENSITIES = (0.2, 0.5, 0.9)
WEIGHTS = (0.5, 0.3, 0.4)
"""Of three experts; their sum is not one."""


class Peer(NamedTuple):
  """A merge of a peer.

  Attributes:
    name: 'fusion_bench' or 'mergekit'.
    method: what the peer calls it.
    options: of the method, as the peer names them.
    inputs: what it merges, see `benchmarks.peer_files.Job`.
  """

  name: str
  method: str
  options: dict[str, Any]
  inputs: str


def fusion_bench(method: str, *, inputs: str = 'base', **options: Any) -> Peer:
  return Peer('fusion_bench', method, options, inputs)


def mergekit(method: str, *, inputs: str = 'base', **options: Any) -> Peer:
  # `lambda` is a keyword of the language.
  options = {name.rstrip('_'): value for name, value in options.items()}
  return Peer('mergekit', method, options, inputs)


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison.

  Attributes:
    method: the name to select it by.
    peer: the merge to compare with.
    ours: makes our transformation, or a function `(base, experts) -> params`;
      None while there is none.
    given: files of the problem that `ours` takes, by keyword: 'fisher', 'gram',
      or 'uniform', which it gets as a function like `drop`'s `uniform_fn`.
    problems: the kinds of problems to merge.
    gap: the option that is missing in ours.
    tolerance: the relative error that float32 arithmetic explains.
  """

  method: str
  peer: Peer
  ours: functools.partial | None = None
  given: Mapping[str, str] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ('plain',)
  gap: str = ''
  tolerance: float = 2e-6


ours = functools.partial
DRAWS = {'uniform_fn': 'uniform'}


def dropped(
  rate: float,
  *,
  then: Any,
  uniform_fn: Callable = dj.transforms.uniform,
  rescale: bool | str = True,
) -> Any:
  """DARE with given draws, or draws of its own."""
  drop = dj.transforms.drop(rate, rescale=rescale, uniform_fn=uniform_fn)
  return dj.chain(drop, then())


def averaging(factory: Callable, **options: Any) -> Any:
  """A merge of matrices that averages all other leaves."""
  return factory(others=dj.average(), **options)


def knotted(scale: float, **options: Any) -> Callable:
  """KnOTS with TIES, layer by layer; other leaves are averaged."""

  def merge(base, experts):
    ties = dj.ties(scale=scale, scope='leaf', **options)
    num = jax.tree.leaves(experts)[0].shape[0]
    txs = {
      'linear': dj.knots(ties, scaled=True, input_axis=1),
      'other': dj.task_arithmetic(scale / num),
    }
    labels = jax.tree.unflatten(
      jax.tree.structure(base),
      [
        'linear' if x.ndim == 2 and 'embed' not in path else 'other'
        for path, x in dj.tree.flatten(base).items()
      ],
    )
    return dj.merge(optax.partition(txs, labels), base, experts).params

  return merge


def along(axis: int, factory: Callable, **options: Any) -> Callable:
  """A merge unit by unit, where a unit is what lies along an axis.

  So mergekit has it, of a leaf of any number of axes.
  """

  def rows(x, lead):
    if x.ndim - lead < 2:
      return x
    x = jnp.moveaxis(x, axis + lead if axis >= 0 else axis, -1)
    return x.reshape(*x.shape[:lead], -1, x.shape[-1])

  def restore(y, like):
    if like.ndim < 2:
      return y
    moved = jnp.moveaxis(like, axis, -1).shape
    return jnp.moveaxis(y.reshape(moved), -1, axis)

  draw = options.pop('uniform_fn', None)
  if draw is not None:
    options['uniform_fn'] = lambda key, leaf: rows(draw(key, leaf), 1)
  tx = factory(unit_axis=0, **options)

  def merge(base, experts):
    lying = jax.tree.map(lambda x: rows(x, 0), base)
    merged = dj.merge(tx, lying, jax.tree.map(lambda x: rows(x, 1), experts))
    return jax.tree.map(restore, merged.params, base)

  return merge


def magpruned(*, then: Callable, **options: Any) -> Any:
  """DELLA with given draws."""
  return dj.chain(dj.pruning.magprune(**options), then())


def then_by(factory: Callable, *args: Any, then: Callable, **options: Any):
  """A merge whose sum another merge takes the place of."""
  return factory(*args, then=then(), **options)


def _each(base: Any, merged: Any, masks: Any, **options: Any) -> Any:
  """Returns each task's model, leaves `[K, ...]`."""
  num = jax.tree.leaves(masks)[0].shape[0]
  return dj.tree.stack(
    [
      dj.localization.specialize(base, merged, masks=masks, task=k, **options)
      for k in range(num)
    ]
  )


def tall(threshold: float) -> Callable:
  """Each task's model by its TALL mask."""

  def merge(base, experts):
    deltas = dj.tree.task_vectors(base, experts)
    merged, _ = dj.aggregators.weighted_sum().update(deltas, None)
    masks = dj.localization.tall_masks(deltas, merged, threshold=threshold)
    return _each(base, merged, masks)

  return merge


def modulated(norm: str) -> Callable:
  """Each task's model by EMR's masks and scales."""

  def merge(base, experts):
    deltas, tx = dj.tree.task_vectors(base, experts), dj.emr()
    merged, _ = tx.update(deltas, tx.init(base), base)
    masks, scales = dj.localization.emr_masks(deltas, merged, norm=norm)
    return _each(base, merged, masks, scales=scales)

  return merge


def gram_weighted(*, grams: Any, scale: float) -> Callable:
  """RegMean of torch's weights `[out, in]`."""
  found = {f'{p}/weight': g for p, g in dj.tree.flatten(grams).items()}

  def turned(params):
    paths = dj.tree.names(params)
    leaves = [
      x.swapaxes(-1, -2) if p in found else x
      for p, x in zip(paths, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)

  def merge(base, experts):
    tx = dj.weighted.gram_weighted(found, scale=scale)
    return turned(dj.merge(tx, turned(base), turned(experts)).params)

  return merge


def _averages():
  average = functools.partial(
    Case, 'average', ours=ours(dj.average), problems=EVERY
  )
  yield average(fusion_bench('simple_average'))
  yield average(mergekit('linear', inputs='experts', weight=1.0))
  for normalize in (True, False):
    weighted = functools.partial(
      Case,
      'weighted_average',
      ours=ours(dj.weighted_average, WEIGHTS, normalize=normalize),
      problems=EVERY,
    )
    options = {'normalize': normalize}
    yield weighted(fusion_bench('weighted_average', weights=WEIGHTS, **options))
    yield weighted(
      mergekit('linear', inputs='experts', weight=WEIGHTS, **options)
    )


def _task_arithmetic():
  case = functools.partial(Case, 'task_arithmetic', problems=EVERY)
  for peer in (
    fusion_bench('task_arithmetic', scaling_factor=0.3),
    mergekit('task_arithmetic', weight=1.0, lambda_=0.3),
  ):
    yield case(peer, ours(dj.task_arithmetic, 0.3))
  yield case(
    mergekit('task_arithmetic', weight=WEIGHTS),
    ours(dj.aggregators.weighted_sum, WEIGHTS),
  )


def _ties_fusion_bench():
  options = {'scaling_factor': 0.3, 'remove_keys': []}
  for density in DENSITIES:
    for merge in ('mean', 'sum', 'max'):
      yield Case(
        'ties',
        fusion_bench('ties', threshold=density, merge_func=merge, **options),
        ours(dj.ties, density, 0.3, merge=merge),
        problems=EVERY,
      )


def _ties_mergekit():
  for density in (*DENSITIES, 1.0):
    for merge in ('mean', 'sum'):
      for weight in (1.0, WEIGHTS):
        yield Case(
          'ties',
          mergekit(
            'ties',
            density=density,
            weight=weight,
            normalize=merge == 'mean',
            lambda_=0.3,
          ),
          ours(
            dj.ties,
            density,
            0.3,
            merge=merge,
            weights=None if weight == 1.0 else weight,
            reading='mergekit',
          ),
        )


def _dare(rescale):
  case = functools.partial(Case, 'dare', given=DRAWS)
  for rate in (0.1, 0.5, 0.9):
    drop = functools.partial(ours, dropped, rate, rescale=rescale)
    options = {
      'sparsity_ratio': rate,
      'only_on_linear_weights': False,
      'rescale': rescale,
    }
    then = {'scaling_factor': 0.3, 'threshold': 0.2, 'merge_func': 'sum'}
    yield case(
      fusion_bench('dare_average', **options), drop(then=ours(dj.average))
    )
    yield case(
      fusion_bench('dare_task_arithmetic', scaling_factor=0.3, **options),
      drop(then=ours(dj.task_arithmetic, 0.3)),
    )
    yield case(
      fusion_bench('dare_ties', remove_keys=[], **then, **options),
      drop(then=ours(dj.ties, 0.2, 0.3, merge='sum')),
    )
    options = {'density': 1 - rate, 'weight': 1.0, 'rescale': rescale}
    drop = functools.partial(
      ours, dropped, rate, rescale='l1' if rescale else False
    )
    elect = ours(
      dj.aggregators.elect_mean, 'sum', scale=0.3, reading='mergekit'
    )
    yield case(
      mergekit('dare_linear', lambda_=0.3, **options),
      drop(then=ours(dj.task_arithmetic, 0.3)),
    )
    yield case(mergekit('dare_ties', lambda_=0.3, **options), drop(then=elect))


def _spheres():
  for t in (0.0, 0.3, 0.5, 1.0):
    slerp = functools.partial(
      Case, 'slerp', ours=ours(dj.slerp, t), problems=('pair',)
    )
    yield slerp(fusion_bench('slerp', inputs='experts', t=t))
    yield slerp(mergekit('slerp', inputs='first', t=t))
  nuslerp = functools.partial(Case, 'nuslerp', problems=('pair',))
  weight = [0.7, 0.3]
  yield nuslerp(mergekit('nuslerp', weight=weight), ours(dj.nuslerp, weight))
  yield nuslerp(
    mergekit('nuslerp', inputs='experts', weight=weight),
    ours(dj.nuslerp, weight, space='weights'),
  )
  for by_row, axis in ((True, 0), (False, -1)):
    options = {'nuslerp_flatten': False, 'nuslerp_row_wise': by_row}
    yield nuslerp(
      mergekit('nuslerp', weight=weight, **options),
      ours(along, axis, dj.nuslerp, weights=weight),
    )
  for steps in (1, 10, 100):
    yield Case(
      'karcher',
      mergekit('karcher', inputs='experts', max_iter=steps),
      ours(dj.karcher, max_iter=steps),
    )


def _angles():
  yield Case(
    'model_stock',
    mergekit('model_stock', filter_wise=False),
    ours(dj.model_stock),
  )
  yield Case(
    'model_stock',
    mergekit('model_stock', filter_wise=True),
    ours(along, -1, dj.model_stock),
  )
  for problem in ('plain', 'pair'):
    yield Case(
      'model_stock',
      fusion_bench('model_stock'),
      ours(dj.model_stock, pairs='angle'),
      problems=(problem,),
    )


def _pruned():
  elect = {
    'mean': ours(dj.aggregators.elect_mean, reading='mergekit'),
    'sum': ours(dj.aggregators.elect_mean, 'sum', reading='mergekit'),
    'all': ours(dj.aggregators.weighted_sum),
  }
  for rescale in (True, False):
    for name, then in (('della', 'mean'), ('della_linear', 'all')):
      yield Case(
        'della',
        mergekit(name, density=0.5, epsilon=0.2, weight=1.0, rescale=rescale),
        ours(
          along,
          1,
          magpruned,
          then=elect[then],
          density=0.5,
          epsilon=0.2,
          rescale='l1' if rescale else False,
        ),
        given=DRAWS,
      )
  for gamma in (0.05, 0.3):
    options = {'density': 0.8, 'gamma': gamma, 'weight': 1.0}
    yield Case(
      'breadcrumbs',
      mergekit('breadcrumbs', **options),
      ours(dj.breadcrumbs, 0.8, 1.0, gamma=gamma),
    )
    yield Case(
      'breadcrumbs',
      mergekit('breadcrumbs_ties', **options),
      ours(
        then_by,
        dj.breadcrumbs,
        0.8,
        gamma=gamma,
        then=elect['sum'],
      ),
    )


def _chosen():
  for topk in (0.2, 1.0):
    yield Case(
      'sce', mergekit('sce', select_topk=topk), ours(dj.sce, topk, floor=1e-6)
    )
  yield Case(
    'magmax', fusion_bench('magmax', scaling_factor=0.5), ours(dj.magmax, 0.5)
  )
  options = {'tall_mask_lambda': 0.4}
  yield Case('tall_mask', fusion_bench('tall_mask', **options), ours(tall, 0.4))
  options |= {'scaling_factor': 0.3}
  for k in (1, 2, 3):
    yield Case(
      'consensus',
      fusion_bench('consensus', prun_thre_k=k, **options),
      ours(dj.consensus, 0.4, 0.3, min_tasks=k),
    )
  yield Case('emr', fusion_bench('emr'), ours(modulated, norm='mean'))


def _spectral():
  yield Case('tsv_m', fusion_bench('tsv_m', alpha=0.8), ours(dj.tsv_m, 0.8))
  options = {'scaling_factor': 0.8}
  yield Case('iso_c', fusion_bench('iso_c', **options), ours(dj.iso_c, 0.8))
  for share in (0.3, 0.8):
    yield Case(
      'iso_cts',
      fusion_bench('iso_cts', common_space_fraction=share, **options),
      ours(dj.iso_cts, 0.8, share, input_axis=1),
      tolerance=1e-5,  # three decompositions in a row, 1 to 3e-6 by machine
    )
  yield Case(
    'wudi',
    fusion_bench('wudi', iter_num=50),
    ours(averaging, dj.wudi, iterations=50, input_axis=1),
  )
  for merge in ('mean', 'sum'):
    yield Case(
      'knots',
      fusion_bench('knots', threshold=0.3, merge_func=merge, **options),
      ours(knotted, 0.8, density=0.3, merge=merge),
    )


def _with_statistics():
  for normalize in (True, False):
    yield Case(
      'fisher',
      fusion_bench('fisher', normalize_fisher_weight=normalize),
      ours(dj.weighted.precision_weighted, epsilon=1e-6, normalize=normalize),
      given={'precisions': 'fisher'},
    )
  for ratio in (1.0, 0.9):
    yield Case(
      'regmean',
      fusion_bench('regmean', reduce_non_diagonal_ratio=ratio),
      ours(gram_weighted, scale=ratio),
      given={'grams': 'gram'},
    )


CASES = (
  *_averages(),
  *_task_arithmetic(),
  *_ties_fusion_bench(),
  *_ties_mergekit(),
  *_dare(rescale=True),
  *_dare(rescale=False),
  *_spheres(),
  *_angles(),
  *_pruned(),
  *_chosen(),
  *_spectral(),
  *_with_statistics(),
)
