"""Runs a learned merge: many steps a dispatch, watched and resumable."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import shutil
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import pipeline
from dam_jax.metric_writer import MetricWriter


class Learned(NamedTuple):
  """What a learned merge leaves.

  Attributes:
    params: the merged model.
    state: the merger's last state.
    metrics: by name, `[steps, ...]`.
    seconds: 'compile', and 'step' as the mean over the steps of this run.
  """

  params: dj.typing.Params
  state: Any
  metrics: dict[str, np.ndarray]
  seconds: dict[str, float]


def check_batch(merger: dj.Merger, sizes: Sequence[int], batch: int) -> None:
  """Raises ValueError unless every task has enough images for a batch.

  Args:
    merger: that reads them.
    sizes: number of images of each task.
    batch: images a task and draw.
  """
  pipeline.epoch_indices(
    0, sizes, steps=1, phases=merger.plan.phases, batch=batch
  )


class Program(NamedTuple):
  """Some steps of a merger, compiled.

  Attributes:
    run: `(state, base, experts, data, indices) -> (state, metrics)`.
    chunk: how many steps it takes.
    seconds: that compiling took.
  """

  run: Callable[..., Any]
  chunk: int
  seconds: float


def compile_lowered(
  lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> jax.stages.Compiled:
  """Compiles a program, without options where this XLA lacks one of them.

  Args:
    lowered: the program.
    options: of XLA, by name.

  Returns:
    The compiled program.
  """
  try:
    return lowered.compile(dict(options))
  except jax.errors.JaxRuntimeError as e:
    if 'No such compile option' not in str(e):
      raise
    logging.warning('compiled without options: %s', e)
    return lowered.compile()


def compile_steps(
  merger: dj.Merger,
  base: dj.tree.Raveled,
  experts: dj.tree.Raveled,
  *,
  data: pipeline.Unlabelled,
  batch: int,
  compiler_options: Mapping[str, Any],
  max_chunk: int = 10,
) -> Program:
  """Compiles a merger's steps, without running any.

  Args:
    merger: that reads data.
    base: parameters, raveled.
    experts: stacked `[K, ...]`, raveled.
    data: unlabelled images, with references where the merger reads them.
    batch: images a task and draw.
    compiler_options: of XLA, by name.
    max_chunk: steps under one dispatch, fewer where they do not divide all:
      few enough that progress shows.

  Returns:
    The program.
  """
  plan = merger.plan
  chunk = max(n for n in range(1, max_chunk + 1) if plan.steps % n == 0)
  state = jax.eval_shape(merger.init, jax.random.key(0), base, experts)
  shape = (chunk, plan.phases, data.images.shape[0], batch)
  indices = jax.ShapeDtypeStruct(shape, jnp.int32)
  begin = time.perf_counter()
  steps = dj.scan_steps(merger, pipeline.gather)
  lowered = steps.lower(state, base, experts, _read(plan, data), indices)
  run = compile_lowered(lowered, compiler_options)
  return Program(run, chunk, time.perf_counter() - begin)


def _read(plan: dj.Plan, data: pipeline.Unlabelled) -> pipeline.Unlabelled:
  return data if plan.references else data._replace(references=None)


def learn(
  name: str,
  merger: dj.Merger,
  program: Program,
  base: dj.tree.Raveled,
  experts: dj.tree.Raveled,
  *,
  data: pipeline.Unlabelled,
  sizes: Sequence[int],
  tasks: Sequence[str],
  batch: int,
  seed: int,
  folder: pathlib.Path,
  save_seconds: float = 60.0,
  advance: Callable[[int], None] = lambda steps: None,
) -> Learned:
  """Takes all steps of a merger.

  Args:
    name: of the method.
    merger: that reads data.
    program: its steps, from `compile_steps`.
    base: parameters, raveled.
    experts: stacked `[K, ...]`, raveled.
    data: unlabelled images, with references where the merger reads them.
    sizes: number of images of each task.
    tasks: their names.
    batch: images a task and draw.
    seed: of the masks' samples, and of the order of images.
    folder: for `curves/<name>.csv`, and states in `states/<name>`: a run that
      finds one there goes on from it.
    save_seconds: between two states.
    advance: told how many steps are done after each dispatch.

  Returns:
    The merged model and what was measured on the way.

  Raises:
    FloatingPointError: where a loss or gradient is not finite; the state
      before that step stays in `folder`.
  """
  plan, chunk = merger.plan, program.chunk
  data = _read(plan, data)

  def indices(start):
    return jnp.asarray(
      pipeline.epoch_indices(
        seed, sizes, steps=chunk, phases=plan.phases, batch=batch, start=start
      )
    )

  state = merger.init(jax.random.key(seed), base, experts)
  seconds = {'compile': program.seconds}
  saves = _Saves(folder / 'states' / name)
  first, state, parts = saves.restore(state)
  advance(first)
  begin = saved = time.perf_counter()
  with MetricWriter(folder / 'curves' / f'{name}.csv') as writer:
    if parts:
      writer.write(0, _by_task(parts[0], tasks))
    for start in range(first, plan.steps, chunk):
      state, metrics = program.run(state, base, experts, data, indices(start))
      metrics = {key: np.asarray(x) for key, x in metrics.items()}
      writer.write(start, _by_task(metrics, tasks))
      parts.append(metrics)
      advance(chunk)
      bad = not metrics['finite'].all()
      if bad or time.perf_counter() - saved > save_seconds:
        saves.save(start + chunk, state, _joined(parts))
        saved = time.perf_counter()
      if bad:
        _stop(name, _joined(parts), saves.folder)
  seconds['step'] = (time.perf_counter() - begin) / max(1, plan.steps - first)
  params = merger.finalize(state, base, experts)
  return Learned(params, state, _joined(parts), seconds)


class _Saves:
  """The newest state of a run on disk, and what was measured until then."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def save(self, step: int, state: Any, metrics: dict[str, Any]):
    """Writes the new state in full before it deletes the old one."""
    old = self._steps()
    path = self.folder / f'{step}.npz'
    with checkpoint.replacing(path) as temporary, temporary.open('wb') as file:
      np.savez(file, **metrics)
    checkpoint.save_state(self.folder / str(step), state)
    for earlier in old:
      if earlier != step:
        shutil.rmtree(self.folder / str(earlier))
        (self.folder / f'{earlier}.npz').unlink()

  def restore(self, state: Any) -> tuple[int, Any, list[dict]]:
    """Returns the step to go on from, its state, and earlier metrics."""
    steps = self._steps()
    if not steps:
      return 0, state, []
    step = max(steps)
    state = checkpoint.restore_state(self.folder / str(step), state)
    with np.load(self.folder / f'{step}.npz', allow_pickle=False) as file:
      return step, state, [dict(file)]

  def _steps(self) -> list[int]:
    return [int(p.name) for p in self.folder.glob('*') if p.name.isdigit()]


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def _by_task(metrics, tasks):
  """Gives each task its own column."""
  out = {}
  for key, x in metrics.items():
    if x.ndim == 1:
      out[key] = x
    else:
      out |= {f'{key}/{task}': x[:, t] for t, task in enumerate(tasks)}
  return out


def _stop(name: str, metrics: dict[str, np.ndarray], folder: pathlib.Path):
  """Says at which step and in which phase a loss or gradient broke."""
  at = int(np.argmin(metrics['finite']))
  bad = {key: ~np.isfinite(_flat(x[at])) for key, x in metrics.items()}
  if at:
    # A step without a phase measures NaN there, and is not to blame for it.
    bad = {
      key: x & np.isfinite(_flat(metrics[key][at - 1]))
      for key, x in bad.items()
    }
  phases = sorted({key.split('/')[0] for key, x in bad.items() if x.any()})
  raise FloatingPointError(
    f'{name}: a loss or gradient is not finite at step {at}, phase '
    f'{" or ".join(phases) or "unknown"}; the last good state is in {folder}'
  )


def _flat(x):
  return np.ravel(x).astype(float)
