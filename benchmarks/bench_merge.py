"""Time and memory of merges without data, beside FusionBench and mergekit.

  python -m benchmarks.bench_merge --fusion_bench_python=$(which python) \
    --mergekit_python=$(which python)

On random models with the names and shapes of CLIP's ViT-B/32 (88 million
float32 parameters). `memory`: models that are there, ours and FusionBench's
functions in processes of their own that take turns; `disk`: `dam-jax merge` and
`mergekit-pytorch` as whole processes on the same files, which take turns;
`device`: task arithmetic on an accelerator, where JAX has one. Results are
compared before anything is timed.

A merge moves `(K + 2) 4 P` bytes at least. GB/s counts these, and the share is
of what a copy of NumPy's moved with as many threads in the same run. Memory is
in models of `4 P` bytes. Linux only.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import itertools
import math
import os
from pathlib import Path
import shutil
import statistics
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import merge_runs
from benchmarks import records
from benchmarks import runs

_FUSION_BENCH = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench; none: leave out'
)
_MERGEKIT = flags.DEFINE_string(
  'mergekit_python', '', 'a Python that has mergekit; none: leave it out'
)
_PARTS = flags.DEFINE_list('parts', 'memory,disk,device', 'what to measure')
_METHODS = flags.DEFINE_list('methods', 'average,task_arithmetic,ties', '')
_EXPERTS = flags.DEFINE_list('experts', '2,4,8', 'numbers of experts')
_THREADS = flags.DEFINE_integer('threads', 0, 'of both; 0: one for each core')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'of each merge at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which a pair stops')
_LAYERS = flags.DEFINE_integer('layers', 12, 'of the tower')
_WIDTH = flags.DEFINE_integer('width', 768, 'of the tower')
_FOLDER = flags.DEFINE_string('folder', '', 'keep the models here')
_QUICK = flags.DEFINE_bool('quick', False, 'a tower of two layers, few runs')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')

FORMS = ('stacked', 'donated', 'leaves', 'leaves_donated')
"""`dj.merge` jitted, the same with the base donated, `dj.streaming.merge`."""
TOLERANCE = {'memory': 2e-6, 'disk': 2e-5}
"""Of the largest `|ours - peer| / max|peer|` of a leaf; of files, of the norm
of the difference by that of the task vector, which one sign would exceed."""
TIES_MODELS = 10
"""How many models FusionBench's TIES holds for each expert."""
COMMANDS = {
  'average': (('average',), 'linear', {'weight': 1.0}),
  'task_arithmetic': (
    ('task_arithmetic', '--set', 'scale=0.3'),
    'task_arithmetic',
    {'weight': 1.0, 'lambda': 0.3},
  ),
  'ties': (
    ('ties', '--set', 'density=0.2', '--set', 'scale=0.3'),
    'ties',
    {'density': 0.2, 'weight': 1.0, 'normalize': True, 'lambda': 0.3},
  ),
}


def _available() -> int:
  """Returns bytes of memory that processes may still have."""
  found = Path('/proc/meminfo').read_text().split()
  return 1024 * int(found[found.index('MemAvailable:') + 1])


class _Bench:
  """What all measurements share."""

  def __init__(self, folder: Path, threads: int):
    self.folder, self.threads = folder, threads
    shapes = merge_runs.tower_shapes(_WIDTH.value, _LAYERS.value)
    self.size = sum(int(np.prod(shape)) for shape in shapes.values())
    self.about: dict[str, Any] = {}
    most = max(map(int, _EXPERTS.value))
    merge_runs.make_models(folder, shapes, most)

  def copier(self) -> runs.Worker:
    options = {'size': self.size, 'threads': self.threads}
    return runs.Worker(sys.executable, 'worker', options, runs.HOST)

  def worker(
    self, program: str, method: str, form: str, num: int
  ) -> runs.Worker:
    peer = program == 'merges_fusion_bench'
    worker = runs.Worker(
      _FUSION_BENCH.value if peer else sys.executable,
      program,
      {
        'folder': str(self.folder),
        'method': method,
        'form': form,
        'num': num,
        'threads': self.threads,
      },
      {} if form == 'device' else runs.HOST,
    )
    self.about[program] = worker.about
    return worker

  def row(self, part: str, method: str, num: int, form: str, **found: Any):
    found = {name: x for name, x in found.items() if x is not None}
    return {
      'part': part,
      'method': method,
      'experts': num,
      'form': form,
      'bytes': (num + 2) * 4 * self.size,
      **found,
    }


def measure_memory(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row for each method, number of experts and form."""
  cases = itertools.product(map(int, _EXPERTS.value), _METHODS.value)
  for num, method in cases:
    models = num * TIES_MODELS if method == 'ties' else num + 6
    fits = models * 4 * bench.size < _available()
    with contextlib.ExitStack() as stack:
      enter = stack.enter_context
      copy = enter(bench.copier())
      peer = None
      if _FUSION_BENCH.value and fits:
        peer = enter(bench.worker('merges_fusion_bench', method, '', num))
        peer_first = peer.ask('first')
        saved = bench.folder / 'peer.safetensors'
        peer.ask('save', str(saved))
      for form in FORMS:
        with bench.worker('merges_ours', method, form, num) as ours:
          first = ours.ask('first')
          error = None
          if peer is not None:
            error = ours.ask('difference', str(saved))
          workers = [copy, ours] + ([peer] if peer else [])
          turns = [functools.partial(w.ask, 'run') for w in workers]
          times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
        yield bench.row(
          'memory',
          method,
          num,
          form,
          copy=times[0],
          first=first,
          ours=times[1],
          peer_first=peer_first if peer else None,
          peer=times[2] if peer else None,
          difference=error,
        )


def measure_disk(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row for each method, number of experts and scope."""
  folder = bench.folder
  ours_out, peer_out, log = (folder / x for x in ('ours', 'peer', 'log.txt'))

  def run(argv, out):
    shutil.rmtree(out, ignore_errors=True)
    return runs.run_command(argv, log)

  cases = itertools.product(map(int, _EXPERTS.value), _METHODS.value)
  for num, method in cases:
    ours_method, peer_method, parameters = COMMANDS[method]
    scopes = {'': ()}
    if method == 'ties':
      # mergekit ranks the entries of each leaf, TIES' authors of all.
      scopes = {'leaf': ('--set', 'reading=mergekit'), 'model': ()}
    for scope, options in scopes.items():
      argv = merge_runs.ours_argv(
        sys.executable, folder, num, (*ours_method, *options), ours_out
      )
      turns = [functools.partial(run, argv, ours_out)]
      error = None
      turns[0]()  # files are read into the page cache
      if _MERGEKIT.value:
        peer_argv = merge_runs.mergekit_argv(
          _MERGEKIT.value,
          folder,
          num,
          peer_method,
          parameters,
          peer_out,
          bench.threads,
        )
        turns.append(functools.partial(run, peer_argv, peer_out))
        turns[1]()
        if scope != 'model':
          error = merge_runs.difference(
            sys.executable, folder / 'base.safetensors', ours_out, peer_out
          )
      times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
      yield bench.row(
        'disk',
        method,
        num,
        scope,
        ours=times[0],
        peer=times[1] if _MERGEKIT.value else None,
        difference=error,
      )


def measure_device(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row where JAX has an accelerator."""
  with bench.worker('merges_ours', 'task_arithmetic', 'device', 6) as ours:
    if ours.about['platform'] == 'cpu':
      return
    first = ours.ask('first')
    times = [ours.ask('run') for _ in range(_REPEATS.value)]
  yield bench.row(
    'device', 'task_arithmetic', 6, 'donated', first=first, ours=times
  )


PARTS = {
  'memory': measure_memory,
  'disk': measure_disk,
  'device': measure_device,
}


def _median(times: Sequence[dict[str, float]], key: str) -> float:
  return statistics.median([x[key] for x in times] or [math.nan])


def _timed(
  times: Sequence[dict[str, float]] | None, peak: float, model: int
) -> list[str]:
  if times is None:
    return ['-'] * 3
  seconds = [x['seconds'] for x in times]
  middle = statistics.median(seconds)
  return [
    f'{middle:.3g} ({min(seconds):.3g}-{max(seconds):.3g})',
    f'{_median(times, "cpu"):.3g}',
    f'{peak / model:.1f}',
  ]


def _cells(row: dict[str, Any], model: int) -> list[str]:
  """Returns the cells of the table."""
  peaks = [
    row[first]['peak'] if first in row else _median(row.get(name, []), 'peak')
    for name, first in (('ours', 'first'), ('peer', 'peer_first'))
  ]
  faster, share = '-', ''
  if 'peer' in row:
    faster = ' / '.join(
      f'{_median(row["peer"], key) / _median(row["ours"], key):.1f}'
      for key in ('seconds', 'cpu')
    )
  seconds = _median(row['ours'], 'seconds')
  speed = row['bytes'] / 1e9 / seconds
  if 'copy' in row:
    copied = 2 * model / 1e9 / _median(row['copy'], 'seconds')
    share = f'{speed / copied:.0%}'
  return [
    row['method'],
    str(row['experts']),
    row['form'],
    *_timed(row['ours'], peaks[0], model),
    *_timed(row.get('peer'), peaks[1], model),
    faster,
    f'{speed:.3g}',
    share,
    f'{row["difference"]:.0e}' if 'difference' in row else '-',
  ]


def _table(part: str, rows: Sequence[dict[str, Any]], model: int) -> Table:
  table = Table(
    *('method', 'K', '', 'ours, s', 'CPU, s', 'memory'),
    *('peer, s', 'CPU, s', 'memory', 'faster', 'GB/s', 'of copy', 'error'),
    title=part,
  )
  for row in rows:
    table.add_row(*_cells(row, model))
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(layers=2, experts=['2', '4'], repeats=3, seconds=5.0)
  unknown = sorted({*_PARTS.value} - {*PARTS}) + sorted(
    {*_METHODS.value} - {*COMMANDS}
  )
  if unknown:
    raise app.UsageError(f'unknown: {", ".join(unknown)}')
  cores = sorted(os.sched_getaffinity(0))
  threads = _THREADS.value or len(cores)
  # Whatever is started from here on has no more.
  os.sched_setaffinity(0, cores[:threads])
  load = os.getloadavg()
  with contextlib.ExitStack() as stack:
    folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
    bench = _Bench(Path(folder), threads)
    rows = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in _PARTS.value:
      found = list(PARTS[part](bench))
      rows += found
      if found:
        console.print(_table(part, found, 4 * bench.size))
  console.print(f'{threads} threads; load before: {load[0]:.1f}')
  records.append(
    _OUT.value,
    'merge',
    rows,
    parameters=bench.size,
    threads=threads,
    load=load,
    programs=bench.about,
  )
  wrong = [
    row for row in rows if row.get('difference', 0) > TOLERANCE[row['part']]
  ]
  if wrong:
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
