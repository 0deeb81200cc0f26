"""mergekit's merges of files held in memory, for `benchmarks.worker`."""

from collections.abc import Mapping
import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_files
from benchmarks import peer_mergekit
from benchmarks.worker import Job


def load(
  *,
  folder: str,
  method: str,
  options: Mapping[str, Any],
  inputs: str,
  num: int,
  threads: int,
) -> Job:
  """Reads a base and its experts."""
  torch.set_num_threads(threads)
  job = peer_files.Job(Path(folder), method, dict(options), inputs, '', num)
  held = job.base, job.experts
  return Job(
    prepare=lambda: held,
    run=lambda _: peer_mergekit.merge(job),
    about={
      'threads': torch.get_num_threads(),
      'versions': {
        name: importlib.metadata.version(name) for name in ('mergekit', 'torch')
      },
    },
    requests={'save': peer_files.save},
  )
