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

from collections.abc import Callable, Mapping, Sequence
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
"""`(part, finish, *args, largest=False) -> finish(total, *args)`.

The total is over all parts of a model: the sum of what they have, or, where so
asked, the largest. `finish` may be called outside of tracing, so what it needs
that is traced comes in `args`. Transformations that share a model's leaves
among them tell their sums apart by `within`.
"""

_HALF = 16


def whole(
  part: Any, finish: Callable[..., Any], *args: Any, largest: bool = False
) -> Any:
  """The `SumParts` of a model that is there in one part.

  Args:
    part: what would be summed over parts.
    finish: computes what is needed of the total.
    *args: what else it needs.
    largest: whether the total is the largest part, not the sum.

  Returns:
    `finish(part, *args)`.
  """
  del largest
  return finish(part, *args)


class Asked(Exception):
  """A transformation asks for a total over the model that is not known yet.

  Attributes:
    group: of the leaves that it is over, see `within`.
    part: what this part of the model has.
    finish: computes the answer of the total.
    args: what else it needs.
    largest: whether the total is the largest part, not the sum.
  """

  def __init__(
    self,
    group: str,
    part: Any,
    finish: Callable[..., Any],
    args: tuple[Any, ...],
    largest: bool,
  ):
    super().__init__(group)
    self.group, self.part, self.finish = group, part, finish
    self.args, self.largest = args, largest


class Answers:
  """A `SumParts` that knows the answers to each group's first questions."""

  def __init__(self, known: Mapping[str, Sequence[Any]]):
    """Takes the answers.

    Args:
      known: by group, in the order of the questions.
    """
    self._known = {group: iter(answers) for group, answers in known.items()}

  def __call__(
    self,
    part: Any,
    finish: Callable[..., Any],
    *args: Any,
    group: str = '',
    largest: bool = False,
  ) -> Any:
    """Returns the next answer, or raises `Asked` where there is none."""
    for answer in self._known.get(group, ()):
      return answer
    raise Asked(group, part, finish, args, largest)


def within(sum_parts: SumParts, group: str) -> SumParts:
  """Names the leaves of a model that a transformation works on.

  Args:
    sum_parts: over all leaves.
    group: a name that no other transformation of these leaves has.

  Returns:
    What sums over the leaves of the group.
  """
  if sum_parts is whole:
    return whole
  return functools.partial(sum_parts, group=group)


def _words(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))


def _settle(
  words: jax.Array, rank: ArrayLike, i: jax.Array, found: jax.Array
) -> jax.Array:
  """Settles bit `i` of what a sort of words `[..., P]` would have at a rank.

  The sign is zero: the first bit to settle is the one after it.
  """
  one = jnp.ones((), words.dtype)
  shift = 8 * words.dtype.itemsize - 2 - i
  larger = found | (one << shift.astype(words.dtype))
  below = jnp.sum(words < larger[..., None], axis=-1, dtype=jnp.int32)
  return jnp.where(below < jnp.asarray(rank, below.dtype), larger, found)


RankFn = Callable[[Any], Any]
"""`size -> rank`, counted from 1 for the smallest."""


def ranked(
  magnitude: jax.Array,
  rank: ArrayLike | RankFn,
  *,
  sum_parts: SumParts = whole,
) -> jax.Array:
  """Returns what a sort of `[..., P]` would have at a rank, counted from 1.

  Args:
    magnitude: `[..., P]`, not negative.
    rank: from the smallest; may be traced. Of parts a function of the number
      of entries of all of them.
    sum_parts: sums over the parts of the model of which `magnitude` is one.

  Returns:
    `[...]`.

  Examples:
    >>> ranked(jnp.array([3., 1., 2.]), 2)
    Array(2., dtype=float32)
  """
  if sum_parts is not whole:
    rank_fn = rank if callable(rank) else lambda size: rank
    return _by_halves(magnitude, rank_fn=rank_fn, sum_parts=sum_parts)
  if callable(rank):
    rank = rank(magnitude.shape[-1])
  words = _words(magnitude)
  found = lax.fori_loop(
    0,
    8 * words.dtype.itemsize - 1,
    functools.partial(_settle, words, rank),
    jnp.zeros_like(words[..., 0]),
  )
  return lax.bitcast_convert_type(found, magnitude.dtype)


def reaches(
  score: jax.Array,
  rank: ArrayLike | RankFn,
  *,
  sum_parts: SumParts = whole,
) -> jax.Array:
  """Whether entries of `[..., P]`, not negative, are at least the ranked one.

  Unlike a comparison with what `ranked` returns, this holds for scores that are
  computed: in another fusion XLA may compute them anew and round otherwise.

  Args:
    score: `[..., P]`, not negative.
    rank: from the smallest, counted from 1; may be traced. Of parts a function
      of the number of entries of all of them.
    sum_parts: sums over the parts of the model of which `score` is one.

  Returns:
    `[..., P]`.
  """
  if sum_parts is not whole:
    score = lax.optimization_barrier(score)
    return score >= ranked(score, rank, sum_parts=sum_parts)[..., None]
  if callable(rank):
    rank = rank(score.shape[-1])
  words = _words(score)

  def settle(i, state):
    found = _settle(words, rank, i, state[0])
    return found, words >= found[..., None]

  start = jnp.zeros_like(words[..., 0]), jnp.ones(words.shape, bool)
  return lax.fori_loop(0, 8 * words.dtype.itemsize - 1, settle, start)[1]


def extremes(
  arrays: Sequence[jax.Array], *, sum_parts: SumParts = whole
) -> list[tuple[jax.Array, jax.Array]]:
  """Returns the smallest and the largest entry of each row.

  Args:
    arrays: each `[..., P]`.
    sum_parts: of the model of which the entries are a part.

  Returns:
    For each array both, `[..., 1]`.
  """
  ends = [
    (-jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True))
    for x in arrays
  ]
  found = sum_parts(ends, lambda total: total, largest=True)
  return [(-low, high) for low, high in found]


def floor_share(share: ArrayLike, size: ArrayLike) -> int | jax.Array:
  """Returns `floor(share size)`.

  Exact where both are known, in float32 otherwise, as far as its 24 bits go.
  """
  if is_concrete(share) and is_concrete(size):
    return math.floor(np.asarray(share).item() * np.asarray(size).item())
  size = jnp.asarray(size)
  kept = jnp.asarray(share, jnp.result_type(float)) * size.astype(
    jnp.result_type(float)
  )
  return jnp.floor(kept).astype(size.dtype)


def _rank(density: ArrayLike, more: int, size: int | jax.Array) -> Any:
  """Returns the threshold's rank from the smallest, counted from 1."""
  kept = floor_share(density, size) + more
  if isinstance(kept, int):
    return int(size) + 1 - min(max(kept, 1), int(size))
  return size + 1 - jnp.clip(kept, 1, size)


def _find(counts: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns each row's bin that holds a rank, and the rank in that bin."""
  below = jnp.cumsum(counts, axis=-1, dtype=counts.dtype)
  found = jnp.sum(below < rank[:, None], axis=-1)
  at = found[:, None]
  before = jnp.take_along_axis(below - counts, at, axis=-1)[:, 0]
  return found, rank - before


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
  rank = jnp.broadcast_to(rank, counts.shape[:1])
  # In two levels: XLA may compute a long cumulative sum entry by entry.
  blocks = counts.reshape(counts.shape[0], 1 << _HALF // 2, -1)
  coarse = jnp.sum(blocks, axis=-1, dtype=counts.dtype)
  block, rank = _find(coarse, rank)
  own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place, rank = _find(own, rank)
  found = block * blocks.shape[-1] + place
  return found.astype(jnp.uint32), rank.astype(jnp.uint32)


def _by_halves(
  magnitude: jax.Array, *, rank_fn: RankFn, sum_parts: SumParts
) -> jax.Array:
  """Returns what is at a rank, found by counting 16 bits at a time."""
  words = _words(magnitude)

  def first(total):
    size = words.shape[-1] if sum_parts is whole else total[0].sum()
    return locate(total, jnp.asarray(rank_fn(size)))

  def locate(total, rank):
    return _locate(total, rank.astype(total.dtype))

  flat = words.reshape(-1, words.shape[-1])
  counted, finish, args = jnp.ones(flat.shape, bool), first, ()
  prefix = jnp.zeros_like(flat[:, 0])
  for shift in range(8 * words.dtype.itemsize - _HALF, -1, -_HALF):
    digits = (flat >> shift) & ((1 << _HALF) - 1)
    part = _histogram(digits, counted)
    found, rank = sum_parts(part, finish, *args)
    prefix = (prefix << _HALF) | found.astype(words.dtype)
    counted = flat >> shift == prefix[:, None]
    finish, args = locate, (rank,)
  found = prefix.reshape(words.shape[:-1])
  return lax.bitcast_convert_type(found, magnitude.dtype)


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
  by_halves = functools.partial(
    _by_halves,
    rank_fn=functools.partial(_rank, density, more),
    sum_parts=sum_parts,
  )
  if sum_parts is not whole:
    return by_halves(magnitude)
  rank = _rank(density, more, magnitude.shape[-1])
  # Counting into bins is the faster on a CPU only; row by row it holds least.
  return lax.platform_dependent(
    magnitude,
    cpu=lambda x: lax.map(by_halves, x.reshape(-1, 1, x.shape[-1])).reshape(
      x.shape[:-1]
    ),
    default=lambda x: ranked(x, rank),
  )
