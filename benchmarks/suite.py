"""All benchmarks, one after the other, each as a process of its own.

  python -m benchmarks.suite --quick --out=FILE \
    --fusion_bench_python=$(which python) --mergekit_python=$(which python) \
    --pool=POOL

A benchmark that lacks what it compares with, or a pool, is left out and said
so. Exits with 1 where one failed, once all have run; `python -m
benchmarks.tables FILE` makes tables of what they wrote.
"""

from collections.abc import Mapping, Sequence
import os
import subprocess
import sys
import time
from typing import NamedTuple

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.runs import ROOT

_QUICK = flags.DEFINE_bool('quick', False, 'each under five minutes')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')
_POOL = flags.DEFINE_string('pool', '', 'folder of a pool')
_FUSION_BENCH = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench'
)
_MERGEKIT = flags.DEFINE_string(
  'mergekit_python', '', 'a Python that has mergekit'
)
_ONLY = flags.DEFINE_list('only', '', 'names of benchmarks; empty: all')


class Benchmark(NamedTuple):
  """A command of this folder.

  Attributes:
    takes: flags of this command that are passed on where they are given.
    needs: those without which there is nothing to run.
    any_of: those one of which it needs.
    argv: what else it gets.
  """

  takes: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  any_of: tuple[str, ...] = ()
  argv: tuple[str, ...] = ()


PEERS = ('fusion_bench_python', 'mergekit_python')
BENCHMARKS = {
  'parity': Benchmark(takes=PEERS, any_of=PEERS),
  'bench_merge': Benchmark(takes=PEERS, argv=('--methods=all',)),
  # It may run without a peer's Python, and may not know that flag.
  'bench_meta_step': Benchmark(
    takes=PEERS[:1], argv=('--undefok=quick,out,fusion_bench_python',)
  ),
  'bench_scaling': Benchmark(),
  'bench_checkpoint': Benchmark(),
  'bench_security': Benchmark(
    takes=('pool', 'fusion_bench_python'),
    needs=('pool', 'fusion_bench_python'),
  ),
}
"""By name, in the order in which they run."""


class Outcome(NamedTuple):
  """What came of a benchmark.

  Attributes:
    name: of it.
    said: 'passed', 'FAILED' or 'left out', and why.
    seconds: that it took.
  """

  name: str
  said: str
  seconds: float = 0.0


def missing(benchmark: Benchmark, given: Mapping[str, str]) -> str:
  """Says what a benchmark lacks; empty if nothing."""
  lacking = [name for name in benchmark.needs if not given.get(name)]
  if lacking:
    return f'without --{" and --".join(lacking)}'
  if benchmark.any_of and not any(given.get(x) for x in benchmark.any_of):
    return f'without --{" or --".join(benchmark.any_of)}'
  return ''


def command(
  name: str, benchmark: Benchmark, given: Mapping[str, str], quick: bool
) -> list[str]:
  """Returns the command of a benchmark, with the flags that are given."""
  passed = [x for x in ('out', *benchmark.takes) if given.get(x)]
  return [
    *(sys.executable, '-m', f'benchmarks.{name}'),
    *(['--quick'] if quick else []),
    *(f'--{x}={given[x]}' for x in passed),
    *benchmark.argv,
  ]


def run(name: str, argv: Sequence[str]) -> Outcome:
  """Runs a benchmark, which prints for itself."""
  begin = time.perf_counter()
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(argv, env=env, check=False)
  said = f'FAILED, exit code {done.returncode}' if done.returncode else 'passed'
  return Outcome(name, said, time.perf_counter() - begin)


def main(argv):
  """Runs what there is and prints what came of it."""
  del argv
  unknown = sorted({*_ONLY.value} - {*BENCHMARKS})
  if unknown:
    raise app.UsageError(
      f'unknown: {", ".join(unknown)}; there are {", ".join(BENCHMARKS)}'
    )
  given = {
    'out': _OUT.value,
    'pool': _POOL.value,
    'fusion_bench_python': _FUSION_BENCH.value,
    'mergekit_python': _MERGEKIT.value,
  }
  console, outcomes = Console(), []
  for name in _ONLY.value or BENCHMARKS:
    benchmark = BENCHMARKS[name]
    if lacking := missing(benchmark, given):
      outcomes.append(Outcome(name, f'left out, {lacking}'))
      continue
    console.rule(name)
    outcomes.append(run(name, command(name, benchmark, given, _QUICK.value)))
  table = Table('benchmark', '', 'seconds')
  for outcome in outcomes:
    table.add_row(outcome.name, outcome.said, f'{outcome.seconds:.0f}')
  console.print(table)
  if any(outcome.said.startswith('FAILED') for outcome in outcomes):
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
