"""Per-step measurements on disk: one CSV file, written by process 0 only.

The file opens in any spreadsheet; a row that is on disk is complete, since
every call ends with a flush.
"""

from collections.abc import Mapping
import csv
import pathlib

import jax
import numpy as np


class MetricWriter:
  """Appends measurements of consecutive steps to a CSV file.

  The columns are those of the first call, behind `step`; booleans are written
  as 0 and 1. On other processes than the first, nothing is written.

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

  def __init__(self, path: str | pathlib.Path):
    """Creates the file, and its folder where it is missing.

    Args:
      path: of the file; one that exists is replaced.
    """
    self._file = None
    self._columns = None
    if jax.process_index() == 0:
      path = pathlib.Path(path)
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open('w', newline='', encoding='utf-8')

  def write(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
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

  def close(self) -> None:
    """Closes the file; a second call does nothing."""
    if self._file is not None:
      self._file.close()

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *error) -> None:
    self.close()
