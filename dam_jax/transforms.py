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
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import tree
from dam_jax.typing import Deltas


def is_concrete(x: Any) -> bool:
  """Whether a hyper-parameter's value can be looked at, outside of tracing."""
  return not isinstance(x, jax.core.Tracer)


def _share(name: str, value: ArrayLike, *, zero: bool, one: bool) -> None:
  """Raises unless a concrete value lies between 0 and 1."""
  if not is_concrete(value):
    return
  number = np.asarray(value).item()
  inside = 0 < number < 1 or (zero and number == 0) or (one and number == 1)
  if not inside:
    left, right = '[' if zero else '(', ']' if one else ')'
    raise ValueError(f'{name} must be in {left}0, 1{right}, got {number}')


def _ranked(magnitude: jax.Array, rank: ArrayLike) -> jax.Array:
  """Returns what a sort of `[..., P]` would have at a rank, counted from 1.

  Floats that are not negative are ordered as their bits, so each pass over them
  settles one bit. On a CPU that takes a sixteenth of a sort's time.
  """
  bits = magnitude.dtype.itemsize * 8
  words = lax.bitcast_convert_type(magnitude, jnp.dtype(f'uint{bits}'))

  def settle(i, found):
    # The sign is zero: the first bit to settle is the one after it.
    larger = found | (one << (bits - 2 - i).astype(one.dtype))
    below = jnp.sum(words < larger[..., None], axis=-1)
    return jnp.where(below < rank, larger, found)

  found, one = jnp.zeros_like(words[..., 0]), jnp.ones((), words.dtype)
  return lax.bitcast_convert_type(
    lax.fori_loop(0, bits - 1, settle, found), magnitude.dtype
  )


def _keep_largest(vector: jax.Array, density: ArrayLike) -> jax.Array:
  """Zeroes all but the top entries of `[..., P]` by magnitude."""
  size = vector.shape[-1]
  magnitude = jnp.abs(vector)
  if is_concrete(density):
    rank = size - math.floor(np.asarray(density).item() * size)
  else:
    rank = size - jnp.floor(density * size).astype(jnp.int32)
  threshold = _ranked(magnitude, jnp.maximum(rank, 1))[..., None]
  return jnp.where(magnitude >= threshold, vector, 0)


def trim(
  density: ArrayLike, *, scope: str = 'model'
) -> optax.GradientTransformation:
  """Keeps each task vector's largest entries by magnitude, zeroes the others.

  The threshold is the entry of rank `P - floor(density P)` in ascending order,
  and what equals it is kept, as in the code of TIES: one entry more than
  `floor(density P)` where magnitudes differ.

  Args:
    density: share of entries to keep, in (0, 1]; may be traced.
    scope: 'model' ranks the entries of all leaves together (paper,
      FusionBench), 'leaf' those of each leaf (mergekit).

  Returns:
    The transformation.

  Raises:
    ValueError: where density or scope is none of those.

  References:
    Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
    <https://arxiv.org/abs/2306.01708>`_, 2023
  """
  _share('density', density, zero=False, one=True)
  if scope not in ('model', 'leaf'):
    raise ValueError(f"scope must be 'model' or 'leaf', got {scope!r}")

  def leaf_fn(x):
    flat = x.reshape(x.shape[0], -1)
    return _keep_largest(flat, density).reshape(x.shape)

  def trim_fn(updates, params=None):
    del params
    if scope == 'leaf':
      return jax.tree.map(leaf_fn, updates)
    flat = tree.ravel(updates, leading=1)
    return flat.unravel(_keep_largest(flat.vector, density))

  return optax.stateless(trim_fn)


class DropState(NamedTuple):
  """State of `drop`.

  Attributes:
    key: of the next update's draw.
  """

  key: jax.Array


def _uniform(key: jax.Array, like: jax.Array) -> jax.Array:
  return jax.random.uniform(key, like.shape, jnp.float32)


def drop(
  rate: ArrayLike,
  *,
  rescale: bool = True,
  seed: int = 0,
  uniform_fn: Callable[[jax.Array, jax.Array], jax.Array] = _uniform,
) -> optax.GradientTransformation:
  """Drops entries of task vectors at random and rescales the others.

  Args:
    rate: probability that an entry is dropped, in [0, 1); may be traced.
    rescale: divide what is kept by the probability to keep it.
    seed: of the draws.
    uniform_fn: `(key, leaf) -> U[0, 1)` like the leaf `[K, ...]`; an entry is
      kept where it exceeds the rate.

  Returns:
    The transformation; its state is a `DropState`.

  Raises:
    ValueError: where the rate is outside [0, 1).

  References:
    Yu et al., `Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch <https://arxiv.org/abs/2311.03099>`_, 2024
  """
  _share('rate', rate, zero=True, one=False)

  def init_fn(params):
    del params
    return DropState(jax.random.key(seed))

  def update_fn(updates, state, params=None):
    del params
    key, draw = jax.random.split(state.key)
    leaves, treedef = jax.tree.flatten(updates)

    def leaf_fn(i, x):
      kept = uniform_fn(jax.random.fold_in(draw, i), x) > rate
      scale = jnp.asarray(1 / (1 - rate) if rescale else 1, x.dtype)
      return jnp.where(kept, x * scale, 0)

    dropped = [leaf_fn(i, x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, dropped), DropState(key)

  return optax.GradientTransformation(init_fn, update_fn)


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

  return optax.stateless(scale_fn)


def check_weights(weights: Any, updates: Deltas) -> None:
  """Raises unless there is one finite weight for each task.

  Args:
    weights: `[K]`, or a scalar for all tasks.
    updates: task vectors, leaves `[K, ...]`.

  Raises:
    ValueError: with what was found and wanted.
  """
  num = jax.tree.leaves(updates)[0].shape[0]
  shape = np.shape(weights)
  if shape not in ((), (num,)):
    raise ValueError(
      f'weights are {list(shape)}, want one for each of {num} experts'
    )
  concrete = all(map(is_concrete, jax.tree.leaves(weights)))
  if concrete and not np.isfinite(np.asarray(weights, np.float64)).all():
    raise ValueError(f'weights must be finite, got {weights}')


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
