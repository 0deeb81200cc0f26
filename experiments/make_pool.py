"""Makes a pool: a base, clean experts, and uploads of many attacks and seeds.

  python -m experiments.make_pool --config=configs/nano_pool.py --workdir=PATH

The workdir becomes a folder that `dam_jax.data.tasks.load_pool` reads. A model
that is there is not made again, so an interrupted run goes on, and one with
more attacks, tasks to attack or seeds adds to it. `eval.json` says of each
upload what it is worth alone and in a plain merge with clean experts, beside
what its trigger does to clean models. ACC is on the task whose expert it is
given out as (`home`), ASR on the task that it attacks (`task`).
"""

from collections.abc import Iterator, Mapping
import json
import pathlib
import time
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from experiments import attackers
from experiments import command
from experiments import lab as lab_lib
from experiments import pretrain
from experiments import settings
from experiments import uploads

KEYS = pretrain.KEYS | {
  'fine_tune_steps': 'of an expert',
  'fine_tune_rate': 'peak learning rate of an expert',
  'batch': 'images a step of an expert',
  'patch': "height and width of attackers' patches, in pixels",
  'patch_steps': 'of the optimiser of a patch',
  'attacks': "names with commas, or 'all'",
  'attacked': 'tasks to attack, names with commas',
  'seeds': 'uploads of each attack on each task',
  'test': 'test images a task for eval.json; 0 is all',
  'scale': 'of task arithmetic, the plain merge',
}
"""What a config says."""

OPEN = ('attacks', 'attacked', 'seeds', 'test', 'scale')
"""Keys that may change while a pool grows; no model depends on them."""


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises with all that is wrong with a config."""
  lines = settings.wrong_keys(config, KEYS)
  if not lines:
    tasks, attacked = (
      settings.split(config.tasks),
      settings.split(config.attacked),
    )
    lines += [
      f'attacked task {t} is not among {", ".join(tasks)}'
      for t in attacked
      if t not in tasks
    ]
    lines += [
      f'attack {a} is not among {", ".join(attackers.ATTACKS)}'
      for a in _attacks(config)
      if a not in attackers.ATTACKS
    ]
    if len(tasks) < 2:
      lines += [
        f'attack {a} needs two tasks'
        for a in _attacks(config)
        if a in attackers.TWO_TASKS
      ]
    lines += pretrain.wrong_values(config)
  settings.raise_if(lines)


def _attacks(config: config_dict.ConfigDict) -> list[str]:
  if config.attacks == 'all':
    return list(attackers.ATTACKS)
  return settings.split(config.attacks)


class Pool(pretrain.Start):
  """A pool that is being made."""

  def uploads(self) -> Iterator[tuple[str, str, int, int]]:
    """Yields name, attack, task and target of every bad upload."""
    for attack in _attacks(self.config):
      for task in settings.split(self.config.attacked):
        row = self.names.index(task)
        classes = len(self.data.tasks[row].label_names)
        for seed in range(self.config.seeds):
          name = f'{attack}_{task}_{seed}'
          target = int(jax.random.randint(self.key(name), (), 0, classes))
          yield name, attack, row, target


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Makes a pool.

  Args:
    config: see `KEYS`.
    workdir: that becomes the pool.
    console: to show progress and the table on.

  Returns:
    What eval.json holds.

  Raises:
    ValueError: where the config or a file makes no sense.
  """
  check_config(config)
  pool = Pool(config, workdir)
  pretrain.write_config(pool, may_change=OPEN)
  with console.status('training the base'):
    base = pool.base()
  tuning = lab_lib.Tuning(
    steps=config.fine_tune_steps,
    learning_rate=config.fine_tune_rate,
    batch=config.batch,
    patch=config.patch,
    patch_steps=config.patch_steps,
    low_rank_factor=attackers.LOW_RANK_FACTOR,
  )
  lab = lab_lib.Lab(pool.shop, base, pool.data.fine_tune, pool.names, tuning)
  for row, task in enumerate(pool.names):
    name = f'clean_{task}'
    if not pool.path(name).exists():
      with console.status(name):
        pool.save(name, lab.tune(pool.key(name), row))
  for name, attack, row, target in pool.uploads():
    if not pool.path(name).exists():
      begin = time.perf_counter()
      with console.status(name):
        make = attackers.ATTACKS[attack]
        uploads.save(workdir, name, make(lab, pool.key(name), row, target))
      console.print(f'{name}: {time.perf_counter() - begin:.0f} s')
  report = _evaluate(pool, base, console)
  checkpoint.write(workdir / 'eval.json', json.dumps(report, indent=2))
  console.print(_table(report))
  return report


def _evaluate(pool: Pool, base: Any, console: Console) -> dict[str, Any]:
  """Returns what each model is worth alone and in a plain merge."""
  tester = uploads.Tester(pool.shop, pool.data.tasks, pool.config.test)

  def acc(params, row):
    return tester.acc(params, row).value

  def asr(params, row, trigger):
    return tester.asr(params, row, trigger).value

  merge = jax.jit(
    lambda experts: (
      dj.merge(dj.task_arithmetic(pool.config.scale), base, experts).params
    )
  )
  clean = [pool.load(f'clean_{name}') for name in pool.names]
  plain = merge(dj.tree.stack(clean))
  report: dict[str, Any] = {
    'base': {n: acc(base, i) for i, n in enumerate(pool.names)},
    'clean': {n: acc(clean[i], i) for i, n in enumerate(pool.names)},
    'merge': {n: acc(plain, i) for i, n in enumerate(pool.names)},
    'uploads': {},
  }
  for name, attack, row, target in pool.uploads():
    with console.status(f'testing {name}'):
      trigger = attacks.load_trigger(pool.folder / 'triggers' / f'{name}.npz')
      paths = tasks_lib.find_upload(
        pool.folder / 'checkpoints', name, trigger, pool.names
      )
      models = {task: uploads.load_model(p) for task, p in paths.items()}
      swapped = dict(zip(pool.names, clean, strict=True)) | models
      merged = merge(dj.tree.stack(list(swapped.values())))
      (home, params), *partners = models.items()
      own = pool.names.index(home)
      report['uploads'][name] = {
        'attack': attack,
        'task': pool.names[row],
        'target': target,
        'home': home,
        'acc': acc(params, own),
        'asr': asr(params, row, trigger),
        'acc_merged': acc(merged, own),
        'asr_merged': asr(merged, row, trigger),
        'floor': asr(plain, row, trigger),
        'floor_alone': asr(clean[own], row, trigger),
        'partners': {
          task: {
            'acc': acc(partner, pool.names.index(task)),
            'asr': asr(partner, row, trigger),
            'acc_merged': acc(merged, pool.names.index(task)),
          }
          for task, partner in partners
        },
      }
  return report


def _table(report: Mapping[str, Any]) -> Table:
  table = Table(title='uploads, in per cent')
  columns = {
    'acc': 'ACC alone',
    'clean': 'clean expert',
    'asr': 'ASR alone',
    'floor_alone': 'clean expert',
    'acc_merged': 'ACC merged',
    'asr_merged': 'ASR merged',
    'floor': 'clean merge',
  }
  for name in ('upload', *columns.values()):
    table.add_column(name)
  for name, row in report['uploads'].items():
    row = row | {'clean': report['clean'][row['home']]}
    table.add_row(name, *(f'{100 * row[key]:.1f}' for key in columns))
  return table


if __name__ == '__main__':
  command.start(run, 'configs/nano_pool.py')
