"""A process that holds models and merges them when asked over a pipe.

  python -m benchmarks.merge_worker PROGRAM FOLDER METHOD FORM NUM THREADS

`PROGRAM` is a module of this folder. Its `load` takes the other arguments,
reads `base.safetensors` and the first `NUM` experts, and returns a `Merge`.
Requests and answers are lines of JSON; what a program prints goes to the
standard error.
"""

from collections.abc import Callable
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


class Merge(NamedTuple):
  """A merge whose models are there.

  Attributes:
    prepare: returns what `run` takes; not timed.
    run: merges, and waits until it is done.
    about: what is computed with, JSON values.
    save: of a peer, writes what `run` returned to a safetensors file.
    difference: of ours, `|ours - peer| / max|peer|` of what `run` returned and
      such a file, the largest of any leaf.
  """

  prepare: Callable[[], Any]
  run: Callable[[Any], Any]
  about: dict[str, Any]
  save: Callable[[Any, Path], None] | None = None
  difference: Callable[[Any, Path], float] | None = None


def expert_paths(folder: Path, num: int) -> list[Path]:
  """Returns the files of the first experts."""
  return [folder / f'expert_{k}.safetensors' for k in range(num)]


def _memory(field: str) -> int:
  """Returns bytes of this process as Linux counts them."""
  status = Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', status)[1])


def measure(merge: Merge, given: Any) -> tuple[dict[str, float], Any]:
  """Merges what was prepared; returns wall and CPU seconds, and the result."""
  cpu, wall = time.process_time(), time.perf_counter()
  result = merge.run(given)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return {'seconds': wall, 'cpu': cpu}, result


def measure_first(merge: Merge, given: Any) -> tuple[dict[str, float], Any]:
  """The same of a process's first merge, and bytes held beyond its inputs."""
  # What was freed must not look held, nor the peak of what was before.
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  Path('/proc/self/clear_refs').write_text('5')
  held = _memory('VmRSS')
  found, result = measure(merge, given)
  return {**found, 'peak': _memory('VmHWM') - held}, result


def load(folder: Path, method: str, form: str, num: int, threads: int) -> Merge:
  """Makes a copy of a model's size in place of a merge: the machine's speed.

  Of float32, in blocks, by NumPy. `num` counts entries; there are no files.
  """
  del folder, method, form
  source, target = np.ones(num, np.float32), np.zeros(num, np.float32)
  begins = np.array_split(np.arange(0, num, _BLOCK), threads)
  pool = concurrent.futures.ThreadPoolExecutor(threads)

  def copy(begins):
    for i in begins:
      target[i : i + _BLOCK] = source[i : i + _BLOCK]

  return Merge(
    prepare=lambda: begins,
    run=lambda begins: list(pool.map(copy, begins)),
    about={'threads': threads},
  )


def main(argv: list[str]) -> None:
  """Answers requests until there are no more."""
  program, folder, method, form, num, threads = argv
  # Peers print; what is not an answer must not look like one.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  module = importlib.import_module(f'benchmarks.{program}')
  merge = module.load(Path(folder), method, form, int(num), int(threads))
  result = None
  answers.write(json.dumps(merge.about) + '\n')
  answers.flush()
  for line in sys.stdin:
    request, *args = json.loads(line)
    if request in ('first', 'run'):
      result = None  # before the next one is there
      run = {'first': measure_first, 'run': measure}[request]
      answer, result = run(merge, merge.prepare())
    else:
      answer = getattr(merge, request)(result, *map(Path, args))
    answers.write(json.dumps(answer) + '\n')
    answers.flush()


if __name__ == '__main__':
  main(sys.argv[1:])
