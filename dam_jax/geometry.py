"""Aggregators that look at angles between experts, leaf by leaf.

`dam_jax.aggregators.slerp` is the one for two experts.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> tx = dj.geometry.model_stock()
  >>> deltas = {'w': jnp.array([[2., 0.], [0., 2.]])}
  >>> tx.update(deltas, tx.init(deltas))[0]['w'].tolist()
  [0.0, 0.0]
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import transforms
from dam_jax.base import is_concrete
from dam_jax.base import leafwise

PAIRS = ('cosine', 'angle')
"""What `model_stock` averages over pairs of experts."""


def karcher(
  weights: ArrayLike | Sequence[float] = 1.0,
  *,
  space: str = 'weights',
  max_iter: int = 10,
  tol: float = 1e-5,
) -> optax.GradientTransformation:
  """Averages models on the sphere: the Karcher mean of their directions.

  With `u_t = theta_t / |theta_t|` and `a_t = w_t / sum w`, the mean `m` starts
  as the average's direction and moves by `v = sum_t a_t W_t / sin W_t (u_t -
  cos W_t m)`, where `W_t` is the angle between `m` and `u_t`:
  `m <- cos |v| m + sin |v| v / |v|`. The result is `sum_t a_t |theta_t| m`.

  Args:
    weights: `[K]`, or one for all; may be traced.
    space: average 'weights' (mergekit) or task vectors, 'delta'.
    max_iter: how often the mean moves at most.
    tol: length of a move below which to stop.

  Returns:
    The transformation; on weights its update needs the base's parameters.

  Raises:
    ValueError: where an option is none of those or a weight is negative; at
      update, where there is not a weight for each expert or no parameters.

  References:
    Wang et al., `Functionality-Oriented LLM Merging on the Fisher-Rao Manifold
    <https://arxiv.org/abs/2603.04972>`_, 2026
  """
  aggregators.check_space(space)
  if max_iter < 0 or not tol >= 0:
    raise ValueError(
      f'max_iter and tol must not be negative, got {max_iter} and {tol}'
    )
  concrete = all(map(is_concrete, jax.tree.leaves(weights)))
  if concrete and not (np.min(weights) >= 0 and np.max(weights) > 0):
    raise ValueError(
      f'weights must not be negative, nor all zero, got {weights}'
    )

  @jax.jit  # compiles its loop once for all leaves of one shape
  def leaf_fn(x, p):
    share = jnp.broadcast_to(jnp.asarray(weights, x.dtype), x.shape[:1])
    share /= jnp.sum(share)
    theta = (x + p[None]).reshape(x.shape[0], -1)
    length = jnp.linalg.norm(theta, axis=-1)
    direction = theta / jnp.where(length > 0, length, 1)[:, None]
    # A model of zeros has no direction, but it does shorten the mean.
    pull = jnp.where(length > 0, share, 0)
    pull /= jnp.where(jnp.any(pull > 0), jnp.sum(pull), 1)
    mean = _direction_of_mean(pull, direction, max_iter=max_iter, tol=tol)
    merged = jnp.sum(share * length) * mean.reshape(p.shape) - p
    return jnp.where(jnp.all(x == x[:1]), x[0], merged)

  reduce_fn = aggregators.by_leaf(leaf_fn)

  def karcher_fn(updates, params=None):
    transforms.check_weights(weights, updates)
    if space == 'delta':
      params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    if params is None:
      raise ValueError('karcher averages weights: pass params to update')
    return reduce_fn(updates, params)

  return leafwise(optax.stateless(karcher_fn))


def _direction_of_mean(
  pull: jax.Array, direction: jax.Array, *, max_iter: int, tol: float
) -> jax.Array:
  """Returns the Karcher mean `[P]` of unit vectors `[K, P]` by `pull` `[K]`."""
  num = pull.shape[0]
  mean = sum(pull[k] * direction[k] for k in range(num))
  norm = jnp.linalg.norm(mean)
  mean = jnp.where(
    norm < tol,
    direction[jnp.argmax(pull > 0)],
    mean / jnp.where(norm > 0, norm, 1),
  )

  def move(state):
    i, mean, _ = state
    cosine = jnp.clip(jnp.sum(direction * mean[None], axis=-1), -1, 1)
    angle = jnp.arccos(cosine)
    sine = jnp.where(jnp.sin(angle) > tol, jnp.sin(angle), 0)
    stretch = jnp.where(sine > 0, angle / jnp.where(sine > 0, sine, 1), 1)
    step = sum(
      pull[k] * stretch[k] * (direction[k] - cosine[k] * mean)
      for k in range(num)
    )
    size = jnp.linalg.norm(step)
    moved = jnp.cos(size) * mean + jnp.sinc(size / jnp.pi) * step
    moved /= jnp.maximum(jnp.linalg.norm(moved), tol)
    return i + 1, jnp.where(size < tol, mean, moved), size

  def go_on(state):
    i, _, size = state
    return (i < max_iter) & (size >= tol)

  start = (0, mean, jnp.full_like(norm, jnp.inf))
  return lax.while_loop(go_on, move, start)[1]


def model_stock(
  *, unit_axis: int | None = None, pairs: str = 'cosine'
) -> optax.GradientTransformation:
  """Averages the task vectors, shorter the wider the angle between them.

  `r / K sum_t tau_t` with `r = K c / (1 + (K - 1) c)`, where `c` is the mean
  cosine of pairs of task vectors. Where `1 + (K - 1) c` is zero, so is `r`.

  Args:
    unit_axis: None has one `r` a leaf; 0 or -1 one for each entry of that axis,
      a filter, such as -1 for each output neuron of a kernel `[in, out]`.
    pairs: average each pair's 'cosine' (mergekit), or its 'angle', of which
      `c` is then the cosine (FusionBench).

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those; at update, where there is one
      expert only.

  References:
    Jang et al., `Model Stock: All we need is just a few fine-tuned models
    <https://arxiv.org/abs/2403.19522>`_, 2024
  """
  transforms.check_unit_axis(unit_axis)
  if pairs not in PAIRS:
    raise ValueError(f'pairs must be one of {PAIRS}, got {pairs!r}')

  def leaf_fn(x):
    num = x.shape[0]
    tau, restore = transforms.units(x, unit_axis)
    norm = jnp.linalg.norm(tau, axis=-1, keepdims=True)
    unit = tau / jnp.where(norm > 0, norm, 1)
    gram = jnp.einsum('kun,jun->ukj', unit, unit, precision='highest')
    first, second = np.triu_indices(num, 1)
    cosine = jnp.clip(gram[:, first, second], -1, 1)
    if pairs == 'angle':
      c = jnp.cos(jnp.mean(jnp.arccos(cosine), axis=-1))
    else:
      c = jnp.mean(cosine, axis=-1)
    below = 1 + (num - 1) * c
    singular = jnp.abs(below) < 1e-6
    r = jnp.where(singular, 0, num * c / jnp.where(singular, 1, below))
    mean = sum(tau[k] for k in range(num)) / num
    return restore(r[:, None] * mean)

  reduce_fn = aggregators.by_leaf(leaf_fn)

  def stock_fn(updates, params=None):
    del params
    num = jax.tree.leaves(updates)[0].shape[0]
    if num < 2:
      raise ValueError(f'model_stock needs at least 2 experts, got {num}')
    return reduce_fn(updates)

  return leafwise(optax.stateless(stock_fn))
