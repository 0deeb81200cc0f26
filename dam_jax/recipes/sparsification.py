"""Merges that choose, entry by entry, what of each task vector counts.

`dam_jax.recipes.interpolation` has those that weigh whole leaves.
"""

from collections.abc import Sequence

from jax.typing import ArrayLike
import optax

from dam_jax import aggregators
from dam_jax import transforms
from dam_jax.base import chain
from dam_jax.recipes.interpolation import task_arithmetic


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
  transforms.check_finite('scale', scale)
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
