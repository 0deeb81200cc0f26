"""Named merges that need no data, as transformations of task vectors.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.array([1., 1.])}
  >>> experts = {'w': jnp.array([[2., 1.], [1., 3.]])}
  >>> dj.merge(dj.task_arithmetic(0.5), base, experts).params['w'].tolist()
  [1.5, 2.0]

Hyper-parameters that are numbers may be traced, so `jax.vmap` sweeps them.
`dam_jax.learned` has the merges that learn on images.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import transforms
from dam_jax.base import chain
from dam_jax.base import entrywise
from dam_jax.base import is_concrete


def _finite(name: str, value: Any) -> None:
  if is_concrete(value) and not np.isfinite(float(value)):
    raise ValueError(f'{name} must be finite, got {value}')


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
  _finite('scale', scale)
  return aggregators.weighted_sum(scale)


def ties(
  density: ArrayLike = 0.2,
  scale: ArrayLike = 1.0,
  *,
  merge: str = 'mean',
  scope: str | None = None,
  weights: Sequence[float] | None = None,
  reading: str = 'paper',
) -> optax.GradientTransformation:
  """TIES: trim task vectors, elect signs, merge the entries that agree.

  Args:
    density: share of each task vector's entries to keep, in (0, 1].
    scale: of the merged update.
    merge: 'mean' of the entries that agree, 'sum' (FusionBench, which wants a
      scale of about 0.3) or 'max'.
    scope: rank entries over the whole 'model' (paper, FusionBench) or over
      each 'leaf' (mergekit); None as the reading has it.
    weights: `[K]`, of the task vectors.
    reading: the 'paper' or 'mergekit', which differ in how many entries are
      kept (see `dam_jax.transforms.trim`) and in what weighs and breaks a tie
      in the election (see `dam_jax.aggregators.elect_mean`).

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  Examples:
    >>> base = {'w': jnp.zeros(4)}
    >>> experts = {'w': jnp.array([[3., 1., 0., 0.], [-1., 2., 0., 0.]])}
    >>> dj.merge(ties(0.25), base, experts).params['w'].tolist()
    [3.0, 1.5, 0.0, 0.0]

  References:
    Yadav et al., `TIES-Merging: Resolving Interference When Merging Models
    <https://arxiv.org/abs/2306.01708>`_, 2023
  """
  _finite('scale', scale)
  if scope is None:
    scope = 'leaf' if reading == 'mergekit' else 'model'
  return chain(
    transforms.trim(density, scope=scope, reading=reading),
    aggregators.elect_mean(
      merge,
      weights=1.0 if weights is None else weights,
      scale=scale,
      reading=reading,
    ),
  )


def dare(
  rate: ArrayLike = 0.5,
  scale: ArrayLike = 0.3,
  *,
  rescale: bool | str = True,
  seed: int = 0,
  then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """DARE: drop entries of task vectors at random, rescale the others, merge.

  Args:
    rate: probability that an entry is dropped, in [0, 1).
    scale: of the sum that follows.
    rescale: divide what is kept by the probability to keep it; 'mergekit'
      keeps each leaf's sum of magnitudes instead.
    seed: of the draws.
    then: what merges the task vectors in place of the sum, such as `ties()` or
      `average()`.

  Returns:
    The transformation.

  Raises:
    ValueError: where the rate is outside [0, 1) or the scale is not finite.

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> dj.merge(dare(0.0, 0.5), base, experts).params['w'].tolist()
    [3.0]

  References:
    Yu et al., `Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch <https://arxiv.org/abs/2311.03099>`_, 2024
  """
  return chain(
    transforms.drop(rate, rescale=rescale, seed=seed),
    task_arithmetic(scale) if then is None else then,
  )


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
  _finite('t', t)
  return aggregators.slerp(t)
