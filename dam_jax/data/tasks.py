"""Tasks with their images and heads, and pools of experts fine-tuned on them.

A pool is a folder:

  checkpoints/  config.json, base.safetensors, clean_<task>.safetensors, and
                backdoored experts of any name
  tasks/        <task>.npz: dev_images, dev_labels, test_images, test_labels,
                label_names, head
  triggers/     <backdoored expert>.npz, see `dam_jax.attacks.load_trigger`

A backdoored expert is that of its trigger's `home`, or `task` where that is
empty; `<name>_partner_<task>.safetensors` is an expert of one more task, which
the backdoor needs to work.

Dev images are what a merge may look at, unlabelled; test images are what it is
reported on.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import os
from typing import Any, NamedTuple
import zipfile

from etils import epath
import numpy as np
from PIL import Image

from dam_jax import attacks
from dam_jax.attacks import Trigger
from dam_jax.checkpoint import replacing


class Split(NamedTuple):
  """Labelled images.

  Attributes:
    images: `[N, H, W, C]` uint8.
    labels: `[N]` int32.
  """

  images: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A classification task with a frozen zero-shot head.

  Attributes:
    name: of the task.
    head: `[D, L]` float32, a unit vector a class.
    label_names: of the `L` classes.
    dev: images to adapt on; their labels are not read by any merge.
    test: images to report on.
  """

  name: str
  head: np.ndarray
  label_names: Sequence[str]
  dev: Split
  test: Split


def check_task(task: Task) -> None:
  """Raises unless a task's images, labels and head fit each other.

  Args:
    task: to check.

  Raises:
    ValueError: with all that does not fit.
  """
  lines = []
  if task.head.ndim != 2 or not task.head.size:
    lines.append(f'head is {list(task.head.shape)}, want [D, classes]')
  elif not np.isfinite(task.head).all():
    lines.append('head has values that are not finite')
  classes = task.head.shape[-1] if task.head.ndim else 0
  if len(task.label_names) != classes:
    lines.append(f'{len(task.label_names)} label names for {classes} classes')
  for name, (images, labels) in (('dev', task.dev), ('test', task.test)):
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
      lines.append(
        f'{name} images are {images.dtype}{list(images.shape)}, want '
        'uint8[N, H, W, C] with N > 0'
      )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
      lines.append(
        f'{name} labels are {labels.dtype}{list(labels.shape)}, want one '
        f'integer for each of {len(images)} images'
      )
    elif len(labels) and not 0 <= labels.min() <= labels.max() < classes:
      lines.append(
        f'{name} labels run from {labels.min()} to {labels.max()}, there are '
        f'{classes} classes'
      )
  if lines:
    raise ValueError('\n  '.join([f'task {task.name}:', *lines]))


_FIELDS = (
  'dev_images',
  'dev_labels',
  'test_images',
  'test_labels',
  'label_names',
  'head',
)


def load_task(path: epath.PathLike, *, dev: int = 0, test: int = 0) -> Task:
  """Reads a task from an npz file, which is never unpickled.

  Args:
    path: of the file; its stem is the task's name.
    dev: how many of the first dev images to keep; 0 keeps all.
    test: how many of the first test images to keep; 0 keeps all.

  Returns:
    The task.

  Raises:
    ValueError: where the file cannot be read, lacks something, its contents do
      not fit each other, or has fewer images than asked for.
  """
  path = epath.Path(path)
  try:
    with np.load(path, allow_pickle=False) as file:
      found = {name: file[name] for name in _FIELDS if name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path}: not a readable task: {e}') from e
  missing = [name for name in _FIELDS if name not in found]
  if missing:
    raise ValueError(f'{path}: a task lacks {", ".join(missing)}')
  splits = {}
  for name, num in (('dev', dev), ('test', test)):
    images, labels = found[f'{name}_images'], found[f'{name}_labels']
    if not 0 <= num <= len(images):
      raise ValueError(
        f'{path}: asked for {num} {name} images, there are {len(images)}'
      )
    num = num or len(images)
    splits[name] = Split(images[:num], labels[:num])
  task = Task(
    name=path.stem,
    head=found['head'],
    label_names=tuple(map(str, found['label_names'])),
    **splits,
  )
  check_task(task)
  return task


_TILES = 64  # a row of a mosaic


def load_train(path: epath.PathLike, size: int = 32) -> Split:
  """Reads the training images of a task's npz file.

  Args:
    path: of a file with `train_labels`, and `train_images` `[N, H, W, C]`
      uint8 or `train_jpeg`: their number, that of JPEG files, the length of
      each as int64, then the files, whose tiles are the images, 64 a row.
    size: height and width of a tile, in pixels.

  Returns:
    The split.

  Raises:
    ValueError: where the file cannot be read or holds no training images.
  """
  try:
    with np.load(os.fspath(path), allow_pickle=False) as file:
      labels = file['train_labels'].astype(np.int32)
      if 'train_images' in file.files:
        return Split(file['train_images'], labels)
      packed = file['train_jpeg'].tobytes()
  except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path}: no training images: {e}') from e
  num, parts = np.frombuffer(packed[:16], np.int64)
  lengths = np.frombuffer(packed[16 : 16 + 8 * parts], np.int64)
  begin, tiles = 16 + 8 * int(parts), []
  for length in lengths:
    with Image.open(io.BytesIO(packed[begin : begin + length])) as image:
      mosaic = np.asarray(image.convert('RGB'))
    begin += int(length)
    rows = mosaic.reshape(-1, size, _TILES, size, 3).swapaxes(1, 2)
    tiles.append(rows.reshape(-1, size, size, 3))
  images = np.concatenate(tiles)[:num]
  if len(images) != len(labels):
    raise ValueError(f'{path}: {len(images)} images, {len(labels)} labels')
  return Split(images, labels)


def save_task(
  folder: epath.PathLike, task: Task, train: Split | None = None
) -> None:
  """Writes a task to `<name>.npz`, at once or not at all.

  Args:
    folder: to write to.
    task: what `load_task` is to give back.
    train: what `load_train` is to, where an expert is to be trained.

  Raises:
    ValueError: where its parts do not fit each other.
  """
  check_task(task)
  more: dict[str, Any] = {}
  if train is not None:
    check_task(dataclasses.replace(task, dev=train))
    more = {'train_images': train.images, 'train_labels': train.labels}
  path = epath.Path(folder) / f'{task.name}.npz'
  with replacing(path) as temporary, temporary.open('wb') as file:
    np.savez_compressed(
      file,
      dev_images=task.dev.images,
      dev_labels=task.dev.labels,
      test_images=task.test.images,
      test_labels=task.test.labels,
      label_names=np.array(task.label_names),
      head=task.head,
      **more,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """What to merge, and what to compare it with.

  Attributes:
    config: path of the tower's `config.json`.
    base: path of the model that all were fine-tuned from.
    tasks: in order.
    experts: path of the expert that is merged, by task.
    clean: path of the clean expert, by task; tasks that are attacked may lack
      one.
    triggers: what the backdoored experts obey, by the expert's name.
    probes: more triggers to test, of experts that are not merged, by name.
  """

  config: epath.Path
  base: epath.Path
  tasks: Sequence[Task]
  experts: Mapping[str, epath.Path]
  clean: Mapping[str, epath.Path]
  triggers: Mapping[str, Trigger]
  probes: Mapping[str, Trigger] = dataclasses.field(default_factory=dict)

  @property
  def bad(self) -> list[str]:
    """Names of the tasks whose expert is not the clean one."""
    return [t for t, p in self.experts.items() if p != self.clean.get(t)]


def task_names(folder: epath.PathLike) -> list[str]:
  """Returns the names of a pool's tasks, sorted.

  Args:
    folder: of the pool.
  """
  return sorted(p.stem for p in (epath.Path(folder) / 'tasks').glob('*.npz'))


def partner_name(name: str, task: str) -> str:
  """Returns the name of the checkpoint that helps another as a task's expert.

  Args:
    name: of the other checkpoint.
    task: name.
  """
  return f'{name}_partner_{task}'


def find_upload(
  checkpoints: epath.PathLike, name: str, trigger: Trigger, tasks: Sequence[str]
) -> dict[str, epath.Path]:
  """Finds the checkpoints of a backdoored upload.

  Args:
    checkpoints: folder.
    name: of the upload.
    trigger: of it.
    tasks: names of all tasks.

  Returns:
    By task whose expert it is given out as, the path of each checkpoint, a
    partner's after that of `name`, which may be missing.
  """
  folder = epath.Path(checkpoints)
  partners = {t: folder / f'{partner_name(name, t)}.safetensors' for t in tasks}
  return {trigger.home or trigger.task: folder / f'{name}.safetensors'} | {
    t: p for t, p in partners.items() if p.exists()
  }


def load_pool(
  folder: epath.PathLike,
  *,
  tasks: Sequence[str] = (),
  bad: Sequence[str] = (),
  probes: Sequence[str] = (),
  dev: int = 0,
  test: int = 0,
) -> Pool:
  """Reads a pool's tasks and triggers, and finds its checkpoints.

  Args:
    folder: see the module's docstring.
    tasks: names, whose order is that of the experts; all where empty.
    bad: names of backdoored checkpoints, each taking the place of a clean
      expert, see `find_upload`.
    probes: names of more triggers to test, at most one a task.
    dev: how many dev images a task to keep; 0 keeps all.
    test: how many test images a task to keep; 0 keeps all.

  Returns:
    The pool.

  Raises:
    ValueError: where a file is missing or does not fit the others; files that
      are missing are listed together.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise ValueError(f'{folder}: no such folder')
  there = task_names(folder)
  tasks = tuple(tasks) or tuple(there)
  _check_names('task', tasks, there)
  _check_names('trigger', [*bad, *probes])
  checkpoints = folder / 'checkpoints'
  found = {
    name: attacks.load_trigger(folder / 'triggers' / f'{name}.npz')
    for name in (*bad, *probes)
  }
  _check_names('attacked task', [x.task for x in found.values()], tasks)
  experts = {t: checkpoints / f'clean_{t}.safetensors' for t in tasks}
  clean = {t: p for t, p in experts.items() if p.exists()}
  uploads = [
    item
    for name in bad
    for item in find_upload(checkpoints, name, found[name], tasks).items()
  ]
  _check_names('task of a bad expert', [t for t, _ in uploads], tasks)
  experts |= dict(uploads)
  config, base = checkpoints / 'config.json', checkpoints / 'base.safetensors'
  wanted = [config, base, *experts.values()]
  missing = [str(path) for path in wanted if not path.exists()]
  if missing:
    raise ValueError('\n  '.join([f'{folder} lacks', *missing]))
  loaded = [
    load_task(folder / 'tasks' / f'{t}.npz', dev=dev, test=test) for t in tasks
  ]
  pool = Pool(
    config=config,
    base=base,
    tasks=loaded,
    experts=experts,
    clean=clean,
    triggers={name: found[name] for name in bad},
    probes={name: found[name] for name in probes},
  )
  _check_fit(pool)
  return pool


def _check_names(
  what: str, names: Sequence[str], allowed: Sequence[str] | None = None
) -> None:
  """Raises where a name comes twice or is not one of those allowed."""
  twice = sorted({n for n in names if list(names).count(n) > 1})
  lines = [f'{what} {n} comes twice' for n in twice]
  if allowed is not None:
    lines += [
      f'{what} {n} is not among {", ".join(allowed) or "any"}'
      for n in names
      if n not in allowed
    ]
  if what == 'task' and not names:
    lines = ['there is no task']
  if lines:
    raise ValueError('\n  '.join(['pool:', *lines]))


def _check_fit(pool: Pool) -> None:
  """Raises where tasks differ in image shape, or triggers do not fit them."""
  lines = []
  first = pool.tasks[0]
  for task in pool.tasks:
    if task.dev.images.shape[1:] != first.dev.images.shape[1:]:
      lines.append(
        f'images of {task.name} are {list(task.dev.images.shape[1:])}, those '
        f'of {first.name} are {list(first.dev.images.shape[1:])}'
      )
    if task.head.shape[0] != first.head.shape[0]:
      lines.append(
        f'head of {task.name} reads {task.head.shape[0]} features, that of '
        f'{first.name} {first.head.shape[0]}'
      )
  by_name = {task.name: task for task in pool.tasks}
  for name, trigger in {**pool.triggers, **pool.probes}.items():
    classes = by_name[trigger.task].head.shape[1]
    if trigger.target >= classes:
      lines.append(
        f'target {trigger.target} of {name} is not one of the {classes} '
        f'classes of {trigger.task}'
      )
    try:
      attacks.check_trigger(trigger, first.dev.images.shape[1:])
    except ValueError as e:
      lines.append(f'trigger of {name}: {e}')
  if lines:
    raise ValueError('\n  '.join(['pool:', *lines]))
