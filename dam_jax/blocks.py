"""Cuts models into blocks of entries, where leaves need not stay whole.

Blocks have one size whatever the shapes of leaves, so that one compiled program
serves a whole model, and what it computes with stays in a processor's caches.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
import concurrent.futures
import math
import threading
from typing import Any, NamedTuple

import numpy as np

from dam_jax.typing import Source

SIZE = 1 << 18
"""Entries of a block at most."""


class Leaf:
  """A merged leaf that is put together from pieces.

  Attributes:
    path: of the leaf.
    finite: whether the base and each expert are, as far as pieces were added.
  """

  def __init__(self, path: str, shape: tuple[int, ...], num: int):
    self.path, self.finite = path, np.ones(num, bool)
    self._array = aligned(shape)
    self._left, self._lock = math.prod(shape), threading.Lock()

  def add(self, begin: int, merged: np.ndarray, finite: Any) -> Any:
    """Takes a piece, and returns the array with the last one."""
    self._array.reshape(-1)[begin : begin + merged.size] = merged
    with self._lock:
      self._left -= merged.size
      self.finite &= finite
      return None if self._left else self._array


class Piece(NamedTuple):
  """Entries of a leaf from `begin` on: rows of the base and of each expert."""

  leaf: Leaf
  begin: int
  rows: Sequence[np.ndarray]


def aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Makes an array of float32 that JAX takes as it is, without a copy."""
  size = 4 * math.prod(shape)
  raw = np.empty(size + 64, np.uint8)
  begin = -raw.ctypes.data % 64
  return raw[begin : begin + size].view(np.float32).reshape(shape)


def cut(
  sources: Sequence[Source],
  paths: Sequence[str],
  on_leaf: Callable[[str, int], None],
) -> Generator[list[Piece]]:
  """Yields blocks; each leaf is read once.

  Args:
    sources: the base and the experts.
    paths: of the leaves to cut.
    on_leaf: called with a leaf's path and bytes, when it was cut.
  """
  total = sum(math.prod(sources[0].leaves[path].shape) for path in paths)
  # A last block of another size would be compiled for: as few as possible.
  sizes = range(SIZE, SIZE // 2, -16)
  size = next((n for n in sizes if total % n == 0), SIZE)
  block, room = [], size
  for path in paths:
    arrays = [source.read(path) for source in sources]
    rows = [np.asarray(x).reshape(-1) for x in arrays]
    leaf = Leaf(path, arrays[0].shape, len(rows))
    begin, whole = 0, False
    while not whole:
      end = min(begin + room, rows[0].size)
      block.append(Piece(leaf, begin, [x[begin:end] for x in rows]))
      begin, room, whole = end, room - (end - begin), end == rows[0].size
      if not room:
        yield block
        block, room = [], size
    on_leaf(path, sum(x.nbytes for x in arrays))
  if block:
    yield block


def fill(buffer: np.ndarray, block: Sequence[Piece]) -> list[np.ndarray]:
  """Lays pieces side by side: rows `[n]` of the base and of each expert."""
  end = 0
  for piece in block:
    begin, end = end, end + piece.rows[0].size
    for row, entries in zip(buffer, piece.rows, strict=True):
      row[begin:end] = entries
  return [row[:end] for row in buffer]


def collect(
  block: Sequence[Piece], merged: np.ndarray, finite: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """Adds a merged block to its leaves; yields those that are whole now.

  Args:
    block: that was merged.
    merged: `[n]`.
    finite: whether the base's and each expert's entries are, `[1 + K]`.

  Yields:
    A leaf's path, its array, and whether the base's and each expert's are
    finite.
  """
  end = 0
  for leaf, start, rows in block:
    begin, end = end, end + rows[0].size
    # Of a block that is not finite it is asked which piece is not.
    fine = finite.all() or [bool(np.isfinite(x).all()) for x in rows]
    array = leaf.add(start, merged[begin:end], fine)
    if array is not None:
      yield leaf.path, array, leaf.finite


def work(
  blocks: Generator[list[Piece]],
  use: Callable[[np.ndarray, list[Piece]], None],
  rows: int,
  pool: concurrent.futures.Executor,
  workers: int,
) -> None:
  """Calls a function for every block, in several threads.

  Args:
    blocks: from `cut`; the threads take turns to ask for one.
    use: takes a buffer `[rows, SIZE]`, the thread's own, and a block.
    rows: of the buffer.
    pool: of threads.
    workers: how many of them to use.
  """
  lock = threading.Lock()

  def run():
    buffer = aligned((rows, SIZE))
    while True:
      with lock:
        block = next(blocks, None)
      if block is None:
        return
      use(buffer, block)

  tasks = [pool.submit(run) for _ in range(workers)]
  try:
    done, _ = concurrent.futures.wait(
      tasks, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    for task in done:
      task.result()
  finally:
    with lock:
      blocks.close()
