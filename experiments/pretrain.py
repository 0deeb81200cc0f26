"""Pretrains a small base on several tasks at once, their heads frozen.

  python -m experiments.pretrain --config=configs/pretrain.py \
    --config.tasks_folder=PATH --workdir=PATH

The folder holds `<task>.npz` with training images and heads, of which a part is
for the base; `experiments.prepare` makes such files of data sets, with heads of
a CLIP's text tower. The workdir gets `checkpoints/config.json`,
`checkpoints/base.safetensors`, the tasks, and `base.json`, its accuracy.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any
import zlib

import jax
from ml_collections import config_dict
import numpy as np
from rich.console import Console

from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from experiments import command
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
  'test': 'test images a task to report on; 0 is all',
  'seed': 'of everything random',
}
"""What a config says."""


def wrong_values(config: config_dict.ConfigDict) -> list[str]:
  """Says what is wrong with the values of a config that has all `KEYS`."""
  lines = settings.not_positive(config, but=('test', 'seed'))
  if not config.pretrain_share < 1:
    lines.append(
      f'pretrain_share must be less than 1, got {config.pretrain_share}'
    )
  if config.width % config.heads:
    lines.append(f'width {config.width} over {config.heads} heads')
  return lines


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


class Start:
  """A folder with tasks, a tower and its base, perhaps still to be made."""

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


def write_config(start: Start, *, may_change: Collection[str]) -> None:
  """Writes what a folder is made of, and its tasks.

  Args:
    start: the folder.
    may_change: keys of the config that no model depends on.

  Raises:
    ValueError: where it was made of something else.
  """

  def fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in config.items() if key not in may_change}

  made = start.folder / 'made.json'
  asked = json.loads(start.config.to_json())
  if made.exists() and fixed(json.loads(made.read_text())) != fixed(asked):
    raise ValueError(f'{made} differs from the config: take another workdir')
  tower = dataclasses.asdict(start.tower)
  for path, content in (
    (start.folder / 'checkpoints' / 'config.json', tower),
    (made, asked),
  ):
    checkpoint.write(path, json.dumps(content, indent=2))
  for task in start.data.tasks:
    tasks_lib.save_task(start.folder / 'tasks', task)


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Makes a base.

  Args:
    config: see `KEYS`.
    workdir: that becomes a pool without experts.
    console: to say on what it is worth.

  Returns:
    What base.json holds: its accuracy by task.

  Raises:
    ValueError: where the config or a file makes no sense.
  """
  lines = settings.wrong_keys(config, KEYS)
  settings.raise_if(lines or wrong_values(config))
  start = Start(config, workdir)
  write_config(start, may_change=('test',))
  with console.status('training the base'):
    base = start.base()
  tester = uploads.Tester(start.shop, start.data.tasks, config.test)
  report = {
    name: tester.acc(base, i)._asdict() for i, name in enumerate(start.names)
  }
  checkpoint.write(workdir / 'base.json', json.dumps(report, indent=2))
  for name, acc in report.items():
    console.print(f'{name}: ACC {100 * acc["value"]:.1f}')
  return report


if __name__ == '__main__':
  command.start(run, 'configs/pretrain.py')
