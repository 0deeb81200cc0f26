"""Transformations of task vectors that reduce the task axis to one update.

Each is an optax `GradientTransformation` from leaves `[K, *param_shape]` to
`[*param_shape]`. Sums over experts are written out, one fused pass: a sum over
the stacked axis is up to 40 times slower in XLA on a CPU.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import selection
from dam_jax import transforms
from dam_jax import tree
from dam_jax.base import entrywise
from dam_jax.base import leafwise

MERGES = ('mean', 'sum', 'max')
"""How `elect_mean` merges the entries that agree."""

SPACES = ('weights', 'delta')
"""What `slerp` and `dam_jax.geometry.karcher` take the angles of."""


def check_space(space: str) -> None:
  """Raises unless a space is one of `SPACES`."""
  if space not in SPACES:
    raise ValueError(f'space must be one of {SPACES}, got {space!r}')


def by_leaf(leaf_fn: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Makes a function of pytrees that reduces each leaf, in float32 or wider.

  Args:
    leaf_fn: `([K, *param_shape], *rest) -> [*param_shape]`, of floating-point
      leaves.

  Returns:
    `(updates, *rest) -> update`, in the dtypes of the updates; where a leaf is
    not floating point, the first task's.
  """

  def wide_fn(x, *rest):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x[0]
    wide = np.promote_types(x.dtype, np.float32)
    return leaf_fn(*(y.astype(wide) for y in (x, *rest))).astype(x.dtype)

  return functools.partial(jax.tree.map, wide_fn)


def _sum(terms: jax.Array | Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def _balance(sign: jax.Array) -> jax.Array:
  """Counts how many more entries of `[P]` are positive than negative."""
  return jnp.sum(sign.astype(jnp.int32))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b, axis=-1, keepdims=True)


def mean() -> optax.GradientTransformation:
  """Averages the task vectors.

  Examples:
    >>> mean().update({'w': jnp.array([[1.], [3.]])}, None)[0]['w'].tolist()
    [2.0]
  """

  def leaf_fn(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x[0]
    return _sum(x) / x.shape[0]

  return entrywise(
    optax.stateless(lambda updates, params=None: jax.tree.map(leaf_fn, updates))
  )


def weighted_sum(
  weights: ArrayLike | Sequence[float] = 1.0,
) -> optax.GradientTransformation:
  """Sums the task vectors, `sum_t w_t tau_t`.

  Args:
    weights: `[K]`, or one for all; may be traced.

  Returns:
    The transformation.

  Raises:
    ValueError: at update, where the number of weights is not that of tasks or
      one is not finite.

  Examples:
    >>> deltas = {'w': jnp.array([[1.], [3.]])}
    >>> weighted_sum([1., 0.5]).update(deltas, None)[0]['w'].tolist()
    [2.5]
  """

  def sum_fn(updates, params=None):
    del params
    transforms.check_weights(weights, updates)

    def leaf_fn(x):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[0]
      w = jnp.broadcast_to(jnp.asarray(weights, x.dtype), x.shape[:1])
      return _sum([w[k] * x[k] for k in range(x.shape[0])])

    return jax.tree.map(leaf_fn, updates)

  return entrywise(optax.stateless(sum_fn))


def elect_mean(
  merge: str = 'mean',
  *,
  weights: ArrayLike | Sequence[float] = 1.0,
  scale: ArrayLike = 1.0,
  reading: str = 'paper',
) -> optax.GradientTransformation:
  """Elects a sign for each entry and merges the entries that have it.

  The sign is that of `sum_t tau_t`; where that is zero, the sign that most
  entries of the whole model have. mergekit weighs the task vectors before the
  election, takes + where the sum is zero, and divides by the sum of the weights
  that agree.

  Args:
    merge: 'mean' of the entries that are not zero, 'sum', or 'max' by
      magnitude.
    weights: `[K]`, or one for all, applied after the election; may be traced.
    scale: of the result; may be traced.
    reading: the 'paper' or 'mergekit'.

  Returns:
    The transformation. Its update takes `sum_parts`, a
    `dam_jax.selection.SumParts`, where `updates` are a part of the model.

  Raises:
    ValueError: where merge is none of those; at update, where the number of
      weights is not that of tasks or one is not finite.

  Examples:
    >>> deltas = {'w': jnp.array([[3., -1.], [1., -2.], [-1., 0.]])}
    >>> elect_mean().update(deltas, None)[0]['w'].tolist()
    [2.0, -1.5]

  References:
    Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
    <https://arxiv.org/abs/2306.01708>`_, 2023
  """
  if merge not in MERGES:
    raise ValueError(f'merge must be one of {MERGES}, got {merge!r}')
  transforms.check_reading(reading)

  def update_fn(
    updates, state, params=None, *, sum_parts=selection.whole, **extra_args
  ):
    del params, extra_args
    if not jax.tree.leaves(updates):
      return updates, state
    transforms.check_weights(weights, updates)
    flat = tree.ravel(updates, leading=1)
    tau = flat.vector
    w = jnp.broadcast_to(jnp.asarray(weights, tau.dtype), tau.shape[:1])
    weighted = [w[k] * t for k, t in enumerate(tau)]
    if reading == 'paper':
      voters, voices = tau, jnp.ones_like(w)
      sign = jnp.sign(_sum(tau))
      majority = sum_parts(_balance(sign), jnp.sign)
      sign = jnp.where(sign == 0, majority.astype(sign.dtype), sign)
    else:
      voters, voices = weighted, w
      sign = jnp.where(_sum(weighted) >= 0, 1, -1)
    agree = [jnp.where(sign > 0, t > 0, t < 0) for t in voters]
    kept = [jnp.where(a, x, 0) for a, x in zip(agree, weighted, strict=True)]
    if merge == 'max':
      merged = functools.reduce(
        lambda a, b: jnp.where(jnp.abs(a) >= jnp.abs(b), a, b), kept
      )
    else:
      merged = _sum(kept)
    if merge == 'mean':
      share = _sum([jnp.where(a, voices[k], 0) for k, a in enumerate(agree)])
      merged /= jnp.where(share == 0, 1, share)
    merged = merged * jnp.asarray(scale, merged.dtype)
    rest = tuple(x[0] for x in flat.rest)
    return tree.Raveled(merged, rest, flat.layout).unravel(), state

  return entrywise(
    optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
  )


def slerp(
  t: ArrayLike = 0.5,
  *,
  parallel: float = 0.9995,
  space: str = 'weights',
  unit_axis: int | None = None,
) -> optax.GradientTransformation:
  """Interpolates two models on the sphere, leaf by leaf.

  `sin((1-t) W) / sin W a + sin(t W) / sin W b`, where `W` is the angle between
  `a` and `b`; linear where they are nearly parallel or one of them is zero.

  Args:
    t: 0 gives the first model, 1 the second; may be traced.
    parallel: magnitude of the cosine above which to interpolate linearly.
    space: whether `a` and `b` are 'weights' or task vectors, 'delta'.
    unit_axis: None has one angle a leaf; 0 or -1 one for each entry of that
      axis, such as -1 for each output neuron of a kernel `[in, out]`.

  Returns:
    The transformation; on weights its update needs the base's parameters.

  Raises:
    ValueError: where space or unit_axis is none of those; at update, where
      there are not two experts or no parameters.

  References:
    Shoemake, `Animating rotation with quaternion curves
    <https://doi.org/10.1145/325165.325242>`_, 1985
  """
  check_space(space)
  transforms.check_unit_axis(unit_axis)

  def leaf_fn(x, p):
    (p,), _ = transforms.units(p[None], unit_axis)
    x, restore = transforms.units(x, unit_axis)
    a, b, s = p + x[0], p + x[1], jnp.asarray(t, x.dtype)
    norm = jnp.sqrt(_dot(a, a)) * jnp.sqrt(_dot(b, b))
    cosine = _dot(a, b) / jnp.where(norm > 0, norm, 1)
    linear = (jnp.abs(cosine) > parallel) | (norm == 0)
    linear |= jnp.all(a == b, axis=-1, keepdims=True)
    angle = jnp.arccos(jnp.where(linear, 0, cosine))
    first = jnp.where(linear, 1 - s, jnp.sin((1 - s) * angle) / jnp.sin(angle))
    second = jnp.where(linear, s, jnp.sin(s * angle) / jnp.sin(angle))
    # Of the weights, as a change of the base: at equal weights it is zero.
    excess = jnp.where(linear, 0, first + second - 1)
    return restore(first * x[0] + second * x[1] + excess * p)

  reduce_fn = by_leaf(leaf_fn)

  def slerp_fn(updates, params=None):
    num = jax.tree.leaves(updates)[0].shape[0]
    if num != 2:
      raise ValueError(f'slerp interpolates 2 experts, got {num}')
    if space == 'delta':
      params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    if params is None:
      raise ValueError('slerp interpolates weights: pass params to update')
    return reduce_fn(updates, params)

  return leafwise(optax.stateless(slerp_fn))


def keep_base() -> optax.GradientTransformation:
  """Changes nothing: the update is zero, without a task axis.

  `optax.set_to_zero` would keep the task axis.

  Examples:
    >>> keep_base().update({'w': jnp.ones((2, 1))}, None)[0]['w'].tolist()
    [0.0]
  """

  def zero_fn(updates: Any, params: Any = None):
    del params
    return jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)

  return entrywise(optax.stateless(zero_fn))
