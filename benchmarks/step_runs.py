"""What `benchmarks.bench_meta_step` runs: programs of one step, their row."""

from collections.abc import Mapping, Sequence
import contextlib
import functools
import itertools
from pathlib import Path
import statistics
import sys
import tempfile
from typing import Any

from benchmarks import runs
from benchmarks import step_problem as problem

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
OURS = ('scan', 'remat')
"""Options of `steps_ours.load` that peers have not."""
DEVICES = {'cpu': 'cpu', 'gpu': 'cuda', 'cuda': 'cuda'}
"""What torch calls JAX's platforms; it has no others."""


def _precision(platform: str, compute: str) -> str:
  """Returns what products are computed in."""
  float32 = 'float32' if platform == 'cpu' else 'tf32'
  return float32 if compute == 'float32' else compute


def measure(
  options: Mapping[str, Any],
  peers: Mapping[str, str],
  *,
  repeats: int,
  seconds: float,
  phases: bool,
) -> dict[str, Any]:
  """Compares and times the programs of one step.

  Args:
    options: of `steps_ours.load`.
    peers: Pythons by name; empty ones are left out.
    repeats: steps of each program at most.
    seconds: after which no other round begins.
    phases: whether to time the phases of ours apart.

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
      left_out[name] = missing(name, python, row)
      if left_out[name]:
        continue
      shared = {k: v for k, v in options.items() if k not in OURS}
      given = {
        **shared,
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
    times = runs.alternate(turns, repeats, seconds)
    row |= dict(zip(workers, times, strict=False))
    row['machine'] = _machine(times[len(workers) :])
    row['first'] = firsts
    row['memory'] = {name: w.ask('memory') for name, w in workers.items()}
    if phases:
      row['until'] = ours.ask('phases', repeats, seconds)
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


def missing(name: str, python: str, row: Mapping[str, Any]) -> str:
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
