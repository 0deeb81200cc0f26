"""Merges that choose, entry by entry, what of each task vector counts.

`dam_jax.recipes.interpolation` has those that weigh whole leaves.
"""

from collections.abc import Sequence

from jax.typing import ArrayLike
import optax

from dam_jax import aggregators
from dam_jax import competition
from dam_jax import pruning
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
    rescale: divide what is kept by the probability to keep it (paper); 'l1'
      gives each task and leaf its sum of magnitudes again (mergekit).
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


def della(
  density: ArrayLike = 0.5,
  scale: ArrayLike = 1.0,
  *,
  epsilon: ArrayLike = 0.15,
  unit_axis: int | None = -1,
  rescale: bool | str = True,
  seed: int = 0,
  then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """DELLA: drop small entries more often, rescale, elect signs, merge.

  Args:
    density: mean probability that an entry is kept.
    scale: of the mean of the entries that agree.
    epsilon: how far that of the largest entry of each unit and that of the
      smallest depart from it.
    unit_axis: rank the weights of each output neuron: -1 for kernels
      `[in, out]`, 0 for `[out, in]`; None ranks each leaf.
    rescale: divide what is kept by its probability (paper); 'l1' gives each
      task and leaf its sum of magnitudes again (mergekit).
    seed: of the draws.
    then: what merges the task vectors in place of the election, such as
      `task_arithmetic(1.0)` (`della_linear` in mergekit).

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those, or a probability is not in
      (0, 1].

  Examples:
    >>> base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.], [4.]])}
    >>> dj.merge(della(1.0, epsilon=0.0), base, experts).params['w'].tolist()
    [3.0]

  References:
    Deep et al., `DELLA-Merging: Reducing Interference in Model Merging through
    Magnitude-Based Sampling <https://arxiv.org/abs/2406.11617>`_, 2024
  """
  transforms.check_finite('scale', scale)
  prune = pruning.magprune(
    density, epsilon=epsilon, unit_axis=unit_axis, rescale=rescale, seed=seed
  )
  elect = aggregators.elect_mean('mean', scale=scale)
  return chain(prune, elect if then is None else then)


def breadcrumbs(
  density: ArrayLike = 0.1,
  scale: ArrayLike = 0.3,
  *,
  gamma: ArrayLike = 0.01,
  unit_axis: int | None = None,
  then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Model Breadcrumbs: drop outliers and small entries, add what is left.

  Args:
    density: share of each leaf's entries to keep, in (0, 1].
    scale: of the sum that follows.
    gamma: share of the largest entries to drop, in [0, 1).
    unit_axis: None counts in each leaf (paper, mergekit), -1 in the weights of
      each output neuron of a kernel `[in, out]`, 0 of one `[out, in]` (the
      paper's code).
    then: what merges the task vectors in place of the sum, such as
      `ties(1.0, merge='sum')` (`breadcrumbs_ties` in mergekit).

  Returns:
    The transformation.

  Raises:
    ValueError: where a share or unit_axis is none of those, or the scale is not
      finite.

  Examples:
    >>> base = {'w': jnp.zeros(4)}
    >>> experts = {'w': jnp.array([[9., 4., 1., 1.], [0., 1., 8., 4.]])}
    >>> tx = breadcrumbs(0.25, 0.5, gamma=0.25)
    >>> dj.merge(tx, base, experts).params['w'].tolist()
    [0.0, 2.0, 0.0, 2.0]

  References:
    Davari and Belilovsky, `Model Breadcrumbs: Scaling Multi-Task Model Merging
    with Sparse Masks <https://arxiv.org/abs/2312.06795>`_, 2024
  """
  return chain(
    pruning.keep_middle(density, gamma=gamma, unit_axis=unit_axis),
    task_arithmetic(scale) if then is None else then,
  )


def magmax(scale: ArrayLike = 0.5) -> optax.GradientTransformation:
  """MagMax: each entry of the task where its magnitude is largest.

  Args:
    scale: of the result.

  Returns:
    The transformation. Of equal magnitudes the last task's entry counts.

  Raises:
    ValueError: where the scale is not finite.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[2., 1.], [-4., 0.]])}
    >>> dj.merge(magmax(0.5), base, experts).params['w'].tolist()
    [-2.0, 0.5]

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024
  """
  transforms.check_finite('scale', scale)
  return competition.max_magnitude(scale)


def sce(
  density: ArrayLike = 0.1, *, floor: float = 0.0, merge: str = 'selected'
) -> optax.GradientTransformation:
  """SCE: select entries that vary, calculate weights, erase minority signs.

  Args:
    density: share of each leaf's entries to select, in (0, 1].
    floor: tasks weigh the same where the sum of their mean squares is not above
      this; 1e-6 in mergekit.
    merge: the 'selected' entries only (paper, mergekit), or 'all', so that the
      selection decides on weights alone (FuseChat's code).

  Returns:
    The transformation; see `dam_jax.competition.sce` for the equations.

  Raises:
    ValueError: where an option is none of those.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[3., 1.], [-1., 1.]])}
    >>> dj.merge(sce(1.0), base, experts).params['w'].tolist()
    [3.0, 1.0]

  References:
    Wan et al., `FuseChat: Knowledge Fusion of Chat Models
    <https://arxiv.org/abs/2408.07990>`_, 2024
  """
  return competition.sce(density, floor=floor, merge=merge)


def pcb(
  density: ArrayLike = 0.2, scale: ArrayLike = 1.0, *, reading: str = 'paper'
) -> optax.GradientTransformation:
  """PCB-Merging: balance the competition of entries, drop, rescale.

  Args:
    density: share of its entries that each task keeps, in (0, 1].
    scale: of the result.
    reading: the equations of the 'paper', or of its authors' 'code'.

  Returns:
    The transformation; see `dam_jax.competition.pcb` for the equations.

  Raises:
    ValueError: where an option is none of those or the scale is not finite.

  Examples:
    >>> base = {'w': jnp.zeros(4)}
    >>> experts = {'w': jnp.array([[3., 1., 0., 0.], [0., -1., 0., 2.]])}
    >>> dj.merge(pcb(0.25), base, experts).params['w'].tolist()
    [3.0, 0.0, 0.0, 2.0]

  References:
    Du et al., `Parameter Competition Balancing for Model Merging
    <https://arxiv.org/abs/2410.02396>`_, 2024
  """
  transforms.check_finite('scale', scale)
  return competition.pcb(density, scale, reading=reading)


def consensus(
  threshold: ArrayLike | Sequence[float] = 0.4,
  scale: ArrayLike = 0.3,
  *,
  min_tasks: int = 2,
  then: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Consensus Merging: drop what no task, or only one, needs of the sum.

  Args:
    threshold: `[K]`, or one for all, of each task's mask: the higher, the fewer
      entries it needs.
    scale: of what is kept.
    min_tasks: how many tasks must need an entry.
    then: what merges the task vectors in place of the sum, such as
      `ties(merge='sum')`.

  Returns:
    The transformation; see `dam_jax.competition.consensus` for the equation.

  Raises:
    ValueError: where min_tasks is negative or the scale is not finite; at
      update, where there is not one finite threshold for each task.

  Examples:
    >>> base = {'w': jnp.zeros(2)}
    >>> experts = {'w': jnp.array([[3., 5.], [2., 0.]])}
    >>> dj.merge(consensus(0.4, 0.5), base, experts).params['w'].tolist()
    [2.5, 0.0]

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024
  """
  transforms.check_finite('scale', scale)
  return competition.consensus(threshold, scale, min_tasks=min_tasks, then=then)


def emr(scale: ArrayLike = 1.0) -> optax.GradientTransformation:
  """EMR-Merging's unified model: elected signs, largest magnitudes.

  `tau = s max_t |tau_t|` over the tasks whose sign is `s = sgn(sum_t tau_t)`.
  `dam_jax.localization` makes each task's own model of it.

  Args:
    scale: of the result.

  Returns:
    The transformation.

  Raises:
    ValueError: where the scale is not finite.

  Examples:
    >>> base = {'w': jnp.zeros(3)}
    >>> experts = {'w': jnp.array([[3., 1., 0.], [-1., 2., -1.]])}
    >>> dj.merge(emr(), base, experts).params['w'].tolist()
    [3.0, 2.0, -1.0]

  References:
    Huang et al., `EMR-Merging: Tuning-Free High-Performance Model Merging
    <https://arxiv.org/abs/2405.17461>`_, 2024
  """
  transforms.check_finite('scale', scale)
  return aggregators.elect_mean('max', scale=scale)
