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
import contextlib
import functools
import itertools
import math
import os
from pathlib import Path
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
from benchmarks import step_problem as problem

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
_PHASES = flags.DEFINE_bool('phases', True, 'time the phases of ours apart')
_THREADS = flags.DEFINE_integer('threads', 0, 'of all; 0: one for each core')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'steps of each at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which a row stops')
_QUICK = flags.DEFINE_bool('quick', False, 'two methods on a tiny tower')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')

TAKES = {
  'torch': ('adamerging_layer_wise', 'concrete_layer_wise', 'dam_paper'),
  'fusion_bench': (
    'adamerging_layer_wise',
    'concrete_layer_wise',
    'dam_released',
  ),
}
"""Methods of each peer."""
TOLERANCE = {'float32': 1e-3, 'tf32': 5e-2, 'bfloat16': 0.5}
"""Of `step_problem.difference`, by what products are computed in.

In bfloat16 a gradient on few images is right to a tenth; the same program in
float32 is what shows that two are the same.
"""
DEVICES = {'cpu': 'cpu', 'gpu': 'cuda', 'cuda': 'cuda'}
"""What torch calls JAX's platforms; it has no others."""


def _precision(platform: str, compute: str) -> str:
  """Returns what products are computed in."""
  float32 = 'float32' if platform == 'cpu' else 'tf32'
  return float32 if compute == 'float32' else compute


def measure(
  options: Mapping[str, Any], peers: Mapping[str, str]
) -> dict[str, Any]:
  """Compares and times the programs of one step.

  Args:
    options: of `steps_ours.load`.
    peers: Pythons by name; empty ones are left out.

  Returns:
    A row; 'left_out' says which peers are, and why.

  Raises:
    RuntimeError: where a program fails, or results differ.
  """
  row, left_out = {**options, 'experts': options['num']}, {}
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    folder = Path(enter(tempfile.TemporaryDirectory()))
    ours = enter(_worker(sys.executable, 'ours', options, folder))
    workers = {'ours': ours}
    row |= ours.about
    firsts = {'ours': ours.ask('first')}
    want = ours.ask('check')
    ours.ask('draws', str(folder))
    row['precision'] = _precision(row['platform'], options['compute'])
    for name, python in peers.items():
      left_out[name] = _missing(name, python, row)
      if left_out[name]:
        continue
      given = {
        **options,
        'batch': row['batch'],
        'device': DEVICES[row['platform']],
        'draws': str(folder),
      }
      peer = workers[name] = enter(_worker(python, name, given, folder))
      firsts[name] = peer.ask('first')
      found = problem.difference(want, peer.ask('check'))
      row[f'{name}_about'], row[f'{name}_difference'] = peer.about, found
      if not max(found.values()) <= TOLERANCE[row['precision']]:
        raise RuntimeError(f'{name} differs: {found}, {options}')
    turns = [functools.partial(w.ask, 'run') for w in workers.values()]
    meters = [w for name, w in workers.items() if name != 'fusion_bench']
    turns += [functools.partial(w.ask, 'machine') for w in meters]
    times = runs.alternate(turns, _REPEATS.value, _SECONDS.value)
    row |= dict(zip(workers, times, strict=False))
    row['machine'] = _machine(times[len(workers) :])
    row['first'] = firsts
    row['memory'] = {name: w.ask('memory') for name, w in workers.items()}
    if _PHASES.value:
      row['until'] = ours.ask('phases', _REPEATS.value, _SECONDS.value)
  return row | {'left_out': {n: why for n, why in left_out.items() if why}}


def _worker(
  python: str, name: str, options: Mapping[str, Any], folder: Path
) -> runs.Worker:
  env = {
    # An accelerator is shared with the peers.
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    # Nothing is compiled yet.
    'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor'),
  }
  return runs.Worker(python, f'steps_{name}', options, env)


def _missing(name: str, python: str, row: Mapping[str, Any]) -> str:
  """Says why a peer is left out; empty: it is not."""
  if not python:
    return f'no --{name}_python'
  if row['method'] not in TAKES[name]:
    return f'no {row["method"]}'
  if row['platform'] not in DEVICES:
    return f'not on {row["platform"]}'
  return ''


def _machine(
  rounds: Sequence[Sequence[Mapping[str, float]]],
) -> dict[str, float]:
  """Returns operations and bytes a second of the library that has most."""
  return {
    key: max(statistics.median(x[key] for x in found) for found in rounds)
    for key in ('flops', 'bytes')
  }


def median(times: Sequence[Mapping[str, float]]) -> float:
  """Returns the median of seconds."""
  return statistics.median(x['seconds'] for x in times)


def figures(row: Mapping[str, Any], name: str) -> dict[str, float]:
  """Derives what a program reaches.

  Args:
    row: of `measure`.
    name: of the program.

  Returns:
    'mfu': counted operations a second by those of the machine's product;
    'roofline': the time that these operations or the counted bytes take at
    least, by the step's.
  """
  total = {
    key: sum(phase[key] for phase in row['counted'].values())
    for key in ('flops', 'bytes')
  }
  seconds, machine = median(row[name]), row['machine']
  least = max(total[key] / machine[key] for key in total)
  return {
    'mfu': total['flops'] / machine['flops'] / seconds,
    'roofline': least / seconds,
  }


def phase_seconds(row: Mapping[str, Any]) -> dict[str, float]:
  """Returns what each phase adds to the step that ends before it."""
  until = {name: median(times) for name, times in row['until'].items()}
  ends = [0.0, *until.values()]
  return {
    name: end - begin
    for name, (begin, end) in zip(until, itertools.pairwise(ends), strict=True)
  }


def _cells(row: Mapping[str, Any]) -> Iterator[list[str]]:
  """Yields the cells of each program of a row."""
  for name in ('ours', *_PEERS):
    if name not in row:
      continue
    seconds = [x['seconds'] for x in row[name]]
    about = row if name == 'ours' else row[f'{name}_about']
    found, first = figures(row, name), row['first'][name]
    peak = row['memory'][name] or first['peak']
    error = row.get(f'{name}_difference', {'': math.nan})
    phases = phase_seconds(row) if name == 'ours' and 'until' in row else {}
    compiled = about['compile']
    ratio = median(row[name]) / median(row['ours'])
    yield [
      row['model'],
      row['method'],
      str(row['experts']),
      row['compute'],
      name,
      '-' if compiled is None else f'{compiled:.1f}',
      f'{first["seconds"]:.3g}',
      f'{median(row[name]):.3g} ({min(seconds):.3g}-{max(seconds):.3g})',
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
      methods=['dam_paper', 'dam_released'],
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
  peers, rows = {name: flag.value for name, flag in _PEERS.items()}, []
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
    }
    load = os.getloadavg()[0]
    row = {**measure(options, peers), 'load': load}
    # Written one by one: a case that is too large must not take the others.
    records.append(_OUT.value, 'meta_step', [row])
    rows.append(row)
    for name, why in row['left_out'].items():
      console.print(f'{model}, {method}: {name} is left out, {why}')
  console.print(_table(rows), f'{threads} threads')


if __name__ == '__main__':
  app.run(main)
