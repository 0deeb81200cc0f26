"""Merges in NumPy of files held in memory, for `benchmarks.worker`.

What one would write without a library: a sum over models, leaf by leaf.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from benchmarks.merge_runs import expert_paths
from benchmarks.worker import Job


def _average(base: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
  del base
  total = experts[0].copy()
  for x in experts[1:]:
    total += x
  total /= np.float32(len(experts))
  return total


def _task_arithmetic(
  base: np.ndarray, experts: list[np.ndarray], scale: float
) -> np.ndarray:
  total = experts[0] - base
  for x in experts[1:]:
    total += x - base
  total *= np.float32(scale)
  total += base
  return total


METHODS = {'average': _average, 'task_arithmetic': _task_arithmetic}


def load(
  *, folder: str, method: str, options: Mapping[str, Any], num: int
) -> Job:
  """Reads a base and its experts; NumPy uses one thread."""
  at = Path(folder)
  base = load_file(at / 'base.safetensors')
  experts = [load_file(path) for path in expert_paths(at, num)]

  def run(_):
    merge = METHODS[method]
    return {
      name: merge(x, [expert[name] for expert in experts], **options)
      for name, x in base.items()
    }

  return Job(
    prepare=lambda: None,
    run=run,
    about={'threads': 1, 'versions': {'numpy': np.__version__}},
    requests={'save': save_file},
  )
