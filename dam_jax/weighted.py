"""Aggregators that weigh task vectors by statistics of data.

Like those of `dam_jax.aggregators`, each reduces leaves `[K, *param_shape]` to
`[*param_shape]`. `dam_jax.statistics` makes what they weigh by, and
`dam_jax.informed` names the methods.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> tx = dj.weighted.precision_weighted({'w': jnp.array([[3.], [1.]])})
  >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
  >>> dj.merge(tx, base, experts).params['w'].tolist()
  [2.5]
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import tree
from dam_jax.base import is_concrete
from dam_jax.typing import Deltas


def _sum(terms: Any) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def precision_weighted(
  precisions: Deltas, *, epsilon: ArrayLike = 0.0, normalize: bool = False
) -> optax.GradientTransformation:
  """Averages experts, each parameter by its precision.

  `theta = sum_t F_t theta_t / sum_t F_t`, entry by entry: the mode of the
  product of Gaussians around the experts whose precisions are `F_t`. Where all
  `F_t` are zero, nothing is known of an entry and it is the plain mean.

  Args:
    precisions: `F_t`, not negative, a pytree like the experts, leaves
      `[K, *param_shape]`.
    epsilon: added to every precision, so that entries that matter to no expert
      go to the plain mean; FusionBench has 1e-6. May be traced.
    normalize: divide each expert's precisions by their Euclidean norm over the
      whole model plus epsilon, so that no expert outweighs the others
      everywhere; an expert whose precisions are all zero then has no weight,
      where FusionBench gives it nearly all.

  Returns:
    The transformation.

  Raises:
    ValueError: where epsilon is negative or not finite; at update, where
      precisions do not fit the task vectors, with all differences.

  Examples:
    >>> precisions = {'w': jnp.array([[3., 0.], [1., 0.]])}
    >>> deltas = {'w': jnp.array([[1., 1.], [5., 5.]])}
    >>> precision_weighted(precisions).update(deltas, None)[0]['w'].tolist()
    [2.0, 3.0]

  References:
    Matena and Raffel, `Merging Models with Fisher-Weighted Averaging
    <https://arxiv.org/abs/2111.09832>`_, 2022
  """
  check_epsilon(epsilon)

  def weigh_fn(updates, params=None):
    del params
    lines = tree.differences(updates, precisions, dtypes=False)
    if lines:
      raise ValueError(
        '\n  '.join(['precisions do not fit the task vectors:', *lines])
      )
    leaves = list(map(tree.is_float, jax.tree.leaves(updates)))
    given = jax.tree.leaves(precisions)
    floating = [f for f, keep in zip(given, leaves, strict=True) if keep]
    scales = _inverse_norms(floating, epsilon) if normalize else None

    def leaf_fn(x, f):
      if not tree.is_float(x):
        return x[0]
      wide = np.promote_types(x.dtype, np.float32)
      weights = f.astype(wide) + jnp.asarray(epsilon, wide)
      if scales is not None:
        each = scales.astype(wide).reshape(-1, *(1,) * (x.ndim - 1))
        weights = each * weights
      values, total = x.astype(wide), _sum(weights)
      merged = _sum([w * v for w, v in zip(weights, values, strict=True)])
      known = total > 0
      merged = merged / jnp.where(known, total, 1)
      mean = _sum(values) / x.shape[0]
      return jnp.where(known, merged, mean).astype(x.dtype)

    return jax.tree.map(leaf_fn, updates, precisions)

  return optax.stateless(weigh_fn)


def check_epsilon(epsilon: ArrayLike) -> None:
  """Raises unless what is added to precisions is finite and not negative."""
  if is_concrete(epsilon):
    value = float(np.asarray(epsilon).item())
    if not 0 <= value < np.inf:
      raise ValueError(f'epsilon must be finite and not negative, got {value}')


def _inverse_norms(
  precisions: list[jax.Array], epsilon: ArrayLike
) -> jax.Array:
  """Returns `[K]`, one over each expert's norm; zero where that is."""
  wide = functools.reduce(
    np.promote_types, [f.dtype for f in precisions], np.dtype(np.float32)
  )
  squares = _sum(
    [
      jnp.sum(jnp.square(f.astype(wide)), axis=tuple(range(1, f.ndim)))
      for f in precisions
    ]
  )
  norms = jnp.sqrt(squares) + jnp.asarray(epsilon, wide)
  known = squares > 0
  return jnp.where(known, 1 / jnp.where(known, norms, 1), 0)


def gram_weighted(
  grams: Mapping[str, jax.Array], *, scale: ArrayLike = 0.9
) -> optax.GradientTransformation:
  """Merges linear layers so that each expert's outputs are kept best.

  `W = (sum_t G_t)^-1 sum_t G_t W_t` minimises `sum_t ||X_t W - X_t W_t||^2`
  with `G_t = X_t^T X_t`, whose entries off the diagonal are first multiplied by
  `scale`. Leaves without a Gram are averaged.

  It is solved as `M + (sum_t G_t)^-1 sum_t G_t (W_t - M)` around the plain mean
  `M`, which is the same; inputs that are zero for all experts give `M`. Where
  the sum is singular (a scale of 1 and few rows) its diagonal is raised by
  `in` roundings, which leads to `M` where there are no inputs. A layer costs a
  factorisation of `in x in`, in float32, or in float64 where it has that.

  Args:
    grams: `[K, in, in]` by the path of the kernel `[in, out]` that reads those
      inputs, as Flax lays it out; a kernel `[in, ...]` is one of `[in, out]`.
      A common factor does not matter.
    scale: of entries off the diagonal, in [0, 1]; the paper has 0.9,
      FusionBench 0.95. 1 changes none and 0 keeps the diagonal alone. May be
      traced.

  Returns:
    The transformation.

  Raises:
    ValueError: where the scale is outside [0, 1]; at update, where a Gram has
      no kernel or not its shape, all of them at once.

  Examples:
    >>> grams = {'w': jnp.array([[[3.]], [[1.]]])}
    >>> deltas = {'w': jnp.array([[[1.]], [[5.]]]), 'b': jnp.ones((2, 1))}
    >>> gram_weighted(grams).update(deltas, None)[0]
    {'b': Array([1.], dtype=float32), 'w': Array([[2.]], dtype=float32)}

  References:
    Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
    <https://arxiv.org/abs/2212.09849>`_, 2023
  """
  check_scale(scale)

  def weigh_fn(updates, params=None):
    leaves = tree.flatten(updates)
    _check_grams(grams, leaves)
    averaged, _ = aggregators.mean().update(updates, optax.EmptyState(), params)
    merged = tree.flatten(averaged)
    for path, g in grams.items():
      merged[path] = _regress(leaves[path], g, scale)
    return jax.tree.unflatten(jax.tree.structure(updates), merged.values())

  return optax.stateless(weigh_fn)


def check_scale(scale: ArrayLike) -> None:
  """Raises unless the scale of entries off the diagonal is in [0, 1]."""
  if is_concrete(scale):
    value = float(np.asarray(scale).item())
    if not 0 <= value <= 1:
      raise ValueError(f'scale must be in [0, 1], got {value}')


def _check_grams(grams: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
  lines = [f'{path}: no such leaf' for path in grams if path not in leaves]
  for path, g in grams.items():
    if path in leaves:
      x = leaves[path]
      want = (*x.shape[:2], *x.shape[1:2])
      if not tree.is_float(x) or len(want) != 3 or g.shape != want:
        lines.append(
          f'{path}: got a Gram {list(g.shape)} of {x.dtype.name}'
          f'{list(x.shape)}, want [K, in, in] of floating point [K, in, ...]'
        )
  if lines:
    raise ValueError('\n  '.join(['Grams do not fit the kernels:', *lines]))


@jax.jit  # So that layers of one shape are compiled once.
def _regress(x: jax.Array, grams: jax.Array, scale: ArrayLike) -> jax.Array:
  """Returns a kernel `[in, ...]` of `[K, in, ...]` by Grams `[K, in, in]`."""
  wide = np.promote_types(np.promote_types(x.dtype, grams.dtype), np.float32)
  kernels = x.astype(wide).reshape(*x.shape[:2], -1)
  mean = _sum(kernels) / x.shape[0]
  on = np.eye(x.shape[1], dtype=bool)
  scaled = [
    jnp.where(on, g, jnp.asarray(scale, wide) * g) for g in grams.astype(wide)
  ]
  total = _sum(scaled)
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  right = _sum(
    [product(g, w - mean) for g, w in zip(scaled, kernels, strict=True)]
  )
  # Inputs of unit size condition the equations; those that are zero drop out.
  power = jnp.diagonal(total)
  unit = jnp.where(power > 0, lax.rsqrt(jnp.where(power > 0, power, 1)), 0)
  left = jnp.where(on, 1, unit[:, None] * total * unit[None])
  moved = unit[:, None] * _solve(left, unit[:, None] * right)
  return (mean + moved).reshape(x.shape[1:]).astype(x.dtype)


def _solve(left: jax.Array, right: jax.Array) -> jax.Array:
  """Solves equations of positive semi-definite `left`, its diagonal one."""
  factor = jnp.linalg.cholesky(left)
  rounding = len(left) * jnp.finfo(left.dtype).eps
  # Not a number where `left` is singular, so that this is False.
  regular = jnp.min(jnp.diagonal(factor)) ** 2 > rounding

  def raised():
    raised = left + rounding * jnp.eye(len(left), dtype=left.dtype)
    return jnp.linalg.solve(raised, right)

  return lax.cond(
    regular, lambda: jax.scipy.linalg.cho_solve((factor, True), right), raised
  )
