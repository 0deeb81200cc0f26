"""Stopping on request: what clusters ask by SIGTERM, and how a run answers."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Of a run that saved what it did and wants to be started again: EX_TEMPFAIL of
sysexits.h, which schedulers can be told to restart."""


class Preempted(SystemExit):
  """A run was asked to stop, and has saved what it did."""

  def __init__(self, message: str):
    super().__init__(EXIT_CODE)
    self.message = message

  def __str__(self) -> str:
    return self.message


def exit_at_once() -> None:
  """Has SIGTERM end the process with `EXIT_CODE`, where nothing is to save."""

  def stop(*_: Any):
    raise Preempted('asked to stop')

  signal.signal(signal.SIGTERM, stop)


_LOOKS = itertools.count(1)
"""JAX has all processes stop at one more than the largest number that one of
them gave it: these must grow by one a look, whatever is done between looks."""


class Watch:
  """Notices SIGTERM, so that a loop can save before it stops.

  With several processes it is JAX's own watch: a notice to one of them has all
  of them stop after as many looks.

  Args:
    together: whether all processes run the loop. Where one does while others
      wait, it does not stop.
  """

  def __init__(self, *, together: bool = True):
    self._asked, self._together = False, together

  def __enter__(self) -> 'Watch':
    self._alone = (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    )
    if self._alone:
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._alone:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, *_: Any) -> None:
    self._asked = True

  def asked(self) -> bool:
    """Whether to stop now; all processes ask equally often."""
    if jax.process_count() > 1:
      return self._together and multihost_utils.reached_preemption_sync_point(
        next(_LOOKS)
      )
    return self._asked
