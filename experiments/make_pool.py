"""Makes a pool: a base, clean experts, and uploads of many attacks and seeds.

  python -m experiments.make_pool --config=configs/nano_pool.py --workdir=PATH

The workdir becomes a folder that `dam_jax.data.tasks.load_pool` reads. A model
that is there is not made again, so an interrupted run goes on, and one with
more attacks, tasks to attack or seeds adds to it. `eval.json` says of each
upload what it is worth alone and in a plain merge with clean experts, beside
what its trigger does to clean models. ACC is on the task whose expert it is
given out as (`home`), ASR on the task that it attacks (`task`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any
import zlib

import jax
from ml_collections import config_dict
import numpy as np
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from experiments import attackers
from experiments import command
from experiments import lab as lab_lib
from experiments import settings
from experiments import training
from experiments import uploads

KEYS = {
  'tasks_folder': 'of <task>.npz with training images',
  'tasks': 'names with commas',
  'width': 'of the tower; its MLPs are four times as wide',
  'layers': 'blocks of the tower',
  'heads': 'of its attention',
  'patch_size': "of the tower's patches, in pixels",
  'pretrain_share': 'of the training images, which only the base sees',
  'pretrain_steps': 'of the base, on all tasks at once',
  'pretrain_batch': 'images a task and step of the base',
  'pretrain_rate': 'peak learning rate of the base',
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
  'seed': 'of everything random',
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
    lines += settings.not_positive(config, but=('test', 'seed'))
    if not config.pretrain_share < 1:
      lines.append(
        f'pretrain_share must be less than 1, got {config.pretrain_share}'
      )
    if config.width % config.heads:
      lines.append(f'width {config.width} over {config.heads} heads')
  settings.raise_if(lines)


def _attacks(config: config_dict.ConfigDict) -> list[str]:
  if config.attacks == 'all':
    return list(attackers.ATTACKS)
  return settings.split(config.attacks)


@dataclasses.dataclass(frozen=True)
class _Data:
  """Tasks, and their training images in two parts."""

  tasks: Sequence[tasks_lib.Task]
  pretrain: Sequence[tasks_lib.Split]
  fine_tune: Sequence[tasks_lib.Split]


def _load(config: config_dict.ConfigDict) -> _Data:
  tasks, pretrain, fine_tune = [], [], []
  for name in settings.split(config.tasks):
    path = pathlib.Path(config.tasks_folder) / f'{name}.npz'
    tasks.append(tasks_lib.load_task(path))
    images, labels = tasks_lib.load_train(path)
    rng = np.random.default_rng((config.seed, zlib.crc32(name.encode())))
    order = rng.permutation(len(labels))
    num = round(config.pretrain_share * len(labels))
    for part, at in ((pretrain, order[:num]), (fine_tune, order[num:])):
      part.append(tasks_lib.Split(images[at], labels[at]))
  return _Data(tasks, pretrain, fine_tune)


class Pool:
  """A pool that is being made."""

  def __init__(self, config, folder):
    self.config, self.folder, self.data = config, folder, _load(config)
    first = self.data.tasks[0]
    self.tower = clip.VisionConfig(
      hidden_size=config.width,
      intermediate_size=4 * config.width,
      num_hidden_layers=config.layers,
      num_attention_heads=config.heads,
      image_size=first.dev.images.shape[1],
      patch_size=config.patch_size,
      projection_dim=first.head.shape[0],
    )
    heads = clip.stack_heads([t.head for t in self.data.tasks])
    tower = clip.VisionTower(self.tower)
    self.shop = training.Shop(tower, heads)
    self.names = [t.name for t in self.data.tasks]

  def key(self, name: str) -> jax.Array:
    """Returns the key of everything random about a model."""
    return uploads.model_key(self.config.seed, name)

  def path(self, name: str) -> pathlib.Path:
    """Returns where a checkpoint is."""
    return uploads.path(self.folder, name)

  def save(self, name: str, params: Any) -> None:
    """Writes a checkpoint."""
    uploads.save_model(self.folder, name, params)

  def load(self, name: str) -> Any:
    """Reads a checkpoint."""
    return uploads.load_model(self.path(name))

  def base(self) -> Any:
    """Returns the base, trained unless it is there."""
    if not self.path('base').exists():
      params = training.pretrain(
        self.shop,
        self.key('base'),
        self.data.pretrain,
        batch=self.config.pretrain_batch,
        steps=self.config.pretrain_steps,
        learning_rate=self.config.pretrain_rate,
      )
      self.save('base', params)
    return self.load('base')

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
  _write_config(pool)
  for task in pool.data.tasks:
    tasks_lib.save_task(workdir / 'tasks', task)
  with console.status('training the base'):
    base = pool.base()
  tuning = lab_lib.Tuning(
    steps=config.fine_tune_steps,
    learning_rate=config.fine_tune_rate,
    batch=config.batch,
    patch=config.patch,
    patch_steps=config.patch_steps,
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


def _write_config(pool: Pool) -> None:
  """Writes what a pool is made of, or raises where it was another."""
  made = pool.folder / 'made.json'
  asked = json.loads(pool.config.to_json())
  if made.exists() and _fixed(json.loads(made.read_text())) != _fixed(asked):
    raise ValueError(f'{made} differs from the config: take another workdir')
  tower = dataclasses.asdict(pool.tower)
  for path, content in (
    (pool.folder / 'checkpoints' / 'config.json', tower),
    (made, asked),
  ):
    checkpoint.write(path, json.dumps(content, indent=2))


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
  return {key: x for key, x in config.items() if key not in OPEN}


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
