"""What a merge is: an update transformation, or a loop of steps and an end.

Level 1 works on task vectors. A transformation that keeps the task axis
(`dam_jax.transforms`) and one that reduces it (`dam_jax.aggregators`) are both
optax `GradientTransformation`s; `chain` composes them and `merge` applies the
result:

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.zeros(2)}
  >>> experts = {'w': jnp.array([[1., 0.], [0., 2.]])}
  >>> dj.merge(dj.task_arithmetic(0.5), base, experts).params['w'].tolist()
  [0.5, 1.0]

Level 2 works over data. A `Merger` is three pure functions and a plan of what
its steps read; a transformation becomes one by `from_transform`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from dam_jax import tree
from dam_jax.typing import Batch, Metrics, Params


def is_concrete(x: Any) -> bool:
  """Whether a hyper-parameter's value can be looked at, outside of tracing."""
  return not isinstance(x, jax.core.Tracer)


class Leafwise(optax.GradientTransformationExtraArgs):
  """A transformation that wants a leaf whole, and of the others totals alone.

  It takes a bare leaf `[K, *shape]`, with the `salt` of its path, and what it
  needs to know of other leaves it asks for by `sum_parts`. Its state does not
  depend on parameters. So a merge may take one leaf after the other, each on
  another device.
  """


class Placewise(Leafwise):
  """A transformation that XLA splits over devices as it is.

  What becomes of an entry depends on that entry, its place in the leaf, and
  counts or sums over the leaf: no device needs another one's entries.
  """


class Entrywise(Placewise):
  """A transformation that does to every entry what it does to any other.

  It takes a bare array `[K, n]` of any entries of a model, in any order, and
  what it needs to know of all of them it asks for by `sum_parts`. So a merge of
  parts may cut a model where it likes, not between leaves only.
  """


def entrywise(tx: optax.GradientTransformation) -> Entrywise:
  """Says of a transformation that it is `Entrywise`."""
  return Entrywise(*optax.with_extra_args_support(tx))


def leafwise(tx: optax.GradientTransformation) -> Leafwise:
  """Says of a transformation that it is `Leafwise`."""
  return Leafwise(*optax.with_extra_args_support(tx))


def placewise(tx: optax.GradientTransformation) -> Placewise:
  """Says of a transformation that it is `Placewise`."""
  return Placewise(*optax.with_extra_args_support(tx))


def made_of(
  tx: optax.GradientTransformationExtraArgs,
  parts: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Says of a transformation what holds for all that it is made of.

  Args:
    tx: the transformation.
    parts: which it applies, each to all or some of the leaves.

  Returns:
    It, `Entrywise`, `Placewise` or `Leafwise` where all parts are.
  """
  for kind in (Entrywise, Placewise, Leafwise):
    if all(isinstance(part, kind) for part in parts):
      return kind(*tx)
  return tx


class MergeResult(NamedTuple):
  """What a merge returns.

  Attributes:
    params: the merged model, like the base.
    state: the transformation's state after the update.
  """

  params: Params
  state: Any


class Plan(NamedTuple):
  """What a merger reads.

  Attributes:
    steps: how many steps it takes; 0 for a merge without data.
    phases: how many draws of images a step reads, the `S` of `Batch.images`.
    references: whether it reads `Batch.references`.
    entrywise: whether it merges `Entrywise`: finalize then merges any part of
      the models, and takes the `sum_parts` that tells of the others.
    placewise: whether it merges `Placewise`.
    leafwise: whether it merges `Leafwise`: finalize then merges bare leaves,
      and takes `sum_parts` and the `salt` of a leaf's path.
  """

  steps: int = 0
  phases: int = 0
  references: bool = False
  entrywise: bool = False
  placewise: bool = False
  leafwise: bool = False


class Merger(NamedTuple):
  """A merge that may look at data, as pure functions.

  Attributes:
    init: `(key, base, experts) -> state`; copies what it keeps, so that a
      donated state never deletes the caller's arrays. Base and experts are
      pytrees, or both raveled by `dam_jax.tree.ravel`.
    step: `(state, base, experts, batch) -> (state, metrics)`; types and shapes
      of the state never change. Those of learned merges take an `axis_name`,
      over whose devices a batch is split.
    finalize: `(state, base, experts) -> params`.
    plan: what the steps read.
  """

  init: Callable[[jax.Array, Any, Any], Any]
  step: Callable[..., tuple[Any, Metrics]]
  finalize: Callable[[Any, Any, Any], Params]
  plan: Plan = Plan()


def merge(
  tx: optax.GradientTransformation,
  base: Params,
  experts: Params,
  *,
  state: Any = None,
  **extra_args: Any,
) -> MergeResult:
  """Merges experts into one model.

  Args:
    tx: maps task vectors `[K, ...]` to one update; see `dam_jax.recipes`.
    base: the model that all experts were fine-tuned from.
    experts: stacked models, leaves `[K, *param_shape]`.
    state: `tx`'s state; made by `tx.init(base)` where None.
    **extra_args: passed to `tx.update`.

  Returns:
    The merged model, in the base's structure and dtypes, and `tx`'s state.

  Raises:
    ValueError: where experts do not fit the base, or `tx` does not reduce the
      task axis.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> merge(dj.average(), base, experts).params
    {'w': Array([3.], dtype=float32)}
  """
  unrolled = isinstance(tx, Entrywise)
  tx = optax.with_extra_args_support(tx)
  state = tx.init(base) if state is None else state
  deltas = tree.task_vectors(base, experts, unrolled=unrolled)
  updates, state = tx.update(deltas, state, base, **extra_args)
  return MergeResult(tree.apply_delta(base, updates), state)


def chain(
  *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Applies transformations of task vectors one after the other.

  Like `optax.chain`, and says which link reduces the task axis too early,
  before anything is computed.

  Args:
    *transforms: the last one reduces the task axis, those before it keep it.

  Returns:
    One transformation; `Entrywise`, `Placewise` or `Leafwise` where all links
    are.

  Raises:
    ValueError: at update, where a link before the last drops the task axis.

  Examples:
    >>> tx = chain(dj.scale_tasks([1., 0.]), dj.aggregators.weighted_sum(0.5))
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> merge(tx, base, experts).params
    {'w': Array([1.5], dtype=float32)}
  """
  tx = optax.chain(*transforms)

  def update_fn(updates, state, params=None, **extra_args):
    # Functions, such as `sum_parts`, do not change shapes.
    arrays = {k: x for k, x in extra_args.items() if not callable(x)}
    shaped = updates
    for i, (link, s) in enumerate(zip(transforms[:-1], state, strict=False)):
      link = optax.with_extra_args_support(link)
      shaped, _ = jax.eval_shape(
        lambda u, s, p, e, link=link: link.update(u, s, p, **e),
        shaped,
        s,
        params,
        arrays,
      )
      lines = tree.differences(updates, shaped, dtypes=False)
      if lines:
        raise ValueError(
          f'link {i} of the chain must keep the task axis (only the last may '
          'reduce it):\n  ' + '\n  '.join(lines)
        )
    return tx.update(updates, state, params, **extra_args)

  one = optax.GradientTransformationExtraArgs(tx.init, update_fn)
  return made_of(one, transforms)


def _no_step(state: Any, base: Any, experts: Any, batch: Batch) -> Any:
  raise ValueError('this merge reads no data: call finalize, not step')


def from_transform(tx: optax.GradientTransformation) -> Merger:
  """Makes a merge of task vectors a `Merger` that reads no data.

  Args:
    tx: maps task vectors `[K, ...]` to one update.

  Returns:
    A merger whose plan has no steps; its `step` raises ValueError.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> merger = from_transform(dj.average())
    >>> state = merger.init(jax.random.key(0), base, experts)
    >>> merger.finalize(state, base, experts)
    {'w': Array([3.], dtype=float32)}
  """

  def init_fn(key, base, experts):
    del key, experts
    return tx.init(base)

  def finalize_fn(state, base, experts, **extra_args):
    return merge(tx, base, experts, state=state, **extra_args).params

  plan = Plan(
    entrywise=isinstance(tx, Entrywise),
    placewise=isinstance(tx, Placewise),
    leafwise=isinstance(tx, Leafwise),
  )
  return Merger(init_fn, _no_step, finalize_fn, plan)


def partition(mergers: Mapping[Hashable, Merger], labels: Any) -> Merger:
  """Merges each leaf by the merger of its label.

  As `optax.partition` does with transformations: each sees its own leaves, and
  what it ranks of the whole model it ranks of these. Over a mesh, give it those
  that `dam_jax.data_parallel` makes; each then merges where its leaves lie.

  Args:
    mergers: by label, none of which has steps; a label may have no leaf.
    labels: a pytree like the base, such as `dam_jax.tree.label_by_path` gives.

  Returns:
    A merger whose plan has no steps.

  Raises:
    ValueError: where a merger has steps, or a label no merger; all of them.

  Examples:
    >>> base = {'w': jnp.ones(1), 'head': jnp.ones(1)}
    >>> experts = {'w': jnp.array([[2.], [4.]]), 'head': jnp.zeros((2, 1))}
    >>> merger = partition(
    ...   {'merge': from_transform(dj.average()),
    ...    'keep': from_transform(dj.keep_base())},
    ...   {'w': 'merge', 'head': 'keep'})
    >>> state = merger.init(jax.random.key(0), base, experts)
    >>> merger.finalize(state, base, experts)
    {'head': Array([1.], dtype=float32), 'w': Array([3.], dtype=float32)}
  """
  named = set(jax.tree.leaves(labels))
  learned = [label for label, merger in mergers.items() if merger.plan.steps]
  unknown = sorted(str(label) for label in named if label not in mergers)
  if learned or unknown:
    raise ValueError(
      f'mergers that learn: {learned}; labels without a merger: {unknown}'
    )

  used = {label: merger for label, merger in mergers.items() if label in named}

  def part(model, label):
    return jax.tree.map(
      lambda own, x: x if own == label else optax.MaskedNode(), labels, model
    )

  def init_fn(key, base, experts):
    return {
      label: merger.init(key, part(base, label), part(experts, label))
      for label, merger in used.items()
    }

  def finalize_fn(state, base, experts):
    merged = {
      label: merger.finalize(
        state[label], part(base, label), part(experts, label)
      )
      for label, merger in used.items()
    }
    return jax.tree.map(
      lambda own, *parts: dict(zip(merged, parts, strict=True))[own],
      labels,
      *merged.values(),
    )

  return Merger(init_fn, _no_step, finalize_fn)


def scan_steps(
  merger: Merger, batch_fn: Callable[[Any, Any], Batch] | None = None
) -> jax.stages.Wrapped:
  """Makes one compiled program of many steps, its state donated.

  Args:
    merger: whose steps to take.
    batch_fn: `(data, index) -> Batch`, computed on the device, so that the
      images stay there and only indices travel; None takes `index` as the
      batch itself.

  Returns:
    `(state, base, experts, data, indices) -> (state, metrics)`, where every
    leaf of `indices` and of `metrics` has a leading axis over the steps.
    The `state` passed in must not be used again.
  """

  def run(state, base, experts, data, indices):
    def one(state, index):
      batch = index if batch_fn is None else batch_fn(data, index)
      return merger.step(state, base, experts, batch)

    return jax.lax.scan(one, state, indices)

  return jax.jit(run, donate_argnums=0)
