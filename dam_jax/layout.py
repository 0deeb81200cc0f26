"""Where the leaves of a pytree lie in one vector, on one device or on many."""

import dataclasses
import functools
import itertools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each leaf of a pytree lies in its raveled vector; hashable.

  Leaves are sorted by size, so that leaves of one size (a transformer's layers)
  lie side by side and one reshape gives them a common axis.

  With several shards the vector is `[N, Q]`, and each row holds an equal part
  of every leaf, zeros where a leaf does not divide: rows on different devices
  are cut into leaves, masked and summed without a word between them.

  Attributes:
    treedef: the pytree's structure.
    names: paths of the floating-point leaves, in the vector's order.
    shapes: their shapes.
    dtypes: their dtypes.
    order: their places among the pytree's leaves.
    shards: rows of the vector, `N`; 1 has no axis of them.
  """

  treedef: Any
  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[Any, ...]
  order: tuple[int, ...]
  shards: int = 1

  @property
  def sizes(self) -> tuple[int, ...]:
    """Number of entries of each leaf."""
    return tuple(math.prod(shape) for shape in self.shapes)

  @property
  def widths(self) -> tuple[int, ...]:
    """Number of entries of each leaf in one shard, with its padding."""
    return tuple(map(self._width, self.sizes))

  @property
  def dtype(self) -> Any:
    """Of the vector: float64 where a leaf has it, else float32."""
    return jnp.float64 if jnp.float64 in self.dtypes else jnp.float32

  @property
  def num_entries(self) -> int:
    """Number of entries of all leaves, `P`."""
    return sum(self.sizes)

  def _width(self, size: int) -> int:
    return -(-size // self.shards)

  @property
  def groups(self) -> list[tuple[int, int]]:
    """Sizes of leaves, and how many of that size lie side by side."""
    return [(s, len(list(g))) for s, g in itertools.groupby(self.sizes)]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the vector: `[P]`, or `[N, Q]` with several shards."""
    rows = () if self.shards == 1 else (self.shards,)
    return (*rows, sum(self.widths))

  @property
  def slices(self) -> tuple[slice, ...]:
    """Each leaf's place on the vector's last axis."""
    ends = list(itertools.accumulate(self.widths, initial=0))
    return tuple(itertools.starmap(slice, itertools.pairwise(ends)))

  def by_leaf(self, vector: jax.Array) -> list[jax.Array]:
    """Splits a raveled vector into groups of leaves of one size.

    Args:
      vector: `[..., P]`, or `[..., N, Q]`.

    Returns:
      Arrays `[..., leaves, size]`, or `[..., N, leaves, width]`; their leaves,
      in order, are all leaves.
    """
    parts = jax.lax.split(
      vector,
      [num * self._width(size) for size, num in self.groups],
      axis=vector.ndim - 1,
    )
    return [
      part.reshape(*vector.shape[:-1], num, self._width(size))
      for part, (size, num) in zip(parts, self.groups, strict=True)
    ]

  def resplit(self, vector: jax.Array, shards: int) -> jax.Array:
    """Lays a raveled vector over another number of shards.

    Args:
      vector: `[..., P]`, or `[..., N, Q]`.
      shards: rows of the result.

    Returns:
      The same entries, as this layout with so many shards has them.
    """
    new = dataclasses.replace(self, shards=shards)
    lead = vector.shape[: vector.ndim - len(self.shape)]
    parts = []
    for part, size, width in zip(
      jax.lax.split(vector, self.widths, axis=vector.ndim - 1),
      self.sizes,
      new.widths,
      strict=True,
    ):
      x = part.reshape(*lead, -1)[..., :size]
      pad = [(0, 0)] * len(lead) + [(0, width * shards - size)]
      parts.append(jnp.pad(x, pad).reshape(*lead, *new.shape[:-1], width))
    return jnp.concatenate(parts, axis=-1)

  def places(self) -> jax.Array:
    """Returns where each entry of the vector lies without shards.

    Returns:
      uint32 like the vector, `P` for padding.

    Raises:
      ValueError: where 32 bits cannot count the entries.
    """
    total = self.num_entries
    if total >= 2**32:
      raise ValueError(f'{total} parameters are more than 32 bits can count')
    counts = functools.partial(jnp.arange, dtype=jnp.uint32)
    row, start, parts = counts(self.shards)[:, None, None], 0, []
    for size, num in self.groups:
      leaf, width = counts(num)[:, None], self._width(size)
      inside = row * np.uint32(width) + counts(width)[None, None]
      place = np.uint32(start) + leaf[None] * np.uint32(size) + inside
      place = jnp.where(inside < size, place, np.uint32(total))
      parts.append(place.reshape(self.shards, -1))
      start += size * num
    return jnp.concatenate(parts, axis=-1).reshape(self.shape)


class Placement(Protocol):
  """Where a model goes before a forward pass reads it; hashable."""

  def vector(self, vector: jax.Array) -> jax.Array:
    """Moves a raveled vector before it is cut into leaves."""
    ...

  def leaf(self, name: str, leaf: jax.Array) -> jax.Array:
    """Moves a leaf after that."""
    ...
