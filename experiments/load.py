"""Checks a config and reads what the merges of a run share."""

from collections.abc import Mapping, Sequence
import dataclasses
import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from dam_jax.models import inputs
from experiments import quickstart_pool
from experiments import settings

KEYS = {
  'pool': 'folder of checkpoints, tasks and triggers (dam_jax.data.tasks); '
  "empty makes one in the workdir, as 'make' says",
  'make': 'options of experiments.quickstart_pool',
  'tasks': "names with commas; empty is 'usual_tasks' where the pool has them, "
  'and tasks that are attacked',
  'usual_tasks': 'names with commas',
  'bad': "names of backdoored checkpoints with commas, or how many 'usual_bad'",
  'usual_bad': 'names with commas',
  'triggers': 'names of more triggers to test, whose experts are not merged',
  'methods': "names with commas, or 'static', 'learned', 'informed', 'all'",
  'options': 'of each method; None leaves what is said below',
  'steps': 'of a learned method, and the most of each pass of an informed one; '
  "0 for each method's own",
  'batch': 'images a task and draw',
  'compute': "'float32' or 'bfloat16'; state and weights are float32",
  'scan_layers': 'loop over the blocks of the tower: compiles faster',
  'remat': 'compute blocks again in gradients: less memory, a third more work',
  'compiler_options': 'of XLA, by name, for the steps of learned methods; left '
  'out where this XLA lacks one',
  'mesh': "sizes of the mesh that learned methods run on, as 'data=4,model=2', "
  "where 'data' divides their batches; empty is one device",
  'dev': 'dev images a task to adapt on; 0 is all',
  'test': 'test images a task to report on; 0 is all',
  'report_on': "'test', or 'dev' to choose options by, where no test image is "
  'seen; merges learn on dev, which flatters them there',
  'transfer_test': 'test images a task to measure transfer on; 0 is none',
  'test_batch': 'images a forward pass when testing',
  'audit': 'search triggers on each expert alone first, for the report and for '
  'dam_robust to start from',
  'max_lost': 'steps of a learned method that a kill may lose',
  'keep_last': 'saves of each, the newest ones',
  'keep_every': 'keep saves of steps that it divides too; 0 keeps none',
  'seed': 'of everything random',
}
"""What a config says."""


OPEN = ('mesh', 'max_lost', 'keep_last', 'keep_every')
"""Keys that may change between two starts of a run: results do not depend on
them but for rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All that the merges of a run share.

  Attributes:
    pool: tasks, paths and triggers.
    base: parameters.
    experts: stacked `[K, ...]`, in the order of the tasks.
    clean: the clean experts, likewise; None where the pool lacks one.
    logits_fn: of preprocessed images of all tasks.
    task_logits_fn: of preprocessed images of one task.
    inputs_fn: what linear layers read of them.
    levels: of the tower's leaves, from the lowest.
    hashes: SHA-256 of each checkpoint, by name.
  """

  pool: tasks_lib.Pool
  base: dj.typing.Params
  experts: dj.typing.Params
  clean: dj.typing.Params | None
  logits_fn: dj.typing.LogitsFn
  task_logits_fn: dj.typing.TaskLogitsFn
  inputs_fn: dj.typing.InputsFn
  levels: Sequence[str]
  hashes: Mapping[str, str]

  def image_logits_fn(self, params: Any, task: Any, images: jax.Array):
    """Maps images `[B, H, W, C]` in [0, 1] of one task to logits `[B, L]`."""
    return self.task_logits_fn(params, task, clip.normalize(images))

  @property
  def tasks(self) -> list[str]:
    """Names of the tasks."""
    return [task.name for task in self.pool.tasks]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of all images."""
    return self.pool.tasks[0].dev.images.shape[1:]

  @property
  def attacked(self) -> list[str]:
    """Names of the tasks on which a backdoor of a merged expert works."""
    return [trigger.task for trigger in self.pool.triggers.values()]


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises unless a config has the keys of `KEYS`, with sensible values.

  Args:
    config: to check.

  Raises:
    ValueError: with all that is wrong, and what is allowed.
  """
  lines = [
    f'{key}: no such key, allowed are {", ".join(KEYS)}'
    for key in config
    if key not in KEYS
  ]
  lines += [
    f'{key} is missing: {what}'
    for key, what in KEYS.items()
    if key not in config
  ]
  if not lines:
    allowed = list(inspect.signature(quickstart_pool.make_pool).parameters)[2:]
    lines += [
      f'make.{key}: no such key, allowed are {", ".join(allowed)}'
      for key in config.make
      if key not in allowed
    ]
    settings.mesh_sizes(config.mesh)
    if config.compute not in ('float32', 'bfloat16'):
      lines.append(
        f"compute must be 'float32' or 'bfloat16', got {config.compute!r}"
      )
    if config.report_on not in ('test', 'dev'):
      lines.append(
        f"report_on must be 'test' or 'dev', got {config.report_on!r}"
      )
    lines += [
      f'{key} must not be negative, got {config[key]}'
      for key in ('dev', 'test', 'transfer_test', 'steps', 'keep_every', 'seed')
      if config[key] < 0
    ]
    lines += [
      f'{key} must be positive, got {config[key]}'
      for key in ('batch', 'test_batch', 'max_lost', 'keep_last')
      if config[key] < 1
    ]
  settings.raise_if(lines)


def _bad(config: config_dict.ConfigDict) -> list[str]:
  """Returns the names of the backdoored checkpoints."""
  given, usual = str(config.bad).strip(), settings.split(config.usual_bad)
  if not given.isdigit():
    return settings.split(given)
  if int(given) > len(usual):
    raise ValueError(
      f'bad={given}: usual_bad has {len(usual)}, name the checkpoints instead'
    )
  return usual[: int(given)]


def _reported_on_dev(task: tasks_lib.Task, num: int) -> tasks_lib.Task:
  seen = tasks_lib.Split(*(x[: num or None] for x in task.dev))
  return dataclasses.replace(task, test=seen)


def load(config: config_dict.ConfigDict, folder: pathlib.Path) -> Setup:
  """Reads a pool's tasks and weights.

  Args:
    config: of the run.
    folder: of the pool.

  Returns:
    What the merges share.

  Raises:
    ValueError: where a file is missing or does not fit the others.
  """
  bad, probes = _bad(config), settings.split(config.triggers)
  names = settings.split(config.tasks)
  if not names:
    there = tasks_lib.task_names(folder)
    names = [n for n in settings.split(config.usual_tasks) if n in there]
    for name in (*bad, *probes) if names else ():
      trigger = attacks.load_trigger(folder / 'triggers' / f'{name}.npz')
      names += [trigger.task] * (trigger.task not in names)
  pool = tasks_lib.load_pool(
    folder,
    tasks=names,
    bad=bad,
    probes=probes,
    dev=config.dev,
    test=config.test,
  )
  if config.report_on == 'dev':
    pool = dataclasses.replace(
      pool, tasks=[_reported_on_dev(task, config.test) for task in pool.tasks]
    )
  tower_config = clip.load_config(pool.config)
  tower = clip.VisionTower(
    tower_config,
    dtype=jnp.bfloat16 if config.compute == 'bfloat16' else None,
    scan_layers=config.scan_layers,
    remat=config.remat,
  )
  shape = tower_config.image_shape
  found = pool.tasks[0].dev.images.shape[1:]
  if (
    found != shape or pool.tasks[0].head.shape[0] != tower_config.projection_dim
  ):
    raise ValueError(
      f'{pool.config}: the tower reads {list(shape)} and gives '
      f'{tower_config.projection_dim} features, the tasks have images '
      f'{list(found)} and heads of {pool.tasks[0].head.shape[0]}'
    )
  like = jax.eval_shape(
    tower.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.float32)
  )['params']
  base, experts = checkpoint.load_experts(
    pool.base, pool.experts, name_map=convert.clip_vision, like=like
  )
  clean = None
  if len(pool.clean) == len(pool.tasks):
    clean = experts
    if pool.triggers:
      _, clean = checkpoint.load_experts(
        pool.base, pool.clean, name_map=convert.clip_vision, like=like
      )
  heads = clip.stack_heads([task.head for task in pool.tasks])

  def features_fn(params, pixels):
    return jnp.asarray(tower.apply({'params': params}, pixels))

  paths = {p.stem: p for p in (pool.base, *pool.experts.values())}
  return Setup(
    pool=pool,
    base=jax.device_put(base),
    experts=jax.device_put(experts),
    clean=clean and jax.device_put(clean),
    logits_fn=clip.zero_shot(features_fn, heads),
    task_logits_fn=clip.zero_shot_task(features_fn, heads),
    inputs_fn=inputs.dense_inputs(tower),
    levels=inputs.levels(tower_config),
    hashes=checkpoint.file_hashes(paths),
  )
