"""Transformations of task vectors that keep the task axis.

Each is an optax `GradientTransformation` on a pytree with leaves
`[K, *param_shape]`; `dam_jax.aggregators` reduce the task axis.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> tx = dj.transforms.trim(0.25)
  >>> deltas = {'w': jnp.array([[1., -4., 3., 0.]])}
  >>> tx.update(deltas, tx.init(deltas))[0]['w'].tolist()
  [[0.0, -4.0, 3.0, 0.0]]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import selection
from dam_jax import tree
from dam_jax.base import entrywise
from dam_jax.base import is_concrete
from dam_jax.base import leafwise
from dam_jax.base import placewise
from dam_jax.typing import Deltas


def check_finite(name: str, value: Any) -> None:
  """Raises unless a concrete value, or each of several, is finite."""
  known = all(map(is_concrete, jax.tree.leaves(value)))
  if known and not np.isfinite(np.asarray(value, np.float64)).all():
    raise ValueError(f'{name} must be finite, got {value}')


def check_share(name: str, value: ArrayLike, *, zero: bool, one: bool) -> None:
  """Raises unless a concrete value lies between 0 and 1."""
  if not is_concrete(value):
    return
  number = np.asarray(value).item()
  inside = 0 < number < 1 or (zero and number == 0) or (one and number == 1)
  if not inside:
    left, right = '[' if zero else '(', ']' if one else ')'
    raise ValueError(f'{name} must be in {left}0, 1{right}, got {number}')


def check_unit_axis(unit_axis: int | None) -> None:
  """Raises unless units lie on the first or last axis, or are whole leaves."""
  if unit_axis not in (None, 0, -1):
    raise ValueError(f'unit_axis must be None, 0 or -1, got {unit_axis!r}')


def units(
  x: jax.Array, unit_axis: int | None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Lays a leaf out as one vector a unit (an output neuron, a filter).

  Args:
    x: `[K, *shape]`.
    unit_axis: which axis of `shape` counts the units; None, or a leaf of less
      than two axes: the leaf is one unit.

  Returns:
    `[K, U, N]`, and what makes `[..., *shape]` of `[..., U, N]`.
  """
  shape = x.shape[1:]
  if unit_axis is None or len(shape) < 2:
    flat = x.reshape(x.shape[0], 1, -1)
    return flat, lambda y: y.reshape(*y.shape[:-2], *shape)
  axis = unit_axis % len(shape) - len(shape)
  moved = jnp.moveaxis(x, axis, 1)

  def restore(y):
    y = y.reshape(*y.shape[:-2], *moved.shape[1:])
    return jnp.moveaxis(y, -len(shape), axis)

  return moved.reshape(*moved.shape[:2], -1), restore


def _keep_largest(vector: jax.Array, density: ArrayLike, **how) -> jax.Array:
  """Zeroes all but the top entries of `[..., P]` by magnitude."""
  magnitude = jnp.abs(vector)
  least = selection.threshold(magnitude, density, **how)
  return jnp.where(magnitude >= least[..., None], vector, 0)


READINGS = ('paper', 'mergekit')
"""Whose reading of a method where the paper and a tool differ."""


def check_rescale(rescale: bool | str) -> None:
  """Raises unless it says how to make up for what is dropped."""
  if rescale not in (True, False, 'l1'):
    raise ValueError(f"rescale must be True, False or 'l1', got {rescale!r}")


def check_reading(reading: str) -> None:
  """Raises unless a reading is one of `READINGS`."""
  if reading not in READINGS:
    raise ValueError(f'reading must be one of {READINGS}, got {reading!r}')


def trim(
  density: ArrayLike, *, scope: str = 'model', reading: str = 'paper'
) -> optax.GradientTransformation:
  """Keeps each task vector's largest entries by magnitude, zeroes the others.

  The threshold is the entry of rank `P - floor(density P)` in ascending order,
  and what equals it is kept, as in the code of TIES: one entry more than
  `floor(density P)` where magnitudes differ. mergekit keeps
  `max(1, floor(density P))`.

  Args:
    density: share of entries to keep, in (0, 1]; may be traced.
    scope: 'model' ranks the entries of all leaves together (paper,
      FusionBench), 'leaf' those of each leaf (mergekit).
    reading: how many to keep, as the 'paper' or as 'mergekit' has it.

  Returns:
    The transformation. Its update takes `sum_parts`, a
    `dam_jax.selection.SumParts`, where `updates` are a part of the model.

  Raises:
    ValueError: where density or scope is none of those.

  References:
    Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
    <https://arxiv.org/abs/2306.01708>`_, 2023
  """
  check_share('density', density, zero=False, one=True)
  if scope not in ('model', 'leaf'):
    raise ValueError(f"scope must be 'model' or 'leaf', got {scope!r}")
  check_reading(reading)
  more = 1 if reading == 'paper' else 0

  def leaf_fn(x):
    flat = x.reshape(x.shape[0], -1)
    return _keep_largest(flat, density, more=more).reshape(x.shape)

  def update_fn(
    updates, state, params=None, *, sum_parts=selection.whole, **extra_args
  ):
    del params, extra_args
    if scope == 'leaf' or not jax.tree.leaves(updates):
      return jax.tree.map(leaf_fn, updates), state
    flat = tree.ravel(updates, leading=1)
    kept = _keep_largest(flat.vector, density, more=more, sum_parts=sum_parts)
    return flat.unravel(kept), state

  tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
  return entrywise(tx) if scope == 'model' else leafwise(tx)


def keep_sum(kept: jax.Array, x: jax.Array) -> jax.Array:
  """Scales each task's leaf to the sum of magnitudes that it had.

  As mergekit rescales: what nearly vanishes is left as it is.

  Args:
    kept: `[K, ...]`, `x` with some entries dropped.
    x: `[K, ...]`.

  Returns:
    `[K, ...]`.
  """
  axes = tuple(range(1, x.ndim))
  want, got = (jnp.sum(jnp.abs(y), axis=axes, keepdims=True) for y in (x, kept))
  small = (want < 1e-7) | (got < 1e-7)
  return kept * jnp.where(small, 1, want / jnp.where(small, 1, got))


class DropState(NamedTuple):
  """State of `drop`.

  Attributes:
    key: of the next update's draw.
  """

  key: jax.Array


def leaf_keys(key: jax.Array, updates: Deltas, salt: ArrayLike = 0) -> Any:
  """Derives a key for each leaf from its path.

  So that a leaf's draws are the same whether its model is merged as a whole or
  leaf by leaf.

  Args:
    key: of all draws.
    updates: any pytree.
    salt: what to fold in in place of a path that is empty: the CRC-32 of a
      leaf's path where `updates` are that bare leaf.

  Returns:
    A pytree of keys like `updates`.
  """
  keys = [
    jax.random.fold_in(key, zlib.crc32(name.encode()) if name else salt)
    for name in tree.names(updates)
  ]
  return jax.tree.unflatten(jax.tree.structure(updates), keys)


def uniform(key: jax.Array, like: jax.Array) -> jax.Array:
  """Draws from U[0, 1) for each entry of a leaf."""
  return jax.random.uniform(key, like.shape, jnp.float32)


def drop(
  rate: ArrayLike,
  *,
  rescale: bool | str = True,
  seed: int = 0,
  uniform_fn: Callable[[jax.Array, jax.Array], jax.Array] = uniform,
) -> optax.GradientTransformation:
  """Drops entries of task vectors at random and rescales the others.

  Args:
    rate: probability that an entry is dropped, in [0, 1); may be traced.
    rescale: divide what is kept by the probability to keep it (paper); 'l1'
      gives each task and leaf its sum of magnitudes again (mergekit).
    seed: of the draws.
    uniform_fn: `(key, leaf) -> U[0, 1)` like the leaf `[K, ...]`; an entry is
      kept where it exceeds the rate.

  Returns:
    The transformation; its state is a `DropState`. Its update takes `salt`, as
    `leaf_keys` does, where `updates` are one leaf of the model.

  Raises:
    ValueError: where the rate is outside [0, 1) or rescale is none of those.

  References:
    Yu et al., `Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch <https://arxiv.org/abs/2311.03099>`_, 2024
  """
  check_share('rate', rate, zero=True, one=False)
  check_rescale(rescale)

  def init_fn(params):
    del params
    return DropState(jax.random.key(seed))

  def update_fn(updates, state, params=None, *, salt=0, **extra_args):
    del params, extra_args
    key, draw = jax.random.split(state.key)

    def leaf_fn(key, x):
      if not tree.is_float(x):
        return x
      kept = jnp.where(uniform_fn(key, x) > rate, x, 0)
      if rescale == 'l1':
        return keep_sum(kept, x)
      scale = jnp.asarray(1 / (1 - rate) if rescale else 1, x.dtype)
      return kept * scale

    dropped = jax.tree.map(leaf_fn, leaf_keys(draw, updates, salt), updates)
    return dropped, DropState(key)

  return placewise(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def scale_tasks(
  weights: Sequence[float] | jax.Array,
) -> optax.GradientTransformation:
  """Multiplies each task vector by its own weight.

  Args:
    weights: `[K]`.

  Returns:
    The transformation.

  Raises:
    ValueError: at update, where the number of weights is not that of tasks.

  Examples:
    >>> tx = scale_tasks([1., 2.])
    >>> tx.update({'w': jnp.ones((2, 1))}, tx.init(None))[0]['w'].tolist()
    [[1.0], [2.0]]
  """

  def scale_fn(updates, params=None):
    del params
    check_weights(weights, updates)

    def leaf_fn(x):
      w = jnp.asarray(weights, x.dtype)
      return x * w.reshape(-1, *(1,) * (x.ndim - 1))

    return jax.tree.map(leaf_fn, updates)

  return entrywise(optax.stateless(scale_fn))


def check_weights(
  weights: Any, updates: Deltas, *, name: str = 'weights'
) -> None:
  """Raises unless there is one finite weight for each task.

  Args:
    weights: `[K]`, or a scalar for all tasks.
    updates: task vectors, leaves `[K, ...]`.
    name: of the weights.

  Raises:
    ValueError: with what was found and wanted.
  """
  num = jax.tree.leaves(updates)[0].shape[0]
  shape = np.shape(weights)
  if shape not in ((), (num,)):
    raise ValueError(
      f'{name} are {list(shape)}, want one for each of {num} experts'
    )
  check_finite(name, weights)


def mask_by(masks: Any) -> optax.GradientTransformation:
  """Multiplies task vectors by masks.

  Args:
    masks: a pytree like the parameters, leaves `[*param_shape]` for all tasks
      or `[K, *param_shape]` for each.

  Returns:
    The transformation.

  Examples:
    >>> tx = mask_by({'w': jnp.array([1., 0.])})
    >>> tx.update({'w': jnp.ones((1, 2))}, tx.init(None))[0]['w'].tolist()
    [[1.0, 0.0]]
  """

  def leaf_fn(x, m):
    m = jnp.asarray(m, x.dtype)
    return x * (m if m.ndim == x.ndim else m[None])

  return optax.stateless(
    lambda updates, params=None: jax.tree.map(leaf_fn, updates, masks)
  )
