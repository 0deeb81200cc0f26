"""Which entries of a merged task vector a task needs, and its own model back.

A mask of one bit an entry, and for EMR a number a task, turn the merged model
into each task's:

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.zeros(3)}
  >>> experts = {'w': jnp.array([[3., 1., 0.], [-1., 2., 0.]])}
  >>> deltas = dj.tree.task_vectors(base, experts)
  >>> merged, _ = dj.emr().update(deltas, dj.emr().init(base))
  >>> masks, scales = dj.localization.emr_masks(deltas, merged)
  >>> model = dj.localization.specialize(
  ...     base, merged, masks=masks, task=1, scales=scales)
  >>> model['w'].tolist()
  [0.0, 3.0, 0.0]
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import transforms
from dam_jax import tree
from dam_jax.base import is_concrete
from dam_jax.typing import Deltas, Params

NORMS = ('sum', 'mean')
"""What `emr_masks` compares: the model's entries, or its leaves' means."""


def _wide(*leaves: jax.Array) -> tuple[jax.Array, ...]:
  wide = np.promote_types(leaves[0].dtype, np.float32)
  return tuple(x.astype(wide) for x in leaves)


@jax.jit
def _tall_mask(x: jax.Array, merged: jax.Array, least: jax.Array) -> jax.Array:
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros(x.shape, bool)
  x, merged, least = _wide(x, merged[None], least)
  least = least.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.abs(x) >= least * jnp.abs(merged - x)


@jax.jit
def _same_sign(x: jax.Array, unified: jax.Array) -> jax.Array:
  return jnp.sign(x) * jnp.sign(unified)[None] > 0


def tall_masks(
  deltas: Deltas,
  merged: optax.Updates,
  *,
  threshold: ArrayLike | Sequence[float] = 0.4,
) -> Any:
  """Finds the entries of a merged task vector that each task needs.

  `m_t = |tau_t| >= threshold_t |tau - tau_t|`, where `tau` is merged.

  Args:
    deltas: task vectors, leaves `[K, *param_shape]`.
    merged: what they were merged into, `sum_t tau_t` in the paper, leaves
      `[*param_shape]`.
    threshold: `[K]`, or one for all: the higher, the fewer entries. The paper
      chooses among 0.2, 0.3, ..., 0.6 for each task. May be traced.

  Returns:
    Masks, leaves `[K, *param_shape]` bool.

  Raises:
    ValueError: where there is not one finite threshold for each task.

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024
  """
  transforms.check_weights(threshold, deltas, name='threshold')

  num = jax.tree.leaves(deltas)[0].shape[0]
  least = jnp.broadcast_to(jnp.asarray(threshold), (num,))
  return jax.tree.map(lambda x, m: _tall_mask(x, m, least), deltas, merged)


def emr_masks(
  deltas: Deltas, unified: optax.Updates, *, norm: str = 'sum'
) -> tuple[Any, jax.Array]:
  """Finds where the unified task vector has each task's sign, and its length.

  `M_t = tau_t tau > 0` and `lambda_t = sum |tau_t| / sum |M_t tau|`, where
  `tau` is unified and sums go over the whole model.

  Args:
    deltas: task vectors, leaves `[K, *param_shape]`.
    unified: what `dam_jax.recipes.emr` merged them into.
    norm: 'sum' over all entries (paper), or of the leaves' 'mean's, which makes
      small leaves count as much as large ones (the paper's code, FusionBench).

  Returns:
    Masks, leaves `[K, *param_shape]` bool, and scales `[K]`; 1 where the masked
    task vector is zero.

  Raises:
    ValueError: where norm is none of those.

  References:
    Huang et al., `EMR-Merging: Tuning-Free High-Performance Model Merging
    <https://arxiv.org/abs/2405.17461>`_, 2024
  """
  if norm not in NORMS:
    raise ValueError(f'norm must be one of {NORMS}, got {norm!r}')
  masks = jax.tree.map(_same_sign, deltas, unified)

  def length(x, mask, m):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.zeros((2, x.shape[0]))
    both = jnp.stack([x, jnp.where(mask, m[None], 0)]).astype(jnp.float32)
    measure = jnp.sum if norm == 'sum' else jnp.mean
    return measure(jnp.abs(both), axis=tuple(range(2, both.ndim)))

  lengths = jax.tree.leaves(jax.tree.map(length, deltas, masks, unified))
  own, masked = functools.reduce(jnp.add, lengths)
  return masks, jnp.where(masked > 0, own / jnp.where(masked > 0, masked, 1), 1)


def specialize(
  base: Params,
  merged: optax.Updates,
  *,
  masks: Any,
  task: int | jax.Array,
  scales: ArrayLike = 1.0,
) -> Params:
  """Makes a task's own model of a merged task vector.

  `theta_t = theta_0 + lambda_t M_t tau`.

  Args:
    base: the model that all experts were fine-tuned from.
    merged: the merged task vector, leaves `[*param_shape]`.
    masks: leaves `[K, *param_shape]`, from `tall_masks` or `emr_masks`.
    task: the task's index; may be traced, so `jax.vmap` makes all models.
    scales: `[K]`, or one for all.

  Returns:
    The model, in the base's structure and dtypes.

  Raises:
    ValueError: where there is no such task or not one scale for each, or merged
      does not fit the base.
  """
  transforms.check_weights(scales, masks, name='scales')
  num = jax.tree.leaves(masks)[0].shape[0]
  if is_concrete(task) and not 0 <= int(task) < num:
    raise ValueError(f'task must be in [0, {num}), got {task}')
  scale = jnp.broadcast_to(jnp.asarray(scales, jnp.float32), (num,))[task]

  def leaf_fn(d, mask):
    if not jnp.issubdtype(d.dtype, jnp.floating):
      return d
    wide, s = _wide(d, scale)
    return (s * jnp.where(mask[task], wide, 0)).astype(d.dtype)

  return tree.apply_delta(base, jax.tree.map(leaf_fn, merged, masks))
