"""Workers, commands that take turns, and what is written of them."""

import os
import signal
import sys

import pytest

from benchmarks import records
from benchmarks import runs


def test_a_worker_answers_and_says_what_failed():
  with runs.Worker(
    sys.executable, 'worker', {'size': 1000, 'threads': 1}
  ) as worker:
    assert worker.about == {'threads': 1}
    assert worker.ask('run')['seconds'] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
      worker.ask('nonsense')


def test_a_worker_that_is_killed_is_said_to_be():
  with runs.Worker(
    sys.executable, 'worker', {'size': 1000, 'threads': 1}
  ) as worker:
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match='ended with -9(?s:.*)memory'):
      worker.ask('run')


def test_runs_take_turns_until_time_is_up():
  calls = []
  turns = [lambda i=i: calls.append(i) or {'seconds': i} for i in range(2)]
  found = runs.alternate(turns, 3, 60)
  assert calls == [0, 1] * 3
  assert found == [[{'seconds': i}] * 3 for i in range(2)]
  assert [len(x) for x in runs.alternate(turns, 3, 0)] == [1, 1]


def test_a_command_is_measured_or_its_error_shown(tmp_path):
  log = tmp_path / 'log'
  found = runs.run_command([sys.executable, '-c', 'sum(range(10 ** 6))'], log)
  assert set(found) == {'seconds', 'cpu', 'peak'}
  assert min(found.values()) > 0
  wrong = [sys.executable, '-c', 'raise ValueError("so it is")']
  with pytest.raises(RuntimeError, match='Error: so it is'):
    runs.run_command(wrong, log)


def test_rows_say_what_they_were_measured_on(tmp_path):
  path = str(tmp_path / 'out.jsonl')
  records.append('', 'merge', [{'seconds': 1.0}])
  records.append(path, 'merge', [{'seconds': 1.0}, {'seconds': 2.0}], threads=2)
  records.append(path, 'step', [{'seconds': 3.0}])
  rows = records.read(path, 'merge')
  assert [row['seconds'] for row in rows] == [1.0, 2.0]
  for row in rows:
    assert row['threads'] == 2
    assert row['cores'] > 0
    assert row['processor']
  assert len(records.read(path)) == 3
