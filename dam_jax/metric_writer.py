"""Per-step measurements on disk, written by process 0 only.

A CSV file, which opens in any spreadsheet, and beside it TensorBoard's event
file where `tensorboard` is installed; it needs no TensorFlow. What is on disk
is complete, since every call ends with a flush.
"""

from collections.abc import Mapping
import csv
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np


class MetricWriter:
  """Appends measurements of consecutive steps to a CSV file.

  The columns are those of the first call, behind `step`; booleans are written
  as 0 and 1. On other processes than the first, nothing is written.

  TensorBoard's file holds the same numbers, as float32, in a folder named as
  the CSV file without its suffix: `tensorboard --logdir=curves` shows each
  `curves/<name>.csv` as the run `<name>`.

  Examples:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), 'curve.csv')
    >>> with MetricWriter(path) as writer:
    ...   writer.write(0, {'clean/loss': np.array([0.5, 0.25])})
    >>> print(path.read_text().strip())
    step,clean/loss
    0,0.5
    1,0.25
  """

  def __init__(
    self, path: str | pathlib.Path, *, tensorboard: bool | None = None
  ):
    """Creates the files, and their folder where it is missing.

    Args:
      path: of the CSV file; one that exists is replaced, and so are event files
        of TensorBoard's in the folder beside it.
      tensorboard: whether to write an event file, too; None is where
        `tensorboard` is installed.

    Raises:
      ValueError: where one is asked for and `tensorboard` is not installed.
    """
    self._file = None
    self._events: Any = None
    self._columns = None
    there = importlib.util.find_spec('tensorboard') is not None
    if tensorboard and not there:
      raise ValueError(
        'an event file needs tensorboard: pip install tensorboard'
      )
    if jax.process_index() == 0:
      path = pathlib.Path(path)
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open('w', newline='', encoding='utf-8')
      if there and tensorboard is not False:
        self._events = _open_events(path.with_suffix(''))

  def write(
    self, step: int, metrics: Mapping[str, jax.Array | np.ndarray]
  ) -> None:
    """Writes a chunk of steps.

    Args:
      step: number of the chunk's first step.
      metrics: by name, one value a step: `[steps]` each.

    Raises:
      ValueError: where lengths differ, or names are not those of the first
        call.
    """
    if self._file is None:
      return
    columns = {name: np.asarray(x) for name, x in metrics.items()}
    shapes = {name: x.shape for name, x in columns.items()}
    if len(set(shapes.values())) != 1 or any(
      len(s) != 1 for s in shapes.values()
    ):
      raise ValueError(
        f'metrics need one value a step each, got shapes {shapes}'
      )
    if self._columns is None:
      self._columns = sorted(columns)
      csv.writer(self._file, lineterminator='\n').writerow(
        ['step', *self._columns]
      )
    if sorted(columns) != self._columns:
      raise ValueError(
        f'metrics must be {self._columns}, as at first, got {sorted(columns)}'
      )
    values = [columns[name].tolist() for name in self._columns]
    rows = (
      [step + i, *(int(v) if isinstance(v, bool) else v for v in row)]
      for i, row in enumerate(zip(*values, strict=True))
    )
    csv.writer(self._file, lineterminator='\n').writerows(rows)
    self._file.flush()
    if self._events is not None:
      for name in self._columns:
        for i, value in enumerate(columns[name]):
          self._events.add_scalar(name, value, step + i)
      self._events.flush()

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      self._events.close()
      self._events = None

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *error) -> None:
    self.close()


def _open_events(folder: pathlib.Path) -> Any:
  """Opens a new event file in a folder, in place of those that are there."""
  from tensorboard import summary  # slow to import, and may be missing

  for path in folder.glob('events.out.tfevents.*'):
    path.unlink()
  return summary.Writer(str(folder))
