"""What benchmarks run: workers and commands that take turns.

Imports neither JAX nor torch: Linux counts the memory of a process that starts
another one to the peak of that other one.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
from pathlib import Path
import signal
import subprocess
import tempfile
import time
from typing import Any

from absl import flags

ROOT = Path(__file__).parents[1]
HOST = {'JAX_PLATFORMS': 'cpu'}
Run = Callable[[], dict[str, float]]


class Worker:
  """A process of `benchmarks.worker`; what it computes with is there once made.

  Attributes:
    about: what it said of itself.
    pid: of the process.
  """

  def __init__(
    self,
    python: str,
    program: str,
    options: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
  ):
    self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      [python, '-m', 'benchmarks.worker', program, json.dumps(options)],
      env={**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    self.pid = self._process.pid
    self.about = self._answer()

  def _answer(self) -> Any:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(self._end())
    return json.loads(line)

  def _end(self) -> str:
    """Says how a process ended that should not have."""
    code = self._process.wait()
    self._errors.seek(0)
    found = self._errors.read()[-4000:]
    if code == -signal.SIGKILL:
      found += 'killed, as a system without memory does'
    return f'a worker ended with {code}:\n{found}'

  def ask(self, *request: Any) -> Any:
    """Sends a request and waits for its answer.

    Raises:
      RuntimeError: where the process ends instead, with what it wrote.
    """
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      raise RuntimeError(self._end()) from None
    return self._answer()

  def load(self, options: Mapping[str, Any]) -> None:
    """Has the process compute something else."""
    self.about = self.ask('load', options)

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *error: Any) -> None:
    self._process.communicate()
    self._errors.close()


def set_defaults(**values: Any) -> None:
  """Sets flags that the command line does not set."""
  for name, value in values.items():
    flag = flags.FLAGS[name]
    if flag.using_default_value:
      flag.value = value


def alternate(
  runs: Sequence[Run], repeats: int, seconds: float
) -> list[list[dict[str, float]]]:
  """Calls functions in turn, once at least.

  Args:
    runs: each returns what it measured.
    repeats: how often to call each.
    seconds: after which no other round begins.

  Returns:
    For each function what its calls returned.
  """
  found: list[list[dict[str, float]]] = [[] for _ in runs]
  begin = time.perf_counter()
  for i in range(repeats):
    if i and time.perf_counter() - begin > seconds:
      break
    for run, into in zip(runs, found, strict=True):
      into.append(run())
  return found


def check_module(
  name: str, python: str, module: str, *args: Any, cwd: Path | None = None
) -> None:
  """Runs a module of this folder in an environment of its own.

  Args:
    name: of the peer.
    python: that has it.
    module: to run.
    *args: of it.
    cwd: where to run it.

  Raises:
    RuntimeError: where it fails, with the end of what it printed.
  """
  done = subprocess.run(
    [python, '-m', f'benchmarks.{module}', *map(str, args)],
    cwd=cwd,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f'{name} failed in {python}:\n{done.stdout[-4000:]}')


def run_command(argv: Sequence[str], log: Path) -> dict[str, float]:
  """Runs a command; returns its wall and CPU seconds and peak of memory."""
  with log.open('w') as file:
    begin = time.perf_counter()
    process = subprocess.Popen(
      argv,
      env={**os.environ, 'PYTHONPATH': str(ROOT), **HOST},
      stdout=file,
      stderr=subprocess.STDOUT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f'{argv} failed:\n{log.read_text()[-4000:]}')
  return {
    'seconds': seconds,
    'cpu': usage.ru_utime + usage.ru_stime,
    'peak': 1024 * usage.ru_maxrss,
  }
