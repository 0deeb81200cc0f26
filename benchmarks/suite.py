"""All benchmarks, one after the other, each as a process of its own.

  python -m benchmarks.suite --quick --out=FILE \
    --fusion_bench_python=$(which python) --mergekit_python=$(which python) \
    --pool=POOL

A benchmark that lacks what it compares with, or a pool, is left out and said
so. Exits with 1 where one failed, once all have run; `python -m
benchmarks.tables FILE` makes tables of what they wrote.
"""

import sys

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import suite_runs

_QUICK = flags.DEFINE_bool('quick', False, 'each of small towers, for minutes')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')
_POOL = flags.DEFINE_string('pool', '', 'folder of a pool')
_FUSION_BENCH = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench'
)
_MERGEKIT = flags.DEFINE_string(
  'mergekit_python', '', 'a Python that has mergekit'
)
_TORCH = flags.DEFINE_string(
  'torch_python', '', 'a Python that has torch and transformers'
)
_ONLY = flags.DEFINE_list('only', '', 'names of benchmarks; empty: all')


def main(argv):
  """Runs what there is and prints what came of it."""
  del argv
  unknown = sorted({*_ONLY.value} - {*suite_runs.BENCHMARKS})
  if unknown:
    there = ', '.join(suite_runs.BENCHMARKS)
    raise app.UsageError(f'unknown: {", ".join(unknown)}; there are {there}')
  given = {
    'out': _OUT.value,
    'pool': _POOL.value,
    'fusion_bench_python': _FUSION_BENCH.value,
    'mergekit_python': _MERGEKIT.value,
    'torch_python': _TORCH.value,
  }
  console = Console()
  names = _ONLY.value or list(suite_runs.BENCHMARKS)
  outcomes = list(suite_runs.run_all(names, given, _QUICK.value, console))
  table = Table('benchmark', '', 'seconds')
  for outcome in outcomes:
    table.add_row(outcome.name, outcome.said, f'{outcome.seconds:.0f}')
  console.print(table)
  if any(outcome.said.startswith('FAILED') for outcome in outcomes):
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
