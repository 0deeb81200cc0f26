"""Task vectors as matrices, and their singular value decompositions.

What `dam_jax.spectral` is made of. A leaf `[K, *shape]` becomes `[K, out, in]`,
as the papers have it, whichever axis of `shape` is that of the inputs.

  >>> import jax.numpy as jnp
  >>> to_matrices(jnp.ones((3, 8, 2)), input_axis=0).shape
  (3, 2, 8)
"""

from collections.abc import Callable, Hashable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import selection
from dam_jax import tree
from dam_jax.base import Leafwise
from dam_jax.base import entrywise
from dam_jax.base import leafwise
from dam_jax.base import made_of


def is_matrix(x: Any, axes: int) -> bool:
  """Whether a leaf of that many axes is a floating-point matrix."""
  return axes == 2 and tree.is_float(x)


def is_kernel(x: Any, axes: int) -> bool:
  """Whether it is one, or a convolution's kernel."""
  return axes >= 2 and tree.is_float(x)


def _named(
  group: str, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Sums over the leaves of a group alone where the model comes in parts."""
  tx = optax.with_extra_args_support(tx)

  def update_fn(
    updates, state, params=None, *, sum_parts=selection.whole, **extra_args
  ):
    sum_parts = selection.within(sum_parts, group)
    return tx.update(updates, state, params, sum_parts=sum_parts, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def split(
  tx: optax.GradientTransformation,
  others: optax.GradientTransformation,
  which: Callable[[Any, int], bool] = is_matrix,
) -> optax.GradientTransformationExtraArgs:
  """Applies one transformation to matrices, another to all other leaves."""
  txs: dict[Hashable, optax.GradientTransformation] = {
    'matrix': _named('matrix', tx),
    'other': _named('other', others),
  }

  def partition(leaves, leading):
    labels = jax.tree.map(
      lambda x: 'matrix' if which(x, x.ndim - leading) else 'other', leaves
    )
    return optax.partition(txs, labels)

  def init_fn(params):
    return partition(params, 0).init(params)

  def update_fn(updates, state, params=None, **extra_args):
    parts = partition(updates, 1)
    return parts.update(updates, state, params, **extra_args)

  both = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  # Which leaves are matrices only whole leaves tell.
  whole = all(isinstance(part, Leafwise) for part in (tx, others))
  return leafwise(both) if whole else both


def to_matrices(x: jax.Array, input_axis: int) -> jax.Array:
  """Returns a leaf `[K, ...]` as `[K, out, in]`, in float32 or wider."""
  x = x.astype(np.promote_types(x.dtype, np.float32))
  if input_axis == 0:
    return x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1)


def from_matrix(y: jax.Array, like: jax.Array, input_axis: int) -> jax.Array:
  """Returns `[..., out, in]` in the shape and dtype of a leaf `[K, ...]`."""
  y = y.swapaxes(-1, -2) if input_axis == 0 else y
  return y.reshape(*y.shape[:-2], *like.shape[1:]).astype(like.dtype)


def each(
  matrix_fn: Callable[[jax.Array], jax.Array], input_axis: int = 0
) -> Leafwise:
  """Makes a transformation of a function `[K, out, in] -> [out, in]`."""

  def leaf_fn(x):
    with jax.default_matmul_precision('highest'):
      merged = matrix_fn(to_matrices(x, input_axis))
    return from_matrix(merged, x, input_axis)

  return leafwise(
    optax.stateless(lambda updates, params=None: jax.tree.map(leaf_fn, updates))
  )


def scaled(
  tx: optax.GradientTransformation, scale: ArrayLike
) -> optax.GradientTransformationExtraArgs:
  """Multiplies what is floating-point of what a merge gives by a number."""

  def leaf_fn(x):
    if not tree.is_float(x):
      return x
    wide = np.promote_types(x.dtype, np.float32)
    return (x.astype(wide) * jnp.asarray(scale, wide)).astype(x.dtype)

  times = entrywise(
    optax.stateless(lambda updates, params=None: jax.tree.map(leaf_fn, updates))
  )
  both = optax.with_extra_args_support(optax.chain(tx, times))
  return made_of(both, [tx, times])


def each_matrix(decompose: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Decomposes each matrix of `[K, m, n]`.

  On a CPU one after the other: JAX 0.10 shares a batch out to its threads and
  waits for them in one. As many batches at a time as there are threads, of
  leaves or of devices, never end.
  """
  in_turn = functools.partial(lax.map, decompose)
  return lax.platform_dependent(x, cpu=in_turn, default=decompose)


def svd(
  x: jax.Array, *, floor: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns `U, S, V^T` of `[..., m, n]`, all zero where `S` is rounding.

  That is what is not above `floor`, `[..., 1]`; where None, what LAPACK leaves
  of a zero, three times over. Its singular vectors are any the machine likes.
  """
  one = functools.partial(jnp.linalg.svd, full_matrices=False)
  u, s, vt = one(x) if x.ndim == 2 else each_matrix(one, x)
  if floor is None:
    floor = jnp.finfo(s.dtype).eps * math.sqrt(sum(x.shape[-2:])) * s[..., :1]
  kept = ~(s <= floor)  # NaN is kept.
  return (
    jnp.where(kept[..., None, :], u, 0),
    jnp.where(kept, s, 0),
    jnp.where(kept[..., None], vt, 0),
  )


def orthogonal(x: jax.Array) -> jax.Array:
  """Returns the orthogonal matrix nearest to `[m, n]`, its polar factor."""
  u, _, vt = svd(x)
  return u @ vt


def side_by_side(x: jax.Array) -> jax.Array:
  """Returns `[x_1 ... x_K]`, `[m, K n]`, of `[K, m, n]`."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
