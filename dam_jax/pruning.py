"""Transformations that prune task vectors by rank, in each leaf or unit.

`dam_jax.transforms` has `trim` and `drop`, which are plainer.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> tx = dj.pruning.keep_middle(0.4, gamma=0.2)
  >>> deltas = {'w': jnp.array([[9., -4., 3., 0.2, 0.1]])}
  >>> tx.update(deltas, tx.init(deltas))[0]['w'].tolist()
  [[0.0, -4.0, 3.0, 0.0, 0.0]]

A unit is an output neuron or filter: all weights with one index on the axis
that counts the units, the last one in kernels `[in, out]` as Flax has them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import selection
from dam_jax import transforms
from dam_jax.base import is_concrete
from dam_jax.base import leafwise
from dam_jax.transforms import DropState


def magprune(
  density: ArrayLike,
  *,
  epsilon: ArrayLike = 0.15,
  unit_axis: int | None = -1,
  rescale: bool | str = True,
  seed: int = 0,
  uniform_fn: Callable[[jax.Array, jax.Array], jax.Array] = transforms.uniform,
) -> optax.GradientTransformation:
  """Drops entries at random, the small ones of each unit more often.

  Of a unit's `n` entries, that of magnitude rank `r` (0 is the largest) is kept
  with probability `density + epsilon (1 - 2 r / (n - 1))`.

  Args:
    density: mean probability that an entry is kept; may be traced.
    epsilon: how far those of the largest and of the smallest entry depart from
      it, half of the paper's; may be traced. 0 is `transforms.drop`.
    unit_axis: rank the weights of each unit: -1 for kernels `[in, out]`, 0 for
      `[out, in]` as PyTorch has them; None ranks each leaf. A leaf of less than
      two axes is one unit.
    rescale: divide what is kept by its probability (paper); 'l1' gives each
      task and leaf its sum of magnitudes again (mergekit).
    seed: of the draws.
    uniform_fn: `(key, leaf) -> U[0, 1)` like the leaf `[K, ...]`; an entry is
      kept where it reaches one minus its probability.

  Returns:
    The transformation; its state is a `DropState`.

  Raises:
    ValueError: where an option is none of those, or a probability is not in
      (0, 1].

  References:
    Deep et al., `DELLA-Merging: Reducing Interference in Model Merging through
    Magnitude-Based Sampling <https://arxiv.org/abs/2406.11617>`_, 2024
  """
  if is_concrete(density) and is_concrete(epsilon):
    middle, half = np.asarray(density).item(), np.asarray(epsilon).item()
    if not 0 < middle - half <= middle + half <= 1:
      raise ValueError(
        f'density +- epsilon must be in (0, 1], got {density} +- {epsilon}'
      )
  transforms.check_rescale(rescale)
  transforms.check_unit_axis(unit_axis)

  def init_fn(params):
    del params
    return DropState(jax.random.key(seed))

  @jax.jit  # needs a fraction of the memory
  def leaf_fn(x, uniform):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    wide = np.promote_types(x.dtype, np.float32)
    tau, restore = transforms.units(x.astype(wide), unit_axis)
    keep = _keep_probability(tau, density, epsilon)
    uniform, _ = transforms.units(uniform.astype(wide), unit_axis)
    kept = jnp.where(uniform >= 1 - keep, tau, 0)
    if rescale == 'l1':
      kept = transforms.keep_sum(kept, tau)
    elif rescale:
      kept /= keep
    return restore(kept).astype(x.dtype)

  def update_fn(updates, state, params=None, *, salt=0, **extra_args):
    del params, extra_args
    key, draw = jax.random.split(state.key)
    pruned = jax.tree.map(
      lambda key, x: leaf_fn(x, uniform_fn(key, x)),
      transforms.leaf_keys(draw, updates, salt),
      updates,
    )
    return pruned, DropState(key)

  return leafwise(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _keep_probability(
  tau: jax.Array, density: ArrayLike, epsilon: ArrayLike
) -> jax.Array:
  """Returns the probabilities by rank of units `[K, U, N]`."""
  size = tau.shape[-1]
  order = jnp.argsort(jnp.abs(tau), axis=-1, descending=True)
  # Half the time of a second sort.
  rank = jnp.put_along_axis(
    jnp.zeros_like(tau),
    order,
    jnp.arange(size, dtype=tau.dtype)[None, None],
    axis=-1,
    inplace=False,
  )
  d, e = jnp.asarray(density, tau.dtype), jnp.asarray(epsilon, tau.dtype)
  return d + e * (1 - 2 * rank / max(size - 1, 1))


def keep_middle(
  density: ArrayLike,
  *,
  gamma: ArrayLike = 0.01,
  unit_axis: int | None = None,
) -> optax.GradientTransformation:
  """Keeps entries of middling magnitude, zeroes outliers and small ones.

  Of a leaf's `n` entries the `floor(gamma n)` largest are dropped, fewer where
  too few would stay, and the next `floor(density n)` kept. What equals the
  smallest outlier or the largest small entry is dropped as well.

  Args:
    density: share of entries to keep, in (0, 1]; may be traced. The paper's
      `beta` is `1 - density - gamma`.
    gamma: share of outliers to drop, in [0, 1); may be traced.
    unit_axis: None counts in each leaf (paper, mergekit), -1 in each unit of a
      kernel `[in, out]`, 0 of one `[out, in]` (the paper's code).

  Returns:
    The transformation.

  Raises:
    ValueError: where a share or unit_axis is none of those.

  References:
    Davari and Belilovsky, `Model Breadcrumbs: Scaling Multi-Task Model Merging
    with Sparse Masks <https://arxiv.org/abs/2312.06795>`_, 2024
  """
  transforms.check_share('density', density, zero=False, one=True)
  transforms.check_share('gamma', gamma, zero=True, one=False)
  transforms.check_unit_axis(unit_axis)

  @jax.jit  # compiles its loops once for all leaves of one shape
  def leaf_fn(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    tau, restore = transforms.units(x, unit_axis)
    magnitude, size = jnp.abs(tau), tau.shape[-1]
    kept = selection.floor_share(density, size)
    low = jnp.maximum(size - selection.floor_share(gamma, size) - kept, 0)
    high = low + kept + 1
    small, outlier = (
      selection.ranked(magnitude, rank)[..., None]
      for rank in (jnp.maximum(low, 1), jnp.minimum(high, size))
    )
    middle = (magnitude > small) | (low == 0)
    middle &= (magnitude < outlier) | (high > size)
    return restore(jnp.where(middle, tau, 0))

  return leafwise(
    optax.stateless(lambda updates, params=None: jax.tree.map(leaf_fn, updates))
  )
