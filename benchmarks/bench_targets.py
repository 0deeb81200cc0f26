"""Whether one step on this accelerator reaches what we ask of it.

  python -m benchmarks.bench_targets --out=FILE

Steps of ViT-B/32 with six experts and 16 images a task, on random weights
(`step_problem.py`), each in a process of its own; then whether ViT-L/14 with
eight experts runs at all. The targets are for an H100; what PyTorch needed as
released stands beside them. `--seconds` ends it: rows that were not begun are
said to be. `--quick` runs the same on a tiny tower, where no target means
anything, to see that all of it works.
"""

from collections.abc import Mapping, Sequence
import math
import os
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks import runs

_METHODS = flags.DEFINE_list(
  'methods', 'dam_paper,dam_released', 'the first one has all rows'
)
_MODEL = flags.DEFINE_string('model', 'vit_b32', 'a tower of step_problem')
_LARGE = flags.DEFINE_string('large', 'vit_l14', 'the one that must fit')
_EXPERTS = flags.DEFINE_integer('experts', 6, 'of the first tower')
_LARGE_EXPERTS = flags.DEFINE_integer('large_experts', 8, 'of the large one')
_BATCH = flags.DEFINE_integer('batch', 16, 'images a task and draw')
_REPEATS = flags.DEFINE_integer('repeats', 20, 'steps of each row')
_SCAN = flags.DEFINE_bool('scan', True, 'loop over the blocks of a tower')
_SECONDS = flags.DEFINE_float('seconds', 420, 'after which no row begins')
_QUICK = flags.DEFINE_bool('quick', False, 'tiny towers')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


class Target(NamedTuple):
  """What is asked of a figure.

  Attributes:
    name: of the figure.
    unit: of it.
    most: that it may be.
    torch: what PyTorch needed as released on an H100; NaN where unknown.
  """

  name: str
  unit: str
  most: float
  torch: float = math.nan


STEP = {
  'bfloat16': Target('step, bfloat16', 'ms', 32),
  'float32': Target('step, float32', 'ms', 60, 1200),
}
TASK = Target('one more task, bfloat16', 'ms', 4, 155)
MEMORY = Target('peak memory, bfloat16', 'GB', 8, 16)
COMPILE = Target('compile', 's', 20)
CACHED = Target('compile, from the cache', 's', 3)
MERGE = Target('masked merge', 'ms', 1.6, 52)
FITS = Target('peak memory of the large tower', 'GB', 80)


class Case(NamedTuple):
  """A process that takes steps.

  Attributes:
    kind: 'whole' takes steps, 'cached' compiles what was compiled before,
      'fewer' has two experts, 'large' is of the large tower.
    options: of `steps_ours.load`.
  """

  kind: str
  options: Mapping[str, Any]


class Found(NamedTuple):
  """A figure and its target."""

  method: str
  target: Target
  value: float


def list_cases(
  common: Mapping[str, Any], large: Mapping[str, Any], methods: Sequence[str]
) -> list[Case]:
  """Returns what to run, in order.

  Args:
    common: options of every step of the first tower.
    large: of the large one.
    methods: the first has all rows.
  """
  cases = [
    Case('whole', {**common, 'method': method, 'compute': compute})
    for method in methods
    for compute in STEP
  ]
  first = cases[0].options
  fewer = Case('fewer', {**first, 'num': 2})
  return [
    cases[0],
    Case('cached', first),
    fewer,
    *cases[1:],
    Case('large', {**first, **large}),
  ]


def run(case: Case, cache: str, repeats: int) -> dict[str, Any]:
  """Compiles a step and takes it.

  Args:
    case: which one.
    cache: folder of compiled programs.
    repeats: steps after the first.

  Returns:
    Its row: 'compile' in seconds; unless it is compiled alone 'step' in
    seconds, of `times`, 'merge' the same and 'peak' in bytes.
  """
  env = {
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
  }
  with runs.Worker(sys.executable, 'steps_ours', case.options, env) as worker:
    row = {**case.options, **worker.about, 'kind': case.kind}
    if case.kind == 'cached':
      return row
    first = worker.ask('first')
    times = [worker.ask('run')['seconds'] for _ in range(repeats)]
    peak = worker.ask('memory') or first['held'] + first['peak']
    merge = statistics.median(worker.ask('merges', repeats))
  step = statistics.median(times)
  return {**row, 'times': times, 'step': step, 'merge': merge, 'peak': peak}


def figures(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[Found]:
  """Returns the figures of a row.

  Args:
    row: of `run`.
    first: the first row.
  """
  if row['kind'] == 'cached':
    found = [(CACHED, row['compile'])]
  elif row['kind'] == 'fewer':
    tasks = first['num'] - row['num']
    found = [(TASK, 1e3 * (first['step'] - row['step']) / tasks)]
  elif row['kind'] == 'large':
    found = [(FITS, row['peak'] / 1e9)]
  else:
    found = [(STEP[row['compute']], 1e3 * row['step'])]
    if row is first:
      found += [
        (MEMORY, row['peak'] / 1e9),
        (COMPILE, row['compile']),
        (MERGE, 1e3 * row['merge']),
      ]
  return [Found(row['method'], *figure) for figure in found]


def _table(found: list[Found]) -> Table:
  table = Table('method', '', 'here', 'target', '', 'PyTorch, H100')
  for method, target, value in found:
    passed = value <= target.most
    torch = '-' if math.isnan(target.torch) else f'{target.torch:g}'
    table.add_row(
      method,
      target.name,
      f'{value:.3g} {target.unit}',
      f'{target.most:g}',
      'reached' if passed else 'missed',
      torch,
    )
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(
      model='nano', large='nano', large_experts=3, experts=3, batch=2, repeats=2
    )
  if _EXPERTS.value < 3:
    raise app.UsageError(f'--experts must be at least 3, got {_EXPERTS.value}')
  shared = {
    'batch': _BATCH.value,
    'threads': len(os.sched_getaffinity(0)),
    'scan': _SCAN.value,
  }
  common = {**shared, 'model': _MODEL.value, 'num': _EXPERTS.value}
  large = {'model': _LARGE.value, 'num': _LARGE_EXPERTS.value, 'remat': True}
  console = Console(width=None if sys.stdout.isatty() else 120)
  begin, rows, found = time.monotonic(), [], []
  cases = list_cases(common, large, _METHODS.value)
  with tempfile.TemporaryDirectory() as cache:
    for case in cases:
      if rows and time.monotonic() - begin > _SECONDS.value:
        break
      rows.append(run(case, cache, _REPEATS.value))
      records.append(_OUT.value, 'targets', rows[-1:])
      found += (new := figures(rows[-1], rows[0]))
      said = ', '.join(f'{x.target.name} {x.value:.3g}' for x in new)
      seconds = time.monotonic() - begin
      console.print(f'{seconds:.0f} s: {new[0].method}, {said}')
  console.print(_table(found), rows[0]['device'])
  for case in cases[len(rows) :]:
    console.print(f'no time: {case.kind}, {case.options}')
  if not _QUICK.value and any(x.value > x.target.most for x in found):
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
