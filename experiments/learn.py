"""Runs a learned merge: many steps a dispatch, watched and resumable."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import math
import pathlib
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import parallel
from dam_jax.data import pipeline
from dam_jax.metric_writer import MetricWriter
from experiments import descent
from experiments import preemption


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


def usable(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns compiler options, or none where this XLA lacks one of them.

  Args:
    options: of XLA, by name.
  """
  try:
    jax.jit(lambda: 0, compiler_options=dict(options))()
  except jax.errors.JaxRuntimeError as e:
    if 'No such compile option' not in str(e):
      raise
    logging.warning('compiled without options: %s', e)
    return {}
  return dict(options)


def compile_steps(
  merger: dj.Merger,
  base: dj.tree.Raveled,
  experts: dj.tree.Raveled,
  data: pipeline.Unlabelled,
  *,
  batch: int,
  mesh: jax.sharding.Mesh | None = None,
  compiler_options: Mapping[str, Any],
  max_chunk: int = 10,
  saved: Sequence[int] = (),
  batch_fn: Callable[..., dj.Batch] = pipeline.gather,
) -> Program:
  """Compiles a merger's steps, without running any.

  Args:
    merger: that reads data.
    base: parameters, raveled.
    experts: stacked `[K, ...]`, raveled.
    data: unlabelled images, with references where the merger reads them.
    batch: images a task and draw.
    mesh: that the merger runs on; None is one device.
    compiler_options: of XLA, by name.
    max_chunk: steps under one dispatch, fewer where they do not divide all:
      few enough that progress shows.
    saved: steps of saves that the run may go on from (`saved_steps`), which it
      must divide too: they may be another chunk's.
    batch_fn: `(data, indices) -> Batch`, for data that are no images.

  Returns:
    The program.
  """
  plan = merger.plan
  common = math.gcd(plan.steps, *saved)
  chunk = descent.chunk_of(common, max_chunk)
  state = jax.eval_shape(merger.init, jax.random.key(0), base, experts)
  if mesh is not None:
    state = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=NamedSharding(mesh, parallel.state_spec(x, base.layout, mesh)),
      ),
      state,
    )
  shape = (chunk, plan.phases, data.images.shape[0], batch)
  indices = jax.ShapeDtypeStruct(shape, jnp.int32)
  begin = time.perf_counter()
  steps = dj.scan_steps(merger, batch_fn)
  lowered = steps.lower(state, base, experts, _read(plan, data), indices)
  run = lowered.compile(usable(compiler_options))
  return Program(run, chunk, time.perf_counter() - begin)


def saved_steps(folder: pathlib.Path, name: str) -> list[int]:
  """Returns the steps of all saves of a method in a folder of `learn`."""
  saves = folder / 'states' / name
  return [int(p.name) for p in saves.glob('*') if p.name.isdigit()]


def _read(plan: dj.Plan, data: pipeline.Unlabelled) -> pipeline.Unlabelled:
  return data if plan.references else data._replace(references=None)


def learn(
  name: str,
  merger: dj.Merger,
  program: Program,
  base: dj.tree.Raveled,
  experts: dj.tree.Raveled,
  data: pipeline.Unlabelled,
  *,
  sizes: Sequence[int],
  tasks: Sequence[str],
  batch: int,
  seed: int,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh | None = None,
  max_lost: int = 50,
  keep: checkpoint.Keep = checkpoint.Keep(),
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
    folder: for `curves/<name>.csv`, and saves in `states/<name>`: a run that
      finds one there goes on from it.
    mesh: that the merger runs on; None is one device. A save may be of another.
    max_lost: steps that a kill may lose. There are two saves in as many, for
      one of them may be under way.
    keep: which saves stay.
    advance: told how many steps are done after each dispatch.

  Returns:
    The merged model and what was measured on the way.

  Raises:
    FloatingPointError: where a loss or gradient is not finite; the newest save
      is of a step before it.
    Preempted: where SIGTERM came, once what was learned is saved.
  """
  plan, chunk = merger.plan, program.chunk
  data = _read(plan, data)

  def indices(start):
    return pipeline.epoch_indices(
      seed, sizes, steps=chunk, phases=plan.phases, batch=batch, start=start
    )

  state = merger.init(jax.random.key(seed), base, experts)
  seconds = {'compile': program.seconds}
  first, parts, every = 0, [], max(1, max_lost // 2)
  with contextlib.ExitStack() as stack:
    saves = checkpoint.Saves(folder / 'states' / name, keep=keep)
    stack.enter_context(saves)
    watch = stack.enter_context(preemption.Watch(together=mesh is not None))
    curves = folder / 'curves' / f'{name}.csv'
    writer = stack.enter_context(MetricWriter(curves))
    one = mesh or dj.sharding.make_mesh(devices=jax.local_devices()[:1])
    save = parallel.restore(saves, state, base.layout, one)
    if save is not None:
      first, state, parts = save.step, save.state, [dict(save.metrics)]
      writer.write(0, _by_task(save.metrics, tasks))
    advance(first)
    begin = time.perf_counter()
    for start in range(first, plan.steps, chunk):
      state, metrics = program.run(state, base, experts, data, indices(start))
      metrics = {key: np.asarray(x) for key, x in metrics.items()}
      writer.write(start, _by_task(metrics, tasks))
      parts.append(metrics)
      if not metrics['finite'].all():
        raise FloatingPointError(_blame(name, descent.joined(parts), tasks))
      done = start + chunk
      asked = watch.asked()
      if asked or done // every > start // every:
        saves.save(done, state, descent.joined(parts))
      if asked:
        saves.wait()
        raise preemption.Preempted(f'{name}: asked to stop after step {done}')
      advance(chunk)
  seconds['step'] = (time.perf_counter() - begin) / max(1, plan.steps - first)
  params = merger.finalize(state, base, experts)
  return Learned(params, state, descent.joined(parts), seconds)


def _by_task(metrics, tasks):
  """Gives each task its own column."""
  out = {}
  for key, x in metrics.items():
    if x.ndim == 1:
      out[key] = x
    else:
      out |= {f'{key}/{task}': x[:, t] for t, task in enumerate(tasks)}
  return out


def _blame(
  name: str, metrics: dict[str, np.ndarray], tasks: Sequence[str]
) -> str:
  """Says at which step, in which phase and on which tasks a loss broke."""
  at = int(np.argmin(metrics['finite']))
  bad = {key: ~np.isfinite(_float(x[at])) for key, x in metrics.items()}
  if at:
    # A step without a phase measures NaN there, and is not to blame for it.
    bad = {
      key: x & np.isfinite(_float(metrics[key][at - 1]))
      for key, x in bad.items()
    }
  phases = sorted({key.split('/')[0] for key, x in bad.items() if x.any()})
  found = [
    task
    for t, task in enumerate(tasks)
    if any(x[t] for x in bad.values() if x.ndim)
  ]
  return (
    f'{name}: a loss or gradient is not finite at step {at}, phase '
    f'{" or ".join(phases) or "unknown"}, task '
    f'{" or ".join(found) or "unknown"}; saves are of steps before it'
  )


def _float(x):
  return np.asarray(x).astype(float)
