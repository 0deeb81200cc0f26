"""A process that holds models and computes with them when asked over a pipe.

  python -m benchmarks.worker PROGRAM OPTIONS

`PROGRAM` is a module of this folder. Its `load` takes the options, which are
JSON, and returns a `Job`; so does the request 'load', in the place of the job
that is there. Requests and answers are lines of JSON; what a program prints
goes to the standard error.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import ctypes
import gc
import importlib
import json
import os
from pathlib import Path
import re
import sys
import time
from typing import Any, NamedTuple

import numpy as np

_BLOCK = 1 << 20


class Job(NamedTuple):
  """What a program computes; its inputs are there.

  Attributes:
    prepare: returns what `run` takes; not timed.
    run: computes, and waits until it is done.
    about: what is computed with, JSON values.
    requests: other functions by name, of what `run` returned and of arguments
      that are JSON.
  """

  prepare: Callable[[], Any]
  run: Callable[[Any], Any]
  about: dict[str, Any]
  requests: Mapping[str, Callable[..., Any]] = {}


def _memory(field: str) -> int:
  """Returns bytes of this process as Linux counts them."""
  status = Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', status)[1])


def measure(job: Job, given: Any) -> tuple[dict[str, float], Any]:
  """Runs what was prepared; returns wall and CPU seconds, and the result."""
  cpu, wall = time.process_time(), time.perf_counter()
  result = job.run(given)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return {'seconds': wall, 'cpu': cpu}, result


def measure_first(job: Job, given: Any) -> tuple[dict[str, float], Any]:
  """The same of a process's first run, with bytes of memory.

  `held` are those before it, its inputs among them, `peak` those beyond.
  """
  # What was freed must not look held, nor the peak of what was before.
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  Path('/proc/self/clear_refs').write_text('5')
  held = _memory('VmRSS')
  found, result = measure(job, given)
  return {**found, 'held': held, 'peak': _memory('VmHWM') - held}, result


def load(*, size: int, threads: int) -> Job:
  """Makes copies of float32 in blocks, by NumPy: the machine's speed at that.

  Args:
    size: entries to copy.
    threads: that share them.
  """
  source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
  begins = np.array_split(np.arange(0, size, _BLOCK), threads)
  pool = concurrent.futures.ThreadPoolExecutor(threads)

  def copy(begins):
    for i in begins:
      target[i : i + _BLOCK] = source[i : i + _BLOCK]

  return Job(
    prepare=lambda: begins,
    run=lambda begins: list(pool.map(copy, begins)),
    about={'threads': threads},
  )


def main(argv: list[str]) -> None:
  """Answers requests until there are no more."""
  program, options = argv
  # Peers print; what is not an answer must not look like one.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  module = importlib.import_module(f'benchmarks.{program}')
  job = module.load(**json.loads(options))
  result = None
  answers.write(json.dumps(job.about) + '\n')
  answers.flush()
  for line in sys.stdin:
    request, *args = json.loads(line)
    if request == 'load':
      job = result = None  # before the next one is there
      job = module.load(**args[0])
      answer = job.about
    elif request in ('first', 'run'):
      result = None  # before the next one is there
      run = {'first': measure_first, 'run': measure}[request]
      answer, result = run(job, job.prepare())
    else:
      answer = job.requests[request](result, *args)
    answers.write(json.dumps(answer) + '\n')
    answers.flush()


if __name__ == '__main__':
  main(sys.argv[1:])
