"""Threads that take the part of processes (`dam_jax.distributed.Hosts`).

They take turns, as JAX would else trace the same functions on all of them at
once, which processes do not share.
"""

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
    turn: held by the one that runs.
  """

  index: int
  count: int
  board: list
  barrier: threading.Barrier
  turn: threading.Lock

  def exchange(self, data: bytes) -> list[bytes]:
    self.board[self.index] = data
    self.turn.release()
    try:
      self.barrier.wait()
      found = [*self.board]
      self.barrier.wait()
    finally:
      self.turn.acquire()
    return found


def together(count, work):
  """Returns what `work(hosts)` returns, or raises, on each of the threads."""
  board, barrier = [b''] * count, threading.Barrier(count, timeout=60)
  turn = threading.Lock()

  def run(index):
    with turn:
      return work(Hosts(index, count, board, barrier, turn))

  with futures.ThreadPoolExecutor(count) as pool:
    running = [pool.submit(run, i) for i in range(count)]
    return [x.exception() or x.result() for x in running]
