"""Aggregators that choose, entry by entry, which task vectors count.

>>> import jax.numpy as jnp
>>> import dam_jax as dj
>>> tx = dj.competition.max_magnitude()
>>> deltas = {'w': jnp.array([[2., 1.], [-3., 0.]])}
>>> tx.update(deltas, tx.init(deltas))[0]['w'].tolist()
[-3.0, 1.0]
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import localization
from dam_jax import selection
from dam_jax import transforms
from dam_jax import tree
from dam_jax.base import entrywise
from dam_jax.base import leafwise
from dam_jax.base import made_of

READINGS = ('paper', 'code')
"""How `pcb` weighs entries."""


def max_magnitude(scale: ArrayLike = 1.0) -> optax.GradientTransformation:
  """Takes each entry from the task where its magnitude is largest.

  Args:
    scale: of the result; may be traced.

  Returns:
    The transformation. Of equal magnitudes the last task's entry counts.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024
  """

  def leaf_fn(x):
    largest = functools.reduce(
      lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a), x
    )
    return jnp.asarray(scale, x.dtype) * largest

  reduce_fn = aggregators.by_leaf(leaf_fn)
  return entrywise(
    optax.stateless(lambda updates, params=None: reduce_fn(updates))
  )


def sce(
  density: ArrayLike = 0.1, *, floor: float = 0.0, merge: str = 'selected'
) -> optax.GradientTransformation:
  """Selects entries that vary over tasks, weighs tasks, erases minority signs.

  Of a leaf's `n` entries whose variance over tasks is not zero, the
  `floor(density n)` of largest variance are selected. A task's weight `w_t` is
  its mean square over these, by their sum over tasks. An entry becomes
  `sum w_t tau_t / sum w_t` over the tasks that have the sign of
  `sum_t tau_t`, + where that is zero.

  Args:
    density: share of entries to select, in (0, 1]; 1 selects all. May be
      traced.
    floor: weights are equal where the sum of mean squares is not above this;
      1e-6 in mergekit.
    merge: the 'selected' entries only (paper, mergekit), or 'all', so that the
      selection decides on weights alone (FuseChat's code).

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  References:
    Wan et al., `FuseChat: Knowledge Fusion of Chat Models
    <https://arxiv.org/abs/2408.07990>`_, 2024
  """
  transforms.check_share('density', density, zero=False, one=True)
  transforms.check_finite('floor', floor)
  if merge not in ('selected', 'all'):
    raise ValueError(f"merge must be 'selected' or 'all', got {merge!r}")

  @jax.jit  # compiles its loop once for all leaves of one shape
  def leaf_fn(x):
    num = x.shape[0]
    mean = sum(x) / num
    variance = jnp.ravel(sum(jnp.square(tau - mean) for tau in x)) / num
    top = selection.floor_share(density, jnp.count_nonzero(variance))
    rank = jnp.clip(variance.size - top + 1, 1, variance.size)
    selected = selection.reaches(variance, rank) & (top > 0)
    selected |= jnp.asarray(density) >= 1
    kept = [jnp.where(selected.reshape(mean.shape), tau, 0) for tau in x]
    energy = [jnp.mean(jnp.square(tau)) for tau in kept]
    known = sum(energy) > floor
    total = jnp.where(known, sum(energy), 1)
    weight = [jnp.where(known, e / total, 1 / num) for e in energy]
    taus = kept if merge == 'selected' else list(x)
    positive = sum(taus) >= 0
    agree = [jnp.where(positive, tau > 0, tau < 0) for tau in taus]
    both = list(zip(weight, agree, taus, strict=True))
    above = sum(jnp.where(a, w * tau, 0) for w, a, tau in both)
    below = sum(jnp.where(a, w, 0) for w, a, _ in both)
    return above / jnp.where(below > 0, below, 1)

  reduce_fn = aggregators.by_leaf(leaf_fn)
  return leafwise(
    optax.stateless(lambda updates, params=None: reduce_fn(updates))
  )


def pcb(
  density: ArrayLike = 0.2, scale: ArrayLike = 1.0, *, reading: str = 'paper'
) -> optax.GradientTransformation:
  """Balances the competition of entries, within a task and between tasks.

  With `norm` from 0 to 1 over the model, an entry's score is
  `b_t = softmax(K norm(tau_t^2)) sum_s softmax(norm(tau_t tau_s))`. Each task
  keeps its top scores, and the merged task vector is
  `scale sum_t b_t tau_t / sum_t b_t`.

  Args:
    density: share of its entries that a task keeps, in (0, 1]; may be traced.
    scale: of the result; may be traced.
    reading: 'paper', or 'code', the authors': `b_t = exp(K norm(|tau_t|)^2)
      tanh(tau_t sum_s tau_s)` less the least score kept, and magnitudes clipped
      to their quantiles 0.0001 and 0.9999.

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  References:
    Du et al., `Parameter Competition Balancing for Model Merging
    <https://arxiv.org/abs/2410.02396>`_, 2024
  """
  transforms.check_share('density', density, zero=False, one=True)
  if reading not in READINGS:
    raise ValueError(f'reading must be one of {READINGS}, got {reading!r}')

  def merge(tau, sum_parts):
    score_fn = _released_score if reading == 'code' else _paper_score
    tau, score = score_fn(tau, functools.partial(_rank, density), sum_parts)
    below = sum(score)
    merged = sum(score * tau) / jnp.where(below > 0, below, 1)
    return jnp.asarray(scale, tau.dtype) * merged

  @jax.jit  # needs a fraction of the memory
  def merge_whole(tau):
    return merge(tau, selection.whole)

  def update_fn(
    updates, state, params=None, *, sum_parts=selection.whole, **extra_args
  ):
    del params, extra_args
    flat = tree.ravel(jax.tree.map(_rounded, updates), leading=1)
    rest = tuple(x[0] for x in flat.rest)
    if sum_parts is selection.whole:
      merged = merge_whole(flat.vector)
    else:
      merged = merge(flat.vector, sum_parts)
    merged = tree.Raveled(merged, rest, flat.layout).unravel()
    merged = jax.tree.map(lambda m, x: m.astype(x.dtype), merged, updates)
    return merged, state

  return entrywise(
    optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
  )


def _rank(density: ArrayLike, size: ArrayLike) -> ArrayLike:
  """Returns the rank of the least score that is kept of so many."""
  return jnp.minimum(selection.floor_share(1 - density, size) + 1, size)


def _rounded(x: jax.Array) -> jax.Array:
  """Widens a leaf, rounded as its own dtype is.

  XLA may keep differences of bfloat16 in float32. What compares leaves would
  then depend on how it is compiled.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  kind = jnp.finfo(x.dtype)
  wide = x.astype(np.promote_types(x.dtype, np.float32))
  return lax.reduce_precision(wide, kind.nexp, kind.nmant)


def _norm(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """Maps what lies between two numbers onto [0, 1]; zero where they agree."""
  return (x - low) / jnp.where(high > low, high - low, 1)


def _paper_score(
  tau: jax.Array, rank_fn: selection.RankFn, sum_parts: selection.SumParts
) -> tuple[jax.Array, jax.Array]:
  """Returns task vectors and their scores, both `[K, P]`."""

  def terms(tau):
    return [jnp.square(tau), *(tau * other[None] for other in tau)]

  ends = selection.extremes(terms(tau), sum_parts=sum_parts)

  def exps(tau):
    # Of the largest 1: P times a softmax once it is divided by its mean. The
    # factor P cancels, and numbers stay near one.
    times = [tau.shape[0], *[1] * tau.shape[0]]
    return [
      jnp.exp(n * _norm(x, *end) - n * (end[1] > end[0]).astype(x.dtype))
      for x, n, end in zip(terms(tau), times, ends, strict=True)
    ]

  sums = [jnp.sum(e, axis=-1, keepdims=True) for e in exps(tau)]
  size = jnp.asarray(tau.shape[-1], tau.dtype)
  means = sum_parts((sums, size), _means)
  # Computed anew: K + 1 times the task vectors would wait for the means.
  tau, means = lax.optimization_barrier((tau, means))
  intra, *inter = (
    e / mean.astype(e.dtype) for e, mean in zip(exps(tau), means, strict=True)
  )
  score = intra * sum(inter)
  top = selection.reaches(score, rank_fn, sum_parts=sum_parts)
  return tau, jnp.where(top, score, 0)


def _means(total: tuple[list[Any], Any]) -> list[Any]:
  sums, size = total
  return [x / size for x in sums]


def _released_score(
  tau: jax.Array, rank_fn: selection.RankFn, sum_parts: selection.SumParts
) -> tuple[jax.Array, jax.Array]:
  """Returns clipped task vectors and their scores, both `[K, P]`."""
  num, magnitude = tau.shape[0], jnp.abs(tau)
  low, high = (
    selection.ranked(magnitude, fn, sum_parts=sum_parts)[:, None]
    for fn in (
      lambda size: selection.floor_share(0.0001, size) + 1,
      lambda size: jnp.maximum(selection.floor_share(1 - 0.0001, size), 1),
    )
  )
  magnitude = jnp.clip(magnitude, low, high)
  # Less one, which cancels: there may be too many tasks for exp.
  score = jnp.exp(num * (jnp.square(_norm(magnitude, low, high)) - 1))
  score *= jnp.tanh(tau * functools.reduce(jnp.add, tau)[None])
  (end,) = selection.extremes([score], sum_parts=sum_parts)
  score, most = jnp.maximum(score - end[0], 0), end[1] - end[0]
  least = selection.ranked(score, rank_fn, sum_parts=sum_parts)[:, None]
  score = _norm(jnp.maximum(score, least), least, most)
  return jnp.sign(tau) * magnitude, score


def consensus(
  threshold: ArrayLike | Sequence[float] = 0.4,
  scale: ArrayLike = 1.0,
  *,
  min_tasks: int = 2,
  then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Keeps what several tasks need of a merged task vector.

  `scale m tau` with `m = sum_t m_t >= min_tasks`, where `tau` is merged and
  `m_t` are its `dam_jax.localization.tall_masks`.

  Args:
    threshold: `[K]`, or one for all, of the masks; may be traced.
    scale: of what is kept; may be traced.
    min_tasks: how many tasks must need an entry: 1 drops what none needs, 2
      also what only one does.
    then: what makes the merged task vector, in place of the sum.

  Returns:
    The transformation; its state is that of `then`.

  Raises:
    ValueError: where min_tasks is negative; at update, where there is not one
      finite threshold for each task.

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024
  """
  if min_tasks < 0:
    raise ValueError(f'min_tasks must not be negative, got {min_tasks}')
  tx = aggregators.weighted_sum() if then is None else then
  tx = optax.with_extra_args_support(tx)

  def leaf_fn(x, d, mask):
    needed = sum(mask) >= min_tasks
    return jnp.where(needed, jnp.asarray(scale, x.dtype) * d, 0)

  reduce_fn = aggregators.by_leaf(leaf_fn)

  def update_fn(updates, state, params=None, **extra_args):
    merged, state = tx.update(updates, state, params, **extra_args)
    masks = localization.tall_masks(updates, merged, threshold=threshold)
    return reduce_fn(updates, merged, masks), state

  both = optax.GradientTransformationExtraArgs(tx.init, update_fn)
  return made_of(both, [tx])
