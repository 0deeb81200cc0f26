"""Exact selection of the largest entries of a model, without a sort.

Floats that are not negative are ordered as their bits, so an entry's rank is
found by counting words. Accelerators bisect: each of 31 passes counts the
entries below one word and settles one bit. A CPU counts into 65,536 bins by the
words' upper halves, then the bin that holds the rank by their lower halves; so
does a model of which only parts are seen at a time (read leaf by leaf), which
two sums over the parts suffice for. Both are linear in the number of entries,
stay on the device, and give the same word.

  >>> import jax.numpy as jnp
  >>> threshold(jnp.array([[3., 1., 2., 0.]]), 0.25).tolist()
  [2.0]
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from dam_jax.base import is_concrete

SumParts = Callable[..., Any]
"""`(part, finish, *args) -> finish(total, *args)`.

The total is over all parts of a model. `finish` may be called outside of
tracing, so what it needs that is traced comes in `args`.
"""

_HALF = 16


def whole(part: jax.Array, finish: Callable[..., Any], *args: Any) -> Any:
  """The `SumParts` of a model that is there in one part.

  Args:
    part: what would be summed over parts.
    finish: computes what is needed of the total.
    *args: what else it needs.

  Returns:
    `finish(part, *args)`.
  """
  return finish(part, *args)


def _by_bits(
  words: jax.Array, density: ArrayLike, more: int, bits: int
) -> jax.Array:
  """Returns the word of a rank by settling one bit after the other."""
  rank = _rank(density, more, words.shape[-1])

  def settle(i, found):
    # The sign is zero: the first bit to settle is the one after it.
    larger = found | (one << (bits - 2 - i).astype(one.dtype))
    below = jnp.sum(words < larger[..., None], axis=-1, dtype=jnp.int32)
    return jnp.where(below < rank, larger, found)

  found, one = jnp.zeros_like(words[..., 0]), jnp.ones((), words.dtype)
  return lax.fori_loop(0, bits - 1, settle, found)


def _rank(density: ArrayLike, more: int, size: int | jax.Array) -> Any:
  """Returns the threshold's rank, exactly where density and size are known.

  In float32 otherwise, as far as its 24 bits go.
  """
  if is_concrete(density) and is_concrete(size):
    kept = math.floor(np.asarray(density).item() * int(size)) + more
    return int(size) + 1 - min(max(kept, 1), int(size))
  size = jnp.asarray(size)
  kept = jnp.floor(density * size.astype(jnp.result_type(float)))
  return size + 1 - jnp.clip(kept.astype(size.dtype) + more, 1, size)


def _histogram(digits: jax.Array, counted: jax.Array) -> jax.Array:
  """Counts, in each row of `[rows, P]`, 16-bit digits into bins."""
  rows, bins = digits.shape[0], 1 << _HALF
  # One scatter for all rows drops what is not counted: it takes less than half
  # the time of one scatter a row that has a bin for it.
  begin = bins * jnp.arange(rows, dtype=jnp.int32)[:, None]
  place = jnp.where(counted, begin + digits.astype(jnp.int32), rows * bins)
  counts = jnp.zeros(rows * bins, jnp.int32)
  counts = counts.at[place.reshape(-1)].add(1, mode='drop')
  return counts.reshape(rows, bins)


@jax.jit
def _locate(counts: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns each row's bin that holds a rank, and the rank in that bin."""
  rank = rank.astype(counts.dtype)
  below = jnp.cumsum(counts, axis=-1)
  found = jnp.sum(below < rank[:, None], axis=-1)
  at = found[:, None]
  before = jnp.take_along_axis(below - counts, at, axis=-1)[:, 0]
  return found.astype(jnp.uint32), (rank - before).astype(jnp.uint32)


def _by_halves(
  words: jax.Array,
  *,
  density: ArrayLike,
  more: int,
  bits: int,
  sum_parts: SumParts,
) -> jax.Array:
  """Returns the word of a rank by counting 16 bits at a time."""

  def first(total):
    size = words.shape[-1] if sum_parts is whole else jnp.sum(total[0])
    rank = jnp.asarray(_rank(density, more, size), total.dtype)
    return _locate(total, jnp.broadcast_to(rank, total.shape[:1]))

  flat = words.reshape(-1, words.shape[-1])
  counted, finish, args = jnp.ones(flat.shape, bool), first, ()
  prefix = jnp.zeros_like(flat[:, 0])
  for shift in range(bits - _HALF, -1, -_HALF):
    digits = (flat >> shift) & ((1 << _HALF) - 1)
    part = _histogram(digits, counted)
    found, rank = sum_parts(part, finish, *args)
    prefix = (prefix << _HALF) | found.astype(words.dtype)
    counted = flat >> shift == prefix[:, None]
    finish, args = _locate, (rank,)
  return prefix.reshape(words.shape[:-1])


def threshold(
  magnitude: jax.Array,
  density: ArrayLike,
  *,
  more: int = 1,
  sum_parts: SumParts = whole,
) -> jax.Array:
  """Returns the magnitude from which on entries belong to the largest.

  Args:
    magnitude: `[..., P]`, not negative.
    density: share of entries, in (0, 1]; may be traced.
    more: how many entries reach the threshold beyond `floor(density P)`, if no
      two are equal; at least one does and at most all.
    sum_parts: sums over the parts of the model of which `magnitude` is one.

  Returns:
    `[...]`, one of the entries, bit for bit.
  """
  bits = magnitude.dtype.itemsize * 8
  words = lax.bitcast_convert_type(magnitude, jnp.dtype(f'uint{bits}'))
  by_halves = functools.partial(
    _by_halves, density=density, more=more, bits=bits, sum_parts=sum_parts
  )
  if sum_parts is whole:
    rows = words.reshape(-1, 1, words.shape[-1])
    # Counting into bins is the faster on a CPU only; row by row it holds least.
    found = lax.platform_dependent(
      words,
      cpu=lambda words: lax.map(by_halves, rows).reshape(words.shape[:-1]),
      default=lambda words: _by_bits(words, density, more, bits),
    )
  else:
    found = by_halves(words)
  return lax.bitcast_convert_type(found, magnitude.dtype)
