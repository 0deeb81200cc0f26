"""Descents that are watched and resumable: curves, saves, SIGTERM.

A run may descend several times, one after the other: an attack fine-tunes a
clean model and a bad one. All of it follows from the run's key, so that a run
that is started again takes the same descents in the same order, and each goes
on from its newest save.
"""

from collections.abc import Callable, Mapping
import contextlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import checkpoint
from dam_jax.metric_writer import MetricWriter
from experiments import preemption

Run = Callable[[Any, jax.Array], tuple[Any, Mapping[str, jax.Array]]]
"""`(state, start) -> (state, metrics [chunk])`: some steps from a number on."""


def chunk_of(steps: int, most: int = 10) -> int:
  """Returns how many steps to take under one dispatch.

  Args:
    steps: that it must divide.
    most: few enough that progress shows.

  Examples:
    >>> chunk_of(400), chunk_of(4), chunk_of(14)
    (10, 4, 7)
  """
  return max(n for n in range(1, most + 1) if steps % n == 0)


def descend(run: Run, state: Any, *, steps: int, chunk: int) -> Any:
  """Takes all steps, without a look at what comes out of them."""
  for start in range(0, steps, chunk):
    state, _ = run(state, jnp.int32(start))
  return state


class Log:
  """The descents of one run, their curves and saves in its workdir.

  Curves are `curves/<number>-<name>.csv`, saves `states/<number>-<name>/`.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    identity: Callable[[], Any],
    *,
    max_lost: int,
    advance: Callable[[str, int, int], None] = lambda name, done, steps: None,
  ):
    """Writes nothing yet.

    Args:
      workdir: of the run.
      identity: says what the run is made of, JSON values; asked where there are
        saves or is to be one, which another run must not go on from.
      max_lost: steps of a descent that a kill may lose. There are two saves in
        as many, for one of them may be under way.
      advance: told a descent's name, how many steps are done, and of how many.
    """
    self._workdir, self._identity = workdir, identity
    self._every, self._advance = max(1, max_lost // 2), advance
    self._count = 0

  def __call__(
    self, run: Run, state: Any, *, name: str, steps: int, chunk: int
  ) -> Any:
    """Takes all steps of a descent.

    Args:
      run: of `chunk` steps; donates its state.
      state: to start from.
      name: of the descent.
      steps: in all.
      chunk: divides them.

    Returns:
      The last state.

    Raises:
      FloatingPointError: where the loss or the gradient is not finite.
      ValueError: where there are saves of another run.
      Preempted: where SIGTERM came, once what was done is saved.
    """
    full = f'{self._count}-{name}'
    self._count += 1
    folder = self._workdir / 'states' / full
    first, parts = 0, []
    with contextlib.ExitStack() as stack:
      watch = stack.enter_context(preemption.Watch())
      saves = None
      if folder.is_dir():
        self._claim()
        saves = stack.enter_context(checkpoint.Saves(folder))
      found = saves.restore(state) if saves else None
      writer = stack.enter_context(
        MetricWriter(self._workdir / 'curves' / f'{full}.csv')
      )
      if found:
        first, state, parts = found.step, found.state, [dict(found.metrics)]
        writer.write(0, found.metrics)
      for start in range(first, steps, chunk):
        self._advance(full, start, steps)
        state, metrics = run(state, jnp.int32(start))
        metrics = {key: np.asarray(x) for key, x in metrics.items()}
        writer.write(start, metrics)
        parts.append(metrics)
        _check(full, start, metrics)
        done, asked = start + chunk, watch.asked()
        # The last one is for runs that descend again.
        last = done == steps and saves is not None
        if asked or last or done // self._every > start // self._every:
          if saves is None:
            self._claim()
            saves = stack.enter_context(checkpoint.Saves(folder))
          saves.save(done, state, joined(parts))
          if asked:
            saves.wait()
            raise preemption.Preempted(
              f'{full}: asked to stop after step {done}'
            )
    return state

  def _claim(self) -> None:
    """Makes the saves this run's, or raises where they are another's."""
    path = self._workdir / 'states' / 'run.json'
    asked = json.loads(json.dumps(self._identity()))
    if not path.exists():
      checkpoint.write(path, json.dumps(asked, indent=2))
    elif json.loads(path.read_text()) != asked:
      raise ValueError(
        f'{path.parent} holds saves of a run with another config, base or '
        'task: take another workdir, or delete them'
      )

  def forget(self) -> None:
    """Deletes the saves, once the run has written what it made."""
    shutil.rmtree(self._workdir / 'states', ignore_errors=True)


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Puts the metrics of several dispatches after each other."""
  return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def _check(name: str, start: int, metrics: Mapping[str, np.ndarray]) -> None:
  """Raises where something is not finite."""
  finite = np.all([np.isfinite(x) for x in metrics.values()], axis=0)
  if not finite.all():
    raise FloatingPointError(
      f'{name}: the loss or its gradient is not finite at step '
      f'{start + int(np.argmin(finite))}: lower learning_rate'
    )
