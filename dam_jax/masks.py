"""Relaxed Bernoulli masks over the entries of task vectors.

A mask is a vector of logits over the raveled parameters (`dam_jax.tree.ravel`)
and a `Mask` that says how they become multipliers.

  >>> import jax.numpy as jnp
  >>> expected(jnp.zeros(2)).tolist()
  [0.5, 0.5]
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax.layout import Layout

KINDS = ('expected', 'mode', 'sample')
"""What a mask can be once its logits are learned."""


def uniform(
  key: jax.Array, step: jax.Array, like: jax.Array, layout: Layout
) -> jax.Array:
  """Draws a step's U[0, 1) like an array.

  An entry of a leaf gets the same number whatever the shards of the layout, and
  each device draws those of its own alone.

  Args:
    key: of the mask; of the kind 'threefry2x32' where there are shards.
    step: [] number of the step.
    like: `[..., P]`, whose shape and dtype to give.
    layout: of the raveled pytree.

  Raises:
    ValueError: where there are shards, and keys or dtypes of another kind.
  """
  key = jax.random.fold_in(key, step)
  if layout.shards == 1:
    return jax.random.uniform(key, like.shape, like.dtype)
  kind = str(jax.random.key_impl(key))
  if kind != 'threefry2x32' or like.dtype != jnp.float32:
    raise ValueError(
      'masks over several shards are drawn from threefry2x32 in float32, got '
      f'{kind} in {like.dtype.name}'
    )
  # What `jax.random.uniform` does to the numbers of all entries, in order.
  rows, total = like.shape[: like.ndim - 2], layout.num_entries
  firsts = np.arange(math.prod(rows), dtype=np.uint64) * np.uint64(total)
  firsts = firsts.reshape(*rows, 1, 1)
  carry = np.uint32(firsts % 2**32)
  low = carry + layout.places().reshape(*(1 for _ in rows), *layout.shape)
  high = np.uint32(firsts >> 32) + (low < carry).astype(jnp.uint32)
  words = threefry2x32_p.bind(*jax.random.key_data(key), high, low)
  bits = (words[0] ^ words[1]) >> 9 | np.uint32(0x3F800000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """How the logits of one mask start, become multipliers, and are learned.

  Attributes:
    init: the initial logit.
    temperature: of the relaxed Bernoulli sample that each step draws; None
      takes its expectation, the sigmoid of the logits, instead.
    rescale: 'mean' divides by each leaf's mean, so that task vectors keep
      their length; a number multiplies by it.
    per_task: one mask `[K, P]` for each expert, not one `[P]` for all.
    tx: optax transformation that learns the logits.
    uniform_fn: `(key, step, like, layout) -> U[0, 1)` like `like`, what the
      samples are made of.
  """

  init: float = 0.0
  temperature: float | None = 0.5
  rescale: str | float = 'mean'
  per_task: bool = False
  tx: optax.GradientTransformation = optax.adam(1e-3)
  uniform_fn: Callable[[jax.Array, jax.Array, jax.Array, Layout], jax.Array] = (
    uniform
  )

  def __post_init__(self):
    if self.temperature is not None and not self.temperature > 0:
      raise ValueError(
        f'temperature of a mask must be positive, got {self.temperature}'
      )
    if isinstance(self.rescale, str) and self.rescale != 'mean':
      raise ValueError(
        f"rescale of a mask must be 'mean' or a number, got {self.rescale!r}"
      )


@jax.custom_jvp
def sample(
  logits: jax.Array, uniform: jax.Array, temperature: float
) -> jax.Array:
  """Draws a relaxed Bernoulli variable, reparametrised.

  `m = sigmoid((logit(u) + logits) / temperature)`, with torch's clamping of
  probabilities to `[eps, 1 - eps]`. Its gradient in the logits is
  `m (1 - m) / temperature`, 0 where something was clamped: it asks for the
  sample alone, and nothing else of the draw is held for it. There is none in
  the draws and in the temperature.

  Args:
    logits: of the Bernoulli's probability.
    uniform: draws from U[0, 1), of the same shape.
    temperature: positive; towards 0 the sample becomes binary.

  Returns:
    Samples in (0, 1), of the same shape and dtype.

  Examples:
    >>> sample(jnp.zeros(2), jnp.array([0.5, 0.9]), 0.5).round(3).tolist()
    [0.5, 0.9880000352859497]

  References:
    Maddison et al., `The Concrete Distribution
    <https://arxiv.org/abs/1611.00712>`_, 2017
  """
  info, limit = jnp.finfo(logits.dtype), _limit(logits.dtype)
  u = jnp.clip(uniform, info.eps, 1 - info.eps)
  noise = jnp.log(u) - jnp.log1p(-u)
  z = (noise + jnp.clip(logits, -limit, limit)) / temperature
  return jnp.clip(jax.nn.sigmoid(z), info.tiny, 1 - info.eps)


def _limit(dtype: Any) -> jax.Array:
  """Returns the largest logit of a probability that is not clamped."""
  eps = jnp.finfo(dtype).eps
  return jnp.log1p(-eps) - jnp.log(eps)


@sample.defjvp
def _sample_jvp(primals, tangents):
  logits, _, temperature = primals
  m, info = sample(*primals), jnp.finfo(logits.dtype)
  free = jnp.abs(logits) < _limit(logits.dtype)
  free &= (m > info.tiny) & (m < 1 - info.eps)
  return m, jnp.where(free, m * (1 - m) / temperature, 0) * tangents[0]


def expected(logits: jax.Array) -> jax.Array:
  """Returns the Bernoulli's probability, `sigmoid(logits)`."""
  return jax.nn.sigmoid(logits)


def mode(logits: jax.Array) -> jax.Array:
  """Returns the most probable binary mask: 1 where the logit is positive."""
  return (logits > 0).astype(logits.dtype)


def leaf_means(mask: jax.Array, layout: Layout) -> jax.Array:
  """Averages a raveled vector over each leaf.

  Args:
    mask: `[..., P]`.
    layout: of the raveled pytree.

  Returns:
    `[..., leaves]`.

  Examples:
    >>> from dam_jax import tree
    >>> flat = tree.ravel({'a': jnp.arange(2.), 'b': jnp.ones(3)})
    >>> leaf_means(flat.vector, flat.layout).tolist()
    [0.5, 1.0]
  """
  if layout.shards == 1:
    means = [jnp.mean(group, axis=-1) for group in layout.by_leaf(mask)]
    return jnp.concatenate(means, axis=-1)
  # Each device sums its own before any are sent: XLA for TPUs would do it the
  # other way round without the barriers, and send whole leaves for each task.
  real = (layout.places() < layout.num_entries).astype(mask.dtype)
  real = real.reshape(*(1,) * (mask.ndim - 2), *layout.shape)
  means = []
  for group, (size, _) in zip(
    layout.by_leaf(mask * real), layout.groups, strict=True
  ):
    parts = lax.optimization_barrier(jnp.sum(group, axis=-1))
    means.append(jnp.sum(parts, axis=-2) / size)
  return jnp.concatenate(means, axis=-1)


def value(mask: Mask, logits: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the mask while it is being learned: a sample or its expectation.

  Args:
    mask: how to make it.
    logits: `[..., P]`.
    uniform: draws from U[0, 1) like the logits; not read without temperature.

  Returns:
    `[..., P]` in (0, 1), before the rescale.
  """
  if mask.temperature is None:
    return expected(logits)
  return sample(logits, uniform, mask.temperature)


def final_value(
  mask: Mask, logits: jax.Array, uniform: jax.Array, kind: str
) -> jax.Array:
  """Returns the mask once it is learned.

  Args:
    mask: how to make it.
    logits: `[..., P]`.
    uniform: draws from U[0, 1) like the logits, for a sample.
    kind: one of `KINDS`.

  Returns:
    `[..., P]` in [0, 1], before the rescale.
  """
  if kind == 'sample':
    return value(mask, logits, uniform)
  return expected(logits) if kind == 'expected' else mode(logits)


def leaf_scale(mask: Mask, m: jax.Array, layout: Layout) -> jax.Array:
  """Returns by what to multiply each leaf of a mask: `Mask.rescale`.

  Args:
    mask: how to rescale.
    m: the mask, `[..., P]`.
    layout: of the raveled pytree.

  Returns:
    `[..., leaves]`; 1 for a leaf whose mask is zero everywhere.
  """
  if isinstance(mask.rescale, str):
    means = leaf_means(m, layout)
    return 1 / jnp.where(means > 0, means, 1)
  rows = m.shape[: m.ndim - len(layout.shape)]
  return jnp.full((*rows, len(layout.names)), mask.rescale, m.dtype)


def masked_sum(
  deltas: jax.Array,
  layout: Layout,
  coefficients: jax.Array,
  masks: Mapping[str, Mask],
  values: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns `sum_t w_t * (m * tau_t)`, where `m` multiplies all masks.

  Args:
    deltas: raveled task vectors, `[K, P]`.
    layout: of the raveled pytree.
    coefficients: `w`, `[K]` or `[K, leaves]`.
    masks: by name.
    values: of the masks in [0, 1] by name, `[P]` or `[K, P]`.

  Returns:
    `[P]`.
  """
  num, rows = deltas.shape[0], layout.shape[:-1]
  if coefficients.ndim == 1:
    coefficients = coefficients[:, None]
  scale = jnp.broadcast_to(coefficients, (num, len(layout.names)))
  shared, own, shared_scale = [], [], None
  for name, m in values.items():
    each = leaf_scale(masks[name], m, layout)
    if masks[name].per_task:
      own.append(m)
      scale *= each
    else:
      shared.append(m)
      shared_scale = each if shared_scale is None else shared_scale * each
  deltas = functools.reduce(jnp.multiply, own, deltas)
  sums, start = [], 0
  for group in layout.by_leaf(deltas):
    leaves = slice(start, start + group.shape[-2])
    start = leaves.stop
    s = _spread(scale[:, leaves], rows)
    # A sum over a stacked axis is up to 40 times slower in XLA on a CPU.
    total = functools.reduce(jnp.add, [s[k] * group[k] for k in range(num)])
    if shared_scale is not None:
      # After the sum, which so is the same for all masks, and whose gradient in
      # the masks asks for no task vectors.
      total *= _spread(shared_scale[leaves], rows)
    sums.append(total.reshape(*rows, -1))
  return functools.reduce(jnp.multiply, shared, jnp.concatenate(sums, axis=-1))


def _spread(scale: jax.Array, rows: tuple[int, ...]) -> jax.Array:
  """Gives `[..., leaves]` the axes of a group of leaves: shards and entries."""
  *lead, leaves = scale.shape
  scale = scale.reshape(*lead, *(1 for _ in rows), leaves, 1)
  if not rows:
    return scale
  # Gradients are to be summed on each device first, as in `leaf_means`.
  return lax.optimization_barrier(
    jnp.broadcast_to(scale, (*lead, *rows, leaves, 1))
  )


def sparsity(logits: jax.Array, layout: Layout) -> dict[str, jax.Array]:
  """Share of entries that a mask would drop, by leaf.

  Args:
    logits: `[..., P]`.
    layout: of the raveled pytree.

  Returns:
    A dict from leaf path to `[...]`, `1 - mean(sigmoid(logits))`.
  """
  shares = 1 - leaf_means(expected(logits), layout)
  return {name: shares[..., i] for i, name in enumerate(layout.names)}


def overlap(mask: jax.Array, other: jax.Array) -> jax.Array:
  """Soft Jaccard index of two masks, `sum min(a, b) / sum max(a, b)`.

  Args:
    mask: `[..., P]` in [0, 1].
    other: the same.

  Returns:
    `[...]` in [0, 1]; 1 where both are zero everywhere.

  Examples:
    >>> float(overlap(jnp.array([1., 0., 1.]), jnp.array([1., 1., 0.])))
    0.3333333432674408
  """
  smaller = jnp.sum(jnp.minimum(mask, other), axis=-1)
  larger = jnp.sum(jnp.maximum(mask, other), axis=-1)
  return jnp.where(larger > 0, smaller / jnp.where(larger > 0, larger, 1), 1.0)
