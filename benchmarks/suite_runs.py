"""Which benchmarks there are, and one run of them after the other."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
import os
import subprocess
import sys
import time
from typing import NamedTuple

from rich.console import Console

from benchmarks.runs import ROOT


class Benchmark(NamedTuple):
  """A command of this folder.

  Attributes:
    takes: flags of this command that are passed on where they are given.
    needs: those without which there is nothing to run.
    any_of: those one of which it needs.
    imports: packages that it needs and extra `bench` does not bring.
    argv: what else it gets.
  """

  takes: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  any_of: tuple[str, ...] = ()
  imports: tuple[str, ...] = ()
  argv: tuple[str, ...] = ()


PEERS = ('fusion_bench_python', 'mergekit_python')
BENCHMARKS = {
  'parity': Benchmark(takes=PEERS, any_of=PEERS),
  'clip_parity': Benchmark(
    takes=('torch_python', 'pool'), needs=('torch_python',)
  ),
  'bench_merge': Benchmark(takes=PEERS, argv=('--methods=all',)),
  'bench_meta_step': Benchmark(takes=('torch_python', *PEERS[:1])),
  'bench_scaling': Benchmark(),
  'bench_checkpoint': Benchmark(),
  'bench_input': Benchmark(imports=('grain', 'tensorflow_datasets')),
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
  absent = [x for x in benchmark.imports if find_spec(x) is None]
  return f'without {" and ".join(absent)}, see extra data' if absent else ''


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


def run_all(
  names: Sequence[str],
  given: Mapping[str, str],
  quick: bool,
  console: Console,
) -> Iterator[Outcome]:
  """Runs benchmarks, or says what keeps one from running.

  Args:
    names: of them.
    given: values of flags, empty where one is not given.
    quick: whether each is to be short.
    console: to say which one begins.
  """
  for name in names:
    benchmark = BENCHMARKS[name]
    if lacking := missing(benchmark, given):
      yield Outcome(name, f'left out, {lacking}')
      continue
    console.rule(name)
    yield run(name, command(name, benchmark, given, quick))
