"""The command that runs all benchmarks."""

import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks import runs
from benchmarks import suite_runs
from benchmarks.suite_runs import Benchmark
from benchmarks.suite_runs import Outcome


@pytest.fixture
def started(monkeypatch):
  """Commands that would be started, each of which passes."""
  found = []

  def pretend(name, argv):
    found.append(argv)
    return Outcome(name, 'passed', 1.0)

  monkeypatch.setattr(suite_runs, 'run', pretend)
  return found


def run_all(given, quick=False):
  names = list(suite_runs.BENCHMARKS)
  console = Console(quiet=True)
  return list(suite_runs.run_all(names, given, quick, console))


def test_flags_are_passed_on_where_they_are_taken(started, monkeypatch):
  benchmarks = {
    'one': Benchmark(takes=('pool',), argv=('--methods=all',)),
    'two': Benchmark(),
  }
  monkeypatch.setattr(suite_runs, 'BENCHMARKS', benchmarks)
  run_all({'out': 'rows.jsonl', 'pool': 'P'}, quick=True)
  one, two = started
  assert one[1:] == [
    *('-m', 'benchmarks.one', '--quick', '--out=rows.jsonl', '--pool=P'),
    '--methods=all',
  ]
  assert two[1:] == ['-m', 'benchmarks.two', '--quick', '--out=rows.jsonl']


def test_what_lacks_something_is_left_out_and_said(started):
  outcomes = run_all({'out': '', 'pool': 'P'})
  names = [argv[2].removeprefix('benchmarks.') for argv in started]
  left_out = {o.name: o.said for o in outcomes if o.said != 'passed'}
  assert left_out == {
    'clip_parity': 'left out, without --torch_python',
    'parity': 'left out, without --fusion_bench_python or --mergekit_python',
    'bench_security': 'left out, without --fusion_bench_python',
  }
  assert {*names, *left_out} == {*suite_runs.BENCHMARKS}


def test_what_lacks_a_package_is_left_out(started, monkeypatch):
  benchmarks = {'one': Benchmark(imports=('json', 'no_such_package'))}
  monkeypatch.setattr(suite_runs, 'BENCHMARKS', benchmarks)
  (outcome,) = run_all({})
  assert outcome.said == 'left out, without no_such_package, see extra data'
  assert not started


def test_every_benchmark_is_a_module():
  for name in suite_runs.BENCHMARKS:
    assert (runs.ROOT / 'benchmarks' / f'{name}.py').exists()


@pytest.mark.parametrize('code', [0, 3])
def test_a_process_passes_or_fails(code):
  argv = [sys.executable, '-c', f'raise SystemExit({code})']
  outcome = suite_runs.run('one', argv)
  assert outcome.said == ('FAILED, exit code 3' if code else 'passed')
  assert outcome.seconds > 0


def suite(*argv):
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks.suite', *argv],
    cwd=runs.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )


def test_command_says_what_came_of_each(tmp_path):
  done = suite('--only=bench_security')
  assert done.returncode == 0
  assert 'left out, without --pool and' in done.stdout
  # There is no such peer, which is an error once all have run.
  peer = f'--mergekit_python={tmp_path / "none"}'
  done = suite('--only=parity,bench_security', '--quick', peer)
  assert done.returncode == 1
  assert 'FAILED, exit code 1' in done.stdout
  assert 'left out' in done.stdout
