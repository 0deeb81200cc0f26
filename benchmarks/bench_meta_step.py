"""Time, memory and operations of a step of each learned merge, beside peers.

  python -m benchmarks.bench_meta_step --methods=dam_robust,dam_released
  python -m benchmarks.bench_meta_step --models=pool,vit_b32 --experts=2,6 \
    --torch_python=$(which python) --fusion_bench_python=$(which python)

On random towers, experts and images that all programs draw alike
(`step_problem.py`), each program in a process of its own: our step, a step that
torch compiles (`steps_torch.py`), and FusionBench's classes
(`steps_fusion_bench.py`). Losses and gradients of the first step are compared,
then the programs take turns. Parameters, masks and optimisers are float32;
`--compute` is what the forward and backward passes compute in.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import math
import os
import statistics
import sys
from typing import Any

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks import runs
from benchmarks import step_problem as problem
from benchmarks import step_runs

_MODELS = flags.DEFINE_list('models', 'pool', ', '.join(problem.SIZES))
_METHODS = flags.DEFINE_list(
  'methods',
  'adamerging_layer_wise,concrete_layer_wise,dam_paper,dam_released,dam_robust',
  'learned ones of experiments.methods',
)
_EXPERTS = flags.DEFINE_list('experts', '6', 'numbers of experts')
_BATCH = flags.DEFINE_integer(
  'batch', 16, 'images a task and draw; dam_robust has a number of its own'
)
_COMPUTE = flags.DEFINE_list('compute', 'float32', 'float32, bfloat16')
_PEERS = {
  'torch': flags.DEFINE_string(
    'torch_python', '', 'a Python that has torch and transformers'
  ),
  'fusion_bench': flags.DEFINE_string(
    'fusion_bench_python', '', 'a Python that has fusion-bench'
  ),
}
_SCAN = flags.DEFINE_bool('scan', False, 'ours compiles one block and loops')
_REMAT = flags.DEFINE_bool('remat', False, 'ours computes blocks again')
_PHASES = flags.DEFINE_bool('phases', True, 'time the phases of ours apart')
_THREADS = flags.DEFINE_integer('threads', 0, 'of all; 0: one for each core')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'steps of each at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which a row stops')
_QUICK = flags.DEFINE_bool('quick', False, 'two methods on a tiny tower')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def _cells(row: Mapping[str, Any]) -> Iterator[list[str]]:
  """Yields the cells of each program of a row."""
  for name in ('ours', *_PEERS):
    if name not in row:
      continue
    seconds = [x['seconds'] for x in row[name]]
    about = row if name == 'ours' else row[f'{name}_about']
    found, first = step_runs.figures(row, name), row['first'][name]
    peak = row['memory'][name] or first['peak']
    error = row.get(f'{name}_difference', {'': math.nan})
    phases = (
      step_runs.phase_seconds(row) if name == 'ours' and 'until' in row else {}
    )
    compiled = about['compile']
    middle = step_runs.median(row[name])
    ratio = middle / step_runs.median(row['ours'])
    yield [
      row['model'],
      row['method'],
      str(row['experts']),
      row['compute'],
      name,
      '-' if compiled is None else f'{compiled:.1f}',
      f'{first["seconds"]:.3g}',
      f'{middle:.3g} ({min(seconds):.3g}-{max(seconds):.3g})',
      f'{statistics.median(x["cpu"] for x in row[name]):.3g}',
      f'{ratio:.2f}',
      f'{peak / 1e6:.0f}',
      f'{found["mfu"]:.0%}',
      f'{found["roofline"]:.0%}',
      ' + '.join(f'{x:.3g}' for x in phases.values()) or '-',
      '-' if name == 'ours' else f'{max(error.values()):.0e}',
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
  table = Table(
    *('model', 'method', 'K', 'compute', '', 'compile, s', 'first, s'),
    *('step, s', 'CPU, s', 'of ours', 'peak, MB', 'MFU', 'roofline'),
    *('phases, s', 'error'),
  )
  for row in rows:
    for cells in _cells(row):
      table.add_row(*cells)
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(
      models=['nano'],
      methods=['concrete_layer_wise', 'dam_released'],
      experts=['2'],
      batch=4,
      repeats=5,
      seconds=10.0,
    )
  unknown = [x for x in _MODELS.value if x not in problem.SIZES]
  unknown += [x for x in _COMPUTE.value if x not in ('float32', 'bfloat16')]
  if unknown:
    raise app.UsageError(f'unknown: {", ".join(unknown)}')
  cores = sorted(os.sched_getaffinity(0))
  threads = _THREADS.value or len(cores)
  # Whatever is started from here on has no more.
  os.sched_setaffinity(0, cores[:threads])
  console = Console(width=None if sys.stdout.isatty() else 200)
  peers = {name: flag.value for name, flag in _PEERS.items()}
  rows, failed = [], []
  cases = itertools.product(
    _MODELS.value, _COMPUTE.value, map(int, _EXPERTS.value), _METHODS.value
  )
  for model, compute, num, method in cases:
    options = {
      'model': model,
      'method': method,
      'num': num,
      'batch': _BATCH.value,
      'compute': compute,
      'threads': threads,
      'scan': _SCAN.value,
      'remat': _REMAT.value,
    }
    load = os.getloadavg()[0]
    # A case that is too large, or differs, must not take the others with it.
    try:
      row = step_runs.measure(
        options,
        peers,
        repeats=_REPEATS.value,
        seconds=_SECONDS.value,
        phases=_PHASES.value,
      )
    except RuntimeError as e:
      row = {**options, 'experts': num, 'failed': str(e)}
      failed.append(row)
      console.print(f'{model}, {method}, {num} experts: {e}', markup=False)
    else:
      rows.append(row)
      for name, why in row['left_out'].items():
        console.print(f'{model}, {method}: {name} is left out, {why}')
    records.append(_OUT.value, 'meta_step', [{**row, 'load': load}])
  console.print(_table(rows), f'{threads} threads')
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
