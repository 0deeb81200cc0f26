"""Says what models of a pool's shape are worth: accuracy, attack success.

  python -m experiments.evaluate --config=configs/evaluate.py \
    --config.pool=PATH --config.models=merged,other.safetensors --workdir=PATH

A model is a safetensors file, a Hugging Face folder (of an image tower or a
whole CLIP, whose image tower it is then) or an Orbax checkpoint. Nothing is
unpickled. ACC is on the test images of each task, ASR on those of each
trigger's own task whose label is not its target; intervals are Wilson's, of 95
%. Writes `evaluate.json`, with hashes, and `evaluate.md`.
"""

from collections.abc import Mapping
import json
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import command
from experiments import settings
from experiments import training
from experiments import uploads

KEYS = {
  'pool': 'folder of checkpoints, tasks and triggers (dam_jax.data.tasks)',
  'models': 'paths with commas',
  'tasks': "names with commas; empty is all of the pool's",
  'triggers': "names with commas; 'all' of the pool's on these tasks; 'none'",
  'test': 'test images a task; 0 is all',
  'compute': "'float32' or 'bfloat16'",
}
"""What a config says."""


def _load_tasks(
  config: config_dict.ConfigDict, pool: pathlib.Path
) -> tuple[list[tasks_lib.Task], list[str]]:
  """Reads tasks, and says what is wrong with them."""
  there = tasks_lib.task_names(pool)
  names, lines, tasks = settings.split(config.tasks) or there, [], []
  if not names:
    lines.append(f'{pool} has no tasks')
  for name in names:
    if name not in there:
      lines.append(f'task {name} is not among {", ".join(there) or "any"}')
      continue
    path = pool / 'tasks' / f'{name}.npz'
    try:
      tasks.append(tasks_lib.load_task(path, test=config.test))
    except ValueError as e:
      lines.append(str(e))
  return tasks, lines


def _load_triggers(
  config: config_dict.ConfigDict,
  pool: pathlib.Path,
  tasks: list[tasks_lib.Task],
) -> tuple[dict[str, attacks.Trigger], list[str]]:
  """Reads triggers by name, and says which do not fit."""
  names, found, lines = settings.split(config.triggers), {}, []
  every = names == ['all']
  if every:
    names = sorted(path.stem for path in (pool / 'triggers').glob('*.npz'))
  if names == ['none']:
    names = []
  by_name = {task.name: task for task in tasks}
  for name in names:
    try:
      trigger = attacks.load_trigger(pool / 'triggers' / f'{name}.npz')
    except ValueError as e:
      lines.append(str(e))
      continue
    if trigger.task not in by_name:
      if not every:
        lines.append(f'trigger {name} is of {trigger.task}, which is no task')
      continue
    task = by_name[trigger.task]
    try:
      attacks.check_trigger(trigger, task.test.images.shape[1:])
    except ValueError as e:
      lines.append(f'trigger {name}: {e}')
    if trigger.target >= len(task.label_names):
      lines.append(
        f'target {trigger.target} of {name} is not one of the '
        f'{len(task.label_names)} classes of {task.name}'
      )
    found[name] = trigger
  return found, lines


def _name_map(path: pathlib.Path) -> tuple[checkpoint.NameMap, bool]:
  """Returns the names of a model, and whether it is a whole CLIP.

  Raises:
    ValueError: where it cannot be read.
  """
  leaves = checkpoint.open_model(path).leaves
  tops = {leaf.split('/')[0] for leaf in leaves}
  whole = 'text_model' in tops or {'text', 'vision'} <= tops
  return (convert.clip if whole else convert.clip_vision), whole


def _load_model(path: pathlib.Path, like: Any) -> Any:
  """Reads an image tower.

  Raises:
    ValueError: where it cannot be read or does not fit, with all differences.
  """
  name_map, whole = _name_map(path)
  if not whole:
    return checkpoint.load_params(path, name_map=name_map, like=like)
  params: Any = checkpoint.load_params(path, name_map=name_map)
  if lines := dj.tree.differences(like, params['vision'], dtypes=False):
    raise ValueError('\n  '.join([f'{path} does not fit the model:', *lines]))
  return params['vision']


def check_config(config: config_dict.ConfigDict) -> list[str]:
  """Raises where keys are wrong, and says which values are."""
  settings.raise_if(settings.wrong_keys(config, KEYS))
  lines = [] if settings.split(config.models) else ['models is empty']
  if config.test < 0:
    lines.append(f'test must not be negative, got {config.test}')
  if config.compute not in ('float32', 'bfloat16'):
    lines.append(
      f"compute must be 'float32' or 'bfloat16', got {config.compute!r}"
    )
  return lines


def _check_fit(
  tower: clip.VisionConfig, tasks: list[tasks_lib.Task]
) -> list[str]:
  want = (tower.image_shape, tower.projection_dim)
  return [
    f'task {task.name} has images {list(found[0])} and a head of {found[1]} '
    f'features, the tower reads {list(want[0])} and gives {want[1]}'
    for task in tasks
    if (found := (task.test.images.shape[1:], task.head.shape[0])) != want
  ]


def _load_models(
  config: config_dict.ConfigDict, tower: clip.VisionConfig
) -> tuple[dict[str, Any], list[str]]:
  """Reads models by path, and says what is wrong with them."""
  like = jax.eval_shape(
    clip.VisionTower(tower).init,
    jax.random.key(0),
    jnp.zeros((1, *tower.image_shape)),
  )['params']
  models, lines = {}, []
  for path in settings.split(config.models):
    try:
      models[path] = _load_model(pathlib.Path(path), like)
    except (OSError, ValueError) as e:
      lines.append(str(e))
  return models, lines


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Measures models.

  Args:
    config: see `KEYS`.
    workdir: where to write.
    console: to show the table on.

  Returns:
    What evaluate.json holds: 'rows' of each model, metric, task and trigger,
    and the 'record'.

  Raises:
    ValueError: before anything is measured, with all that is wrong with the
      config, the pool and the models.
  """
  lines, pool = check_config(config), pathlib.Path(config.pool)
  tasks, more = _load_tasks(config, pool) if config.test >= 0 else ([], [])
  triggers, wrong = _load_triggers(config, pool, tasks)
  lines += [*more, *wrong]
  try:
    tower = clip.load_config(pool / 'checkpoints' / 'config.json')
  except (OSError, ValueError) as e:
    settings.raise_if([*lines, str(e)])
    raise
  models, unfit = _load_models(config, tower)
  settings.raise_if([*lines, *_check_fit(tower, tasks), *unfit])
  dtype = jnp.bfloat16 if config.compute == 'bfloat16' else None
  shop = training.Shop(
    clip.VisionTower(tower, dtype=dtype),
    clip.stack_heads([task.head for task in tasks]),
  )
  tester = uploads.Tester(shop, tasks, config.test)
  rows = []
  for path, params in models.items():
    with console.status(f'testing {path}'):
      rows += _measure(path, params, tester, tasks, triggers)
  report = {'rows': rows, 'record': _record(config, pool, tasks, triggers)}
  report = json.loads(json.dumps(report))
  checkpoint.write(workdir / 'evaluate.json', json.dumps(report, indent=2))
  checkpoint.write(workdir / 'evaluate.md', _markdown(rows))
  console.print(_table(rows))
  return report


def _measure(
  path: str,
  params: Any,
  tester: uploads.Tester,
  tasks: list[tasks_lib.Task],
  triggers: Mapping[str, attacks.Trigger],
) -> list[dict[str, Any]]:
  names = [task.name for task in tasks]
  acc = {name: tester.acc(params, i) for i, name in enumerate(names)}
  asr = {
    name: tester.asr(params, names.index(trigger.task), trigger)
    for name, trigger in triggers.items()
  }
  rows = [
    {'model': path, 'metric': 'acc', 'task': task, 'trigger': ''}
    | rate._asdict()
    for task, rate in {**acc, 'mean': evaluate.mean([*acc.values()])}.items()
  ]
  for name, rate in asr.items():
    about = {'task': triggers[name].task, 'trigger': name}
    rows.append({'model': path, 'metric': 'asr', **about} | rate._asdict())
  if asr:
    about = {'model': path, 'metric': 'asr', 'task': 'mean', 'trigger': ''}
    rows.append(about | evaluate.mean([*asr.values()])._asdict())
  return rows


def _record(config, pool, tasks, triggers) -> dict[str, Any]:
  files = ['checkpoints/config.json']
  files += [f'tasks/{task.name}.npz' for task in tasks]
  files += [f'triggers/{name}.npz' for name in triggers]
  device = jax.devices()[0]
  return {
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'config': config.to_dict(),
    'models': {
      path: checkpoint.combined_hash(
        checkpoint.model_hashes(checkpoint.open_model(path))
      )
      for path in settings.split(config.models)
    },
    'hashes': checkpoint.file_hashes({name: pool / name for name in files}),
    'versions': checkpoint.versions() | {'python': platform.python_version()},
    'device': f'{device.device_kind} x {jax.device_count()}',
    'finished': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
  }


_COLUMNS = ('model', 'metric', 'task', 'trigger', 'per cent', 'images')


def _cells(row: Mapping[str, Any]) -> list[str]:
  value, low, high = (100 * row[key] for key in ('value', 'low', 'high'))
  return [
    row['model'],
    row['metric'].upper(),
    row['task'],
    row['trigger'],
    f'{value:.1f} ({low:.1f} to {high:.1f})',
    str(row['n']),
  ]


def _markdown(rows: list[dict[str, Any]]) -> str:
  lines = [_COLUMNS, ['---'] * len(_COLUMNS), *map(_cells, rows)]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _table(rows: list[dict[str, Any]]) -> Table:
  table = Table(title='with 95 % intervals')
  for column in _COLUMNS:
    table.add_column(column)
  for row in rows:
    table.add_row(*_cells(row))
  return table


if __name__ == '__main__':
  command.start(run, 'configs/evaluate.py')
