"""Merges that weigh whole leaves: sums, averages, arcs and centres.

`dam_jax.recipes.sparsification` has those that choose among entries.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import transforms


def average() -> optax.GradientTransformation:
  """Averages the experts, `theta = 1/K sum_t theta_t`.

  Returns:
    The transformation.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> dj.merge(average(), base, experts).params['w'].tolist()
    [3.0]

  References:
    Wortsman et al., `Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time
    <https://arxiv.org/abs/2203.05482>`_, 2022
  """
  return aggregators.mean()


def weighted_average(
  weights: Sequence[float], *, normalize: bool = True
) -> optax.GradientTransformation:
  """Averages the experts with weights, `theta = sum_t w_t theta_t / sum_t w_t`.

  Args:
    weights: `[K]`.
    normalize: divide by their sum; otherwise `theta = sum_t w_t theta_t`.

  Returns:
    The transformation.

  Raises:
    ValueError: where a weight is not finite, or their sum is zero and divides.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> dj.merge(weighted_average([3., 1.]), base, experts).params['w'].tolist()
    [2.5]

  References:
    Wortsman et al., `Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time
    <https://arxiv.org/abs/2203.05482>`_, 2022
  """
  w = np.asarray(weights, np.float64)
  total = w.sum()
  if not np.isfinite(w).all() or (normalize and total == 0):
    raise ValueError(
      f'weights must be finite and not sum to zero, got {list(weights)}'
    )
  if normalize:
    return aggregators.weighted_sum(w / total)
  tx = aggregators.weighted_sum(w)
  excess = float(total - 1)

  def leaf_fn(x, p):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return x + excess * p.astype(x.dtype)

  def sum_fn(updates, params=None):
    # sum_t w_t (theta_0 + tau_t) is theta_0 plus this.
    out, _ = tx.update(updates, optax.EmptyState(), params)
    return jax.tree.map(leaf_fn, out, params)

  return optax.stateless(sum_fn)


def task_arithmetic(scale: ArrayLike = 0.3) -> optax.GradientTransformation:
  """Adds the task vectors, `theta = theta_0 + scale sum_t tau_t`.

  Args:
    scale: of the sum.

  Returns:
    The transformation.

  Raises:
    ValueError: where the scale is not finite.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> dj.merge(task_arithmetic(0.5), base, experts).params['w'].tolist()
    [3.0]

  References:
    Ilharco et al., `Editing Models with Task Arithmetic
    <https://arxiv.org/abs/2212.04089>`_, 2023
  """
  transforms.check_finite('scale', scale)
  return aggregators.weighted_sum(scale)


def slerp(t: ArrayLike = 0.5) -> optax.GradientTransformation:
  """Interpolates two models on the sphere, leaf by leaf.

  Args:
    t: 0 gives the first model, 1 the second.

  Returns:
    The transformation; see `dam_jax.aggregators.slerp` for the equation.

  Raises:
    ValueError: where t is not finite; at update, where there are not two
      experts.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[1., 0.], [0., 1.]])}
    >>> dj.merge(slerp(0.5), base, experts).params['w'].round(3).tolist()
    [0.7070000171661377, 0.7070000171661377]

  References:
    Shoemake, `Animating rotation with quaternion curves
    <https://doi.org/10.1145/325165.325242>`_, 1985
  """
  transforms.check_finite('t', t)
  return aggregators.slerp(t)
