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
from dam_jax import geometry
from dam_jax import transforms
from dam_jax.base import entrywise
from dam_jax.base import is_concrete


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

  return entrywise(optax.stateless(sum_fn))


def task_arithmetic(
  scale: ArrayLike | Sequence[float] = 0.3,
) -> optax.GradientTransformation:
  """Adds the task vectors, `theta = theta_0 + scale sum_t tau_t`.

  Args:
    scale: of the sum; or `[K]`, of each task vector.

  Returns:
    The transformation.

  Raises:
    ValueError: where the scale is not finite; at update, where there is not one
      for each expert.

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


def nuslerp(
  weights: Sequence[float] = (1.0, 1.0),
  *,
  space: str = 'delta',
  unit_axis: int | None = None,
) -> optax.GradientTransformation:
  """Interpolates the task vectors of two models on the sphere.

  `slerp` at `t = w_1 / (w_0 + w_1)`, linear only where the angle is lost in
  float32's rounding.

  Args:
    weights: `[2]`; may be traced.
    space: 'delta', or 'weights' (mergekit without a base model).
    unit_axis: None has one angle a leaf (`nuslerp_flatten`); 0 one for each row
      of a matrix, -1 for each column (`nuslerp_row_wise`).

  Returns:
    The transformation; see `dam_jax.aggregators.slerp` for the equation.

  Raises:
    ValueError: where there are not two finite weights, they sum to zero, or an
      option is none of those; at update, where there are not two experts.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[1., 0.], [0., 1.]])}
    >>> dj.merge(nuslerp(), base, experts).params['w'].round(3).tolist()
    [0.7070000171661377, 0.7070000171661377]

  References:
    Goddard et al., `Arcee's MergeKit: A Toolkit for Merging Large Language
    Models <https://arxiv.org/abs/2403.13257>`_, 2024
  """
  if len(weights) != 2:
    raise ValueError(f'nuslerp needs 2 weights, got {weights}')
  first, second = weights
  total = first + second
  concrete = is_concrete(total)
  if concrete and not (np.isfinite(float(total)) and total != 0):
    raise ValueError(
      f'weights must be finite and not sum to zero, got {list(weights)}'
    )
  return aggregators.slerp(
    second / total, parallel=1 - 1e-7, space=space, unit_axis=unit_axis
  )


def karcher(
  weights: ArrayLike | Sequence[float] = 1.0,
  *,
  space: str = 'weights',
  max_iter: int = 10,
  tol: float = 1e-5,
) -> optax.GradientTransformation:
  """Averages models on the sphere, leaf by leaf.

  Args:
    weights: `[K]`, or one for all.
    space: average 'weights' (mergekit) or task vectors, 'delta'.
    max_iter: how often the mean moves at most.
    tol: length of a move below which to stop.

  Returns:
    The transformation; see `dam_jax.geometry.karcher` for the equation.

  Raises:
    ValueError: where an option is none of those or a weight is negative; at
      update, where there is not a weight for each expert.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[1., 0.], [0., 3.]])}
    >>> dj.merge(karcher(), base, experts).params['w'].round(3).tolist()
    [1.4140000343322754, 1.4140000343322754]

  References:
    Wang et al., `Functionality-Oriented LLM Merging on the Fisher-Rao Manifold
    <https://arxiv.org/abs/2603.04972>`_, 2026
  """
  return geometry.karcher(weights, space=space, max_iter=max_iter, tol=tol)


def model_stock(
  *, unit_axis: int | None = None, pairs: str = 'cosine'
) -> optax.GradientTransformation:
  """Moves towards the average as far as the experts' angles allow.

  `theta = r mean_t theta_t + (1 - r) theta_0` with
  `r = K c / (1 + (K - 1) c)`, where `c` is the mean cosine of pairs of task
  vectors.

  Args:
    unit_axis: None has one `r` a leaf; -1 one for each output neuron of a
      kernel `[in, out]`, 0 of one `[out, in]` (`filter_wise` in mergekit).
    pairs: average each pair's 'cosine' (mergekit) or its 'angle' (FusionBench).

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those; at update, where there is one
      expert only.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[6., 0.], [3., 0.]])}
    >>> dj.merge(model_stock(), base, experts).params['w'].tolist()
    [4.5, 0.0]

  References:
    Jang et al., `Model Stock: All we need is just a few fine-tuned models
    <https://arxiv.org/abs/2403.19522>`_, 2024
  """
  return geometry.model_stock(unit_axis=unit_axis, pairs=pairs)
