"""Bandwidth of files in and out, against a plain copy of as many bytes.

  python -m benchmarks.bench_checkpoint --folder=DISK --out=FILE

A random model of the names and shapes of CLIP's ViT-B/32 (351 MB), as a state
that learned merges save, as a safetensors file written at once or leaf by leaf,
and as an Orbax checkpoint. What is read is compared with what was written
before anything is timed. The copy is of one file in the same folder, in blocks
of 16 MB; it is flushed to the disk where the kind is; the share is of its
speed. `read` is reading that file alone.

Files are read with their pages in the system's memory, and with those dropped,
by `posix_fadvise`, which needs no right but may be refused: the column says
which share stayed. What a disk or a hypervisor keeps for itself stays. Linux
only.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import os
import statistics
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks import runs

KINDS = ('state', 'safetensors', 'leaves', 'orbax')
"""Those of `benchmarks.checkpoint_runs`."""
PASSES = (('save', False), ('restore', False), ('restore', True))
"""Directions, and whether pages are dropped before."""

_KINDS = flags.DEFINE_list('kinds', ','.join(KINDS), 'what to measure')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'of each at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which a kind stops')
_LAYERS = flags.DEFINE_integer('layers', 12, 'of the tower')
_WIDTH = flags.DEFINE_integer('width', 768, 'of the tower')
_FOLDER = flags.DEFINE_string(
  'folder', '', 'on the disk to measure; empty is a temporary one'
)
_QUICK = flags.DEFINE_bool('quick', False, 'a tower of two layers, few runs')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def measure(
  folder: str, kind: str, direction: str, drop: bool
) -> dict[str, Any]:
  """Returns the row of one kind and direction.

  Raises:
    ValueError: where what is read is not what was written.
  """
  options = {
    **{'folder': folder, 'kind': kind, 'direction': direction, 'drop': drop},
    **{'width': _WIDTH.value, 'layers': _LAYERS.value},
  }
  with runs.Worker(
    sys.executable, 'checkpoint_runs', options, runs.HOST
  ) as worker:
    about = worker.about
    if not about['same']:
      raise ValueError(f'{kind}: what is read is not what was written')
    held = worker.ask('held') if drop else None
    asked = ['run', 'copy'] + (['read'] if direction == 'restore' else [])
    turns = [functools.partial(worker.ask, name) for name in asked]
    times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
  found = dict(zip(asked, times, strict=True))
  seconds = {name: _median(x) for name, x in found.items()}
  return {
    'kind': kind,
    'direction': direction,
    'cache': 'dropped' if drop else 'warm',
    **({} if held is None else {'held': held}),
    'bytes': about['bytes'],
    'flushed': about['flushed'],
    'seconds': seconds['run'],
    'gbps': about['bytes'] / 1e9 / seconds['run'],
    'of_copy': seconds['copy'] / seconds['run'],
    'runs': found['run'],
    'copy': found['copy'],
    **({'read': found['read']} if 'read' in found else {}),
    'versions': about['versions'],
  }


def _median(times: Sequence[Mapping[str, float]]) -> float:
  return statistics.median(x['seconds'] for x in times)


def measure_all(folder: str) -> Iterator[dict[str, Any]]:
  """Yields a row for each kind, direction and state of the pages."""
  for kind, (direction, drop) in itertools.product(_KINDS.value, PASSES):
    yield measure(folder, kind, direction, drop)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
  table = Table(
    *('kind', '', 'pages', 'MB', 'seconds', 'CPU', 'GB/s', 'copy, s'),
    *('of copy', 'read, s', 'flushed'),
  )
  for row in rows:
    times = [x['seconds'] for x in row['runs']]
    pages = row['cache']
    if 'held' in row:
      pages += f', {row["held"]:.0%} stay'
    table.add_row(
      *(row['kind'], row['direction'], pages, f'{row["bytes"] / 1e6:.0f}'),
      f'{row["seconds"]:.3g} ({min(times):.3g}-{max(times):.3g})',
      f'{statistics.median(x["cpu"] for x in row["runs"]):.3g}',
      f'{row["gbps"]:.3g}',
      f'{_median(row["copy"]):.3g}',
      f'{row["of_copy"]:.0%}',
      f'{_median(row["read"]):.3g}' if 'read' in row else '',
      'yes' if row['flushed'] else 'no',
    )
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(layers=2, repeats=3, seconds=5.0)
  unknown = sorted({*_KINDS.value} - {*KINDS})
  if unknown:
    raise app.UsageError(f'unknown: {", ".join(unknown)}')
  load, rows = os.getloadavg(), []
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(
      tempfile.TemporaryDirectory(dir=_FOLDER.value or None)
    )
    for row in measure_all(folder):
      rows.append(row)
      records.append(_OUT.value, 'checkpoint', [row], load=load)
  console = Console(width=None if sys.stdout.isatty() else 130)
  console.print(_table(rows), f'load before: {load[0]:.1f}')


if __name__ == '__main__':
  app.run(main)
