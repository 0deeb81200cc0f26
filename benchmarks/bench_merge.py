"""Time and memory of merges without data, beside three other programs.

  python -m benchmarks.bench_merge --fusion_bench_python=$(which python) \
    --mergekit_python=$(which python)

On random models with the names and shapes of CLIP's ViT-B/32 (88 million
float32 parameters). `memory`: models that are there, ours and FusionBench's,
mergekit's and NumPy's functions in processes of their own that take turns;
`disk`: `dam-jax merge` and `mergekit-pytorch` as whole processes on the same
files, which take turns; `device`: task arithmetic on an accelerator, where JAX
has one. Results are compared before anything is timed; of merges that draw,
those of small models on the same draws. What would not fit into memory, or what
a program cannot do, is left out and said so.

A merge moves `(K + 2) 4 P` bytes at least. GB/s counts these, and the share is
of what a copy moved in the same run: NumPy's with as many threads, or reading
the same files and writing one. Memory is in models of `4 P` bytes. Linux only.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
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
_METHODS = flags.DEFINE_list(
  'methods', 'average,task_arithmetic,ties', "of the catalogue, or 'all'"
)
_DISK_METHODS = flags.DEFINE_list(
  'disk_methods', '', 'those of them that are merged from files; empty: all'
)
_EXPERTS = flags.DEFINE_list('experts', '2,4,8,20', 'numbers of experts')
_FORMS = flags.DEFINE_list(
  'forms', 'stacked,donated,leaves,leaves_donated', 'of ours in memory'
)
_THREADS = flags.DEFINE_integer('threads', 0, 'of all; 0: one for each core')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'of each merge at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which a pair stops')
_LAYERS = flags.DEFINE_integer('layers', 12, 'of the tower')
_WIDTH = flags.DEFINE_integer('width', 768, 'of the tower')
_FOLDER = flags.DEFINE_string('folder', '', 'keep the models here')
_QUICK = flags.DEFINE_bool('quick', False, 'a small tower, few runs')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')

FORMS = ('stacked', 'donated', 'leaves', 'leaves_donated')
"""`dj.merge` jitted, the same with the base donated, `dj.streaming.merge`."""


def _available() -> int:
  """Returns bytes of memory that processes may still have."""
  found = Path('/proc/meminfo').read_text().split()
  return 1024 * int(found[found.index('MemAvailable:') + 1])


class _Bench:
  """What all measurements share.

  Attributes:
    stack: closes processes at the end; None: each measurement has its own, so
      that memory is of that one alone, and starting them takes most of the time
      of a short run.
  """

  def __init__(
    self, folder: Path, threads: int, stack: contextlib.ExitStack | None
  ):
    self.folder, self.threads, self.stack = folder, threads, stack
    self.workers: dict[str, runs.Worker] = {}
    shapes = merge_runs.tower_shapes(_WIDTH.value, _LAYERS.value)
    self.size = sum(int(np.prod(shape)) for shape in shapes.values())
    self.about: dict[str, Any] = {}
    self.pythons = {
      name: python
      for name, python in (
        ('fusion_bench', _FUSION_BENCH.value),
        ('mergekit', _MERGEKIT.value),
        ('numpy', sys.executable),
      )
      if python
    }
    experts = [int(num) for num in _EXPERTS.value]
    options = {'methods': _METHODS.value, 'experts': experts}
    planner = runs.Worker(sys.executable, 'merge_cases', options, runs.HOST)
    with planner:
      if planner.about['unknown']:
        unknown = ', '.join(planner.about['unknown'])
        raise app.UsageError(f'unknown methods: {unknown}')
      found = planner.about['plan']
      self.plan = [(n, case) for n in experts for case in found[str(n)]]
      for num, case in self.plan:
        names = case['method'], case['variant'], num
        case['drawn'] = {}
        if case['random']:
          case['drawn'] = planner.ask('agree', *names, self.pythons)
    merge_runs.make_models(folder, shapes, max(experts))

  @contextlib.contextmanager
  def start(
    self, name: str, program: str, options: Mapping[str, Any]
  ) -> Iterator[runs.Worker]:
    if name in self.workers:
      self.workers[name].load(options)
      yield self.workers[name]
      return
    python = self.pythons.get(name, sys.executable)
    # Others see the host alone, beside a device as well.
    env = {} if options.get('form') == 'device' else runs.HOST
    worker = runs.Worker(python, program, options, env)
    self.about[name] = worker.about
    if self.stack is None:
      with worker:
        yield worker
    else:
      self.workers[name] = self.stack.enter_context(worker)
      yield worker

  def copier(self):
    options = {'size': self.size, 'threads': self.threads}
    return self.start('copy', 'worker', options)

  def ours(self, case: Mapping[str, Any], form: str, num: int):
    options = {
      'folder': str(self.folder),
      **{key: case[key] for key in ('method', 'variant')},
      **{'form': form, 'num': num, 'threads': self.threads},
    }
    name = 'ours on a device' if form == 'device' else 'ours'
    return self.start(name, 'merges_ours', options)

  def peer(self, name: str, case: Mapping[str, Any], num: int):
    # `Peer` has a name, by which the program is called here.
    asked = {k: x for k, x in case['peers'][name].items() if k != 'name'}
    options = {'folder': str(self.folder), 'num': num, **asked}
    if name != 'numpy':
      options['threads'] = self.threads
    return self.start(name, f'merges_{name}', options)

  def room(self, needs: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
    """Returns what fits into memory together, and why the others do not."""
    left, fit, out = _available() / 4 / self.size, [], {}
    for name, models in needs.items():
      if models < left:
        fit.append(name)
        left -= models
      else:
        out[name] = f'needs about {models} models, {left:.0f} fit'
    return fit, out

  def row(
    self, part: str, case: Mapping[str, Any], num: int, form: str, **found: Any
  ) -> dict[str, Any]:
    return {
      'part': part,
      **{key: case[key] for key in ('method', 'variant', 'says', 'tolerance')},
      'experts': num,
      'form': form,
      'bytes': (num + 2) * 4 * self.size,
      **{name: x for name, x in found.items() if x},
    }


def measure_memory(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row for each merge, number of experts and form."""
  for num, case in bench.plan:
    needed = functools.partial(
      merge_runs.models_needed, method=case['method'], num=num
    )
    forms = [form for form in _FORMS.value if form in case['forms']]
    peers = [name for name in bench.pythons if name in case['peers']]
    needs = {form: needed('ours', form=form) for form in forms}
    # Of the forms only one is there at a time.
    largest = max([n for n in needs.values() if bench.room({'': n})[0]] or [0])
    chosen, missing = bench.room(
      {'ours': largest, **{name: needed(name, form='') for name in peers}}
    )
    with contextlib.ExitStack() as stack:
      enter = stack.enter_context
      copy, others, firsts = enter(bench.copier()), {}, {}
      for name in chosen[1:]:
        others[name] = enter(bench.peer(name, case, num))
        firsts[name] = others[name].ask('first')
        if not case['random']:
          others[name].ask('save', str(bench.folder / f'{name}.safetensors'))
      for form in forms:
        said = functools.partial(bench.row, 'memory', case, num, form)
        if needs[form] > largest:
          yield said(missing=bench.room({'ours': needs[form]})[1])
          continue
        with bench.ours(case, form, num) as ours:
          first, errors = ours.ask('first'), dict(case['drawn'])
          for name in () if case['random'] else others:
            path = bench.folder / f'{name}.safetensors'
            errors[name] = ours.ask('difference', str(path))
          workers = [copy, ours, *others.values()]
          turns = [functools.partial(w.ask, 'run') for w in workers]
          times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
        yield said(
          copy=times[0],
          first=first,
          ours=times[1],
          peers={
            name: {
              'first': firsts[name],
              'runs': found,
              'difference': errors[name],
            }
            for name, found in zip(others, times[2:], strict=True)
          },
          missing=missing,
        )


def measure_disk(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row for each merge and number of experts."""
  folder = bench.folder
  ours_out, peer_out, log = (folder / x for x in ('ours', 'peer', 'log.txt'))

  def run(argv, out):
    shutil.rmtree(out, ignore_errors=True)
    return runs.run_command(argv, log)

  # What mergekit calls a method is timed beside every meaning of it.
  mergekit = {
    (num, case['method']): case['peers']['mergekit']
    for num, case in bench.plan
    if 'mergekit' in case['peers']
  }
  chosen = _DISK_METHODS.value
  for num, case in bench.plan:
    if chosen and case['method'] not in chosen:
      continue
    said = functools.partial(bench.row, 'disk', case, num, '')
    argv = merge_runs.ours_argv(
      sys.executable, folder, num, case['method'], case['options'], ours_out
    )
    turns = [
      functools.partial(merge_runs.copy_files, folder, num),
      functools.partial(run, argv, ours_out),
    ]
    error = None
    for turn in turns:
      turn()  # files are read into the page cache
    peer = mergekit.get((num, case['method']))
    if peer and _MERGEKIT.value:
      peer_argv = merge_runs.mergekit_argv(
        _MERGEKIT.value, folder, num, peer, peer_out, bench.threads
      )
      turns.append(functools.partial(run, peer_argv, peer_out))
      turns[-1]()
      error = case['drawn'].get('mergekit')
      if case['exact'] and 'mergekit' in case['peers']:
        error = merge_runs.difference(
          sys.executable, folder / 'base.safetensors', ours_out, peer_out
        )
    times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
    peers = {'mergekit': {'runs': times[2]}} if times[2:] else {}
    if peers and error is not None:
      peers['mergekit']['difference'] = error
    yield said(copy=times[0], ours=times[1], peers=peers)


def measure_device(bench: _Bench) -> Iterator[dict[str, Any]]:
  """Yields a row where JAX has an accelerator."""
  case = {
    'method': 'task_arithmetic',
    'variant': '',
    'says': 'task_arithmetic(0.3)',
    'tolerance': 0.0,
  }
  with bench.ours(case, 'device', 6) as ours:
    if ours.about['platform'] == 'cpu':
      return
    first = ours.ask('first')
    times = [ours.ask('run') for _ in range(_REPEATS.value)]
  yield bench.row('device', case, 6, 'donated', first=first, ours=times)


PARTS = {
  'memory': measure_memory,
  'disk': measure_disk,
  'device': measure_device,
}


def _median(times: Sequence[dict[str, float]], key: str) -> float:
  return statistics.median([x.get(key, math.nan) for x in times] or [math.nan])


def _timed(found: Mapping[str, Any], name: str, model: int) -> list[str]:
  """Returns seconds, CPU seconds and memory of what was run."""
  times = found[name]
  seconds = [x['seconds'] for x in times]
  peak = found.get('first', {}).get('peak', _median(times, 'peak'))
  middle = statistics.median(seconds)
  return [
    f'{middle:.3g} ({min(seconds):.3g}-{max(seconds):.3g})',
    f'{_median(times, "cpu"):.3g}',
    f'{peak / model:.1f}',
  ]


def _lines(row: Mapping[str, Any], model: int) -> Iterator[list[str]]:
  """Yields the lines of the table: one, or one for each peer."""
  head = [f'{row["method"]} {row["variant"]}'.strip(), str(row['experts'])]
  missing = [f'{name}: {why}' for name, why in row.get('missing', {}).items()]
  if 'ours' not in row:
    yield [*head, row['form'], f'left out: {missing[0]}', *[''] * 9]
    return
  seconds = _median(row['ours'], 'seconds')
  speed, share = row['bytes'] / 1e9 / seconds, ''
  if 'copy' in row:
    moved = 2 * model if row['part'] == 'memory' else row['bytes']
    copied = moved / 1e9 / _median(row['copy'], 'seconds')
    share = f'{speed / copied:.0%}'
  head += [row['form'], *_timed(row, 'ours', model), f'{speed:.3g}', share]
  peers = row.get('peers', {})
  for name, found in peers.items():
    faster = ' / '.join(
      f'{_median(found["runs"], key) / _median(row["ours"], key):.1f}'
      for key in ('seconds', 'cpu')
    )
    error = f'{found["difference"]:.0e}' if 'difference' in found else '-'
    yield [*head, name, *_timed(found, 'runs', model), faster, error]
  if not peers:
    yield [*head, '; '.join(missing) or '-', *[''] * 5]


def _table(part: str, rows: Sequence[Mapping[str, Any]], model: int) -> Table:
  table = Table(
    *('method', 'K', 'form', 'ours, s', 'CPU, s', 'memory', 'GB/s'),
    *('of copy', 'peer', 'peer, s', 'CPU, s', 'memory', 'faster', 'error'),
    title=part,
  )
  for row in rows:
    for line in _lines(row, model):
      table.add_row(*line)
  return table


def _check_flags() -> None:
  for given, known in ((_PARTS.value, PARTS), (_FORMS.value, FORMS)):
    unknown = sorted({*given} - {*known})
    if unknown:
      raise app.UsageError(f'unknown: {", ".join(unknown)}')


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(
      **{'layers': 1, 'width': 192, 'experts': ['2'], 'repeats': 3},
      **{'forms': ['donated', 'leaves'], 'seconds': 1.0},
      # To start two processes a merge takes longer than all else.
      disk_methods=['average', 'ties'],
    )
  _check_flags()
  cores = sorted(os.sched_getaffinity(0))
  threads = _THREADS.value or len(cores)
  # Whatever is started from here on has no more.
  os.sched_setaffinity(0, cores[:threads])
  load = os.getloadavg()
  rows: list[dict[str, Any]] = []
  console = Console(width=None if sys.stdout.isatty() else 180)
  with contextlib.ExitStack() as stack:
    folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
    bench = _Bench(Path(folder), threads, stack if _QUICK.value else None)
    about = {'parameters': bench.size, 'threads': threads, 'load': load}
    for part in _PARTS.value:
      found = []
      for row in PARTS[part](bench):
        found.append(row)
        # A long run that is stopped leaves what it has measured.
        records.append(
          _OUT.value, 'merge', [row], **about, programs=bench.about
        )
      if found:
        console.print(_table(part, found, 4 * bench.size))
      rows += found
  console.print(f'{threads} threads; load before: {load[0]:.1f}')
  if lines := merge_runs.wrong(rows):
    console.print('\n'.join(lines))
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
