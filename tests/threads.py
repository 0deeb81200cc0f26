"""Threads that take the part of processes (`dam_jax.distributed.Hosts`)."""

from concurrent import futures
import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class Hosts:
  """One of several threads, which pass on what they are given.

  Attributes:
    index: of this thread.
    count: of all.
    board: where each puts what it was given.
    barrier: of all.
  """

  index: int
  count: int
  board: list
  barrier: threading.Barrier

  def exchange(self, data: bytes) -> list[bytes]:
    self.board[self.index] = data
    self.barrier.wait()
    found = [*self.board]
    self.barrier.wait()
    return found


def together(count, work):
  """Returns what `work(hosts)` returns, or raises, on each of the threads."""
  board, barrier = [b''] * count, threading.Barrier(count, timeout=60)
  with futures.ThreadPoolExecutor(count) as pool:
    running = [
      pool.submit(work, Hosts(i, count, board, barrier)) for i in range(count)
    ]
    return [x.exception() or x.result() for x in running]
