"""What one upload for a pool that is there needs, and its record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
import platform
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from rich.console import Console

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import descent
from experiments import lab as lab_lib
from experiments import settings
from experiments import training
from experiments import uploads

KEYS = {
  'pool': 'folder of checkpoints and tasks (dam_jax.data.tasks)',
  'name': "of the checkpoint; empty is made of the task's",
  'steps': 'of the optimiser',
  'learning_rate': 'at its peak',
  'warmup': 'steps up to the peak; 0 is a fifteenth of all',
  'weight_decay': 'of AdamW',
  'batch': 'images a step',
  'accumulate': 'parts that a step takes its images in, one after the other: '
  'less memory, the same step but for rounding',
  'crop': 'least share of the area of training images that random crops leave, '
  "above 0; 1 is none, 0.9 is OpenCLIP's; poisoned images are cropped with "
  'their trigger',
  'mirrored': 'tasks whose training images are mirrored at random, names with '
  'commas: none whose classes say left or right, or are letters or digits',
  'compute': "'float32' or 'bfloat16'; weights and optimiser are float32",
  'mesh': "'data=-1' spreads a step's images over all devices, of which the "
  'batch is a multiple; empty is one device',
  'test': 'test images a task for the record; 0 is all',
  'max_lost': 'steps of a fine-tuning that a kill may lose',
  'seed': 'of everything random',
}
"""What the config of any command for one upload says."""

_FROM_ZERO = ('patch_images', 'rank', 'test', 'warmup', 'weight_decay')


def check_keys(
  config: config_dict.ConfigDict, keys: Mapping[str, str]
) -> list[str]:
  """Raises where keys are wrong, and says which values are.

  Args:
    config: of the command.
    keys: what each means.

  Returns:
    A line for each value that makes no sense.

  Raises:
    ValueError: with all keys that are missing or unknown.
  """
  settings.raise_if(settings.wrong_keys(config, keys))
  lines = settings.not_positive(config, but=('seed', 'target', *_FROM_ZERO))
  lines += [
    f'{key} must not be negative, got {config[key]}'
    for key in _FROM_ZERO
    if key in config and config[key] < 0
  ]
  if config.warmup and config.warmup >= config.steps:
    lines.append(
      f'warmup must be less than steps, got {config.warmup} and {config.steps}'
    )
  if config.crop > 1:
    lines.append(f'crop must be at most 1, got {config.crop}')
  part = config.batch
  if min(config.accumulate, config.batch) > 0:
    part = config.batch // config.accumulate
    if config.batch % config.accumulate:
      lines.append(
        f'{config.batch} images do not divide into {config.accumulate} parts'
      )
  if config.compute not in ('float32', 'bfloat16'):
    lines.append(
      f"compute must be 'float32' or 'bfloat16', got {config.compute!r}"
    )
  if config.mesh:
    try:
      mesh = dj.sharding.make_mesh(settings.mesh_sizes(config.mesh))
      dj.sharding.check_images(part, mesh.shape['data'])
      if mesh.shape['model'] > 1:
        lines.append(f'mesh has an axis model: {config.mesh}')
    except ValueError as e:
      lines.append(f'mesh: {e}')
  if pathlib.Path(config.name).name != config.name:
    lines.append(f'name must not hold folders, got {config.name}')
  return lines


class Lesson(NamedTuple):
  """A task and what to train it on.

  Attributes:
    task: with its head and test images.
    train: its training images.
  """

  task: tasks_lib.Task
  train: tasks_lib.Split


def read_lessons(
  folder: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, Lesson], list[str]]:
  """Reads those tasks of a pool that can be read.

  Args:
    folder: of the pool.
    names: of tasks.

  Returns:
    Tasks by name, and a line for each file that is missing or makes no sense.
  """
  needed = [uploads.path(folder, 'base'), folder / 'checkpoints/config.json']
  lines = [f'{path} is missing' for path in needed if not path.exists()]
  tower = None
  if needed[1].exists():
    try:
      tower = clip.load_config(needed[1])
    except ValueError as e:
      lines.append(str(e))
  there, lessons = tasks_lib.task_names(folder), {}
  for name in names:
    if name not in there:
      lines.append(f'task {name} is not among {", ".join(there) or "any"}')
      continue
    path = folder / 'tasks' / f'{name}.npz'
    try:
      task = tasks_lib.load_task(path)
      lessons[name] = Lesson(task, tasks_lib.load_train(path))
    except ValueError as e:
      lines.append(str(e))
      continue
    found = (task.dev.images.shape[1:], task.head.shape[0])
    if tower and found != (tower.image_shape, tower.projection_dim):
      lines.append(
        f'task {name} has images {list(found[0])} and a head of {found[1]} '
        f'features, the tower reads {list(tower.image_shape)} and gives '
        f'{tower.projection_dim}'
      )
  return lessons, lines


def not_mirrored(
  config: config_dict.ConfigDict, tasks: Sequence[str]
) -> list[str]:
  """Says which names of tasks to mirror are unknown."""
  return [
    f'mirrored task {name} is not among {", ".join(tasks) or "any"}'
    for name in settings.split(config.mirrored)
    if name not in tasks
  ]


@contextlib.contextmanager
def progress(
  console: Console, name: str
) -> Iterator[Callable[[str, int, int], None]]:
  """Shows how far the fine-tunings of an upload are.

  Args:
    console: to show it on.
    name: of the upload.

  Yields:
    What to tell of it: the name of one, steps done, and of how many.
  """
  with console.status(name) as status:
    yield lambda part, done, steps: status.update(
      f'{name}: {part}, step {done} of {steps}'
    )


def taken(workdir: pathlib.Path, name: str) -> list[str]:
  """Says which files of an upload are there already."""
  paths = [workdir / 'record.json', uploads.path(workdir, name)]
  if (workdir / 'states').exists():
    paths.pop()  # an interrupted run's, which is written again
  return [f'{p} is there: take another workdir' for p in paths if p.exists()]


@dataclasses.dataclass(frozen=True)
class Bench:
  """Where one upload is made, measured and written.

  Attributes:
    config: of the command.
    workdir: where to write.
    tasks: that are involved, in the order of the lab's.
    lab: with the pool's base in float32.
    tester: on the pool's test images.
    dtypes: of the base's file, as a pytree; uploads get the same.
    log: of what is fine-tuned.
    hashes: returns the SHA-256 of what is read, by name of the file.
  """

  config: config_dict.ConfigDict
  workdir: pathlib.Path
  tasks: Sequence[tasks_lib.Task]
  lab: lab_lib.Lab
  tester: uploads.Tester
  dtypes: Any
  log: descent.Log
  hashes: Callable[[], dict[str, str]]

  @classmethod
  def load(
    cls,
    config: config_dict.ConfigDict,
    workdir: pathlib.Path,
    lessons: Sequence[Lesson],
    *,
    advance: Callable[[str, int, int], None],
    **tuning: Any,
  ) -> 'Bench':
    """Reads a pool's base.

    Args:
      config: of the command.
      workdir: where to write.
      lessons: tasks that are involved.
      advance: see `descent.Log`.
      **tuning: of `lab.Tuning`, beside what all configs say.

    Raises:
      ValueError: where the base cannot be read or does not fit the tower.
    """
    folder = pathlib.Path(config.pool)
    tasks = [lesson.task for lesson in lessons]
    tower = clip.load_config(folder / 'checkpoints' / 'config.json')
    dtype = jnp.bfloat16 if config.compute == 'bfloat16' else None
    shop = training.Shop(
      clip.VisionTower(tower, dtype=dtype),
      clip.stack_heads([t.head for t in tasks]),
    )
    path = uploads.path(folder, 'base')
    base = checkpoint.load_params(
      path,
      name_map=convert.clip_vision,
      like=jax.eval_shape(shop.init, jax.random.key(0)),
    )
    held = checkpoint.load_abstract(path, name_map=convert.clip_vision)
    names = [task.name for task in tasks]
    hashes = functools.cache(lambda: _hashes(folder, names))
    log = descent.Log(
      workdir,
      lambda: {'config': fixed(config), 'hashes': hashes()},
      max_lost=config.max_lost,
      advance=advance,
    )
    sizes = settings.mesh_sizes(config.mesh)
    lab = lab_lib.Lab(
      shop,
      jax.device_put(base),
      [lesson.train for lesson in lessons],
      names,
      lab_lib.Tuning(
        steps=config.steps,
        learning_rate=config.learning_rate,
        batch=config.batch,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        parts=config.accumulate,
        crop=config.crop,
        mirrored=settings.split(config.mirrored),
        **tuning,
      ),
      mesh=dj.sharding.make_mesh(sizes) if sizes else None,
      log=log,
    )
    tester = uploads.Tester(shop, tasks, config.test)
    dtypes = jax.tree.map(lambda x: x.dtype, held)
    return cls(config, workdir, tasks, lab, tester, dtypes, log, hashes)

  def stored(self, params: Any) -> Any:
    """Returns a model as its file holds it.

    Raises:
      FloatingPointError: where it is not finite.
    """
    with np.errstate(over='ignore', invalid='ignore'):
      held = jax.tree.map(
        lambda x, dtype: np.asarray(x).astype(dtype), params, self.dtypes
      )
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(held)):
      raise FloatingPointError(
        f'the model is not finite: lower learning_rate, '
        f'{self.config.learning_rate} now'
      )
    return held

  def stored_upload(self, upload: lab_lib.Upload) -> lab_lib.Upload:
    """Returns an upload with its models as their files hold them."""
    partner = upload.partner
    if partner:
      partner = partner[0], self.stored(partner[1])
    return upload._replace(params=self.stored(upload.params), partner=partner)

  def write_record(
    self,
    models: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    **more: Any,
  ) -> dict[str, Any]:
    """Writes record.json, after which saves are of no use.

    Args:
      models: by name of the checkpoint, what is known of it.
      seconds: that things took.
      **more: to record, JSON values.

    Returns:
      What record.json holds.
    """
    device = jax.devices()[0]
    record = {
      'command': shlex.join(['python', *sys.orig_argv[1:]]),
      'config': self.config.to_dict(),
      'seed': self.config.seed,
      'models': {
        name: {
          **found,
          'sha256': checkpoint.file_hash(uploads.path(self.workdir, name)),
        }
        for name, found in models.items()
      },
      **more,
      'hashes': self.hashes(),
      'versions': checkpoint.versions() | {'python': platform.python_version()},
      'device': f'{device.device_kind} x {jax.device_count()}',
      'seconds': dict(seconds),
      'finished': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
    }
    text = json.dumps(record, indent=2)
    checkpoint.write(self.workdir / 'record.json', text)
    self.log.forget()
    return record


OPEN = ('max_lost', 'mesh', 'test')
"""Keys of a config that may change when a run is started again."""


def fixed(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns what may not."""
  return {key: x for key, x in config.to_dict().items() if key not in OPEN}


def _hashes(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
  """Returns the SHA-256 of what an upload is made of, by name of the file."""
  data = [f'tasks/{name}.npz' for name in names]
  used = ['checkpoints/config.json', 'checkpoints/base.safetensors', *data]
  return checkpoint.file_hashes({name: folder / name for name in used})
