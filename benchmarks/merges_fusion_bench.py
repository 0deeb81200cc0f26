"""FusionBench's merges of files held in memory, for `benchmarks.worker`.

Its algorithms get modules that are there already, and may merge into one of
them: all are put back before each merge, which is not timed. What
`benchmarks.peer_fusion_bench` calls as a function makes its modules itself.
"""

from collections.abc import Mapping
import importlib.metadata
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
import torch

from benchmarks import peer_files
from benchmarks import peer_fusion_bench
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
  """Reads a base and its experts into modules."""
  torch.set_num_threads(threads)
  job = peer_files.Job(Path(folder), method, dict(options), inputs, '', num)
  if method in peer_fusion_bench.FUNCTIONS:
    held: Any = job.base, job.experts
    prepare, run = (lambda: held), (lambda _: peer_fusion_bench.merge(job))
  else:
    paths = [job.folder / 'base.safetensors'] if inputs == 'base' else []
    paths += job.paths
    models = {
      path.stem.replace('base', '_pretrained_'): peer_fusion_bench.module(
        load_file(path)
      )
      for path in paths
    }

    def prepare():
      for path, model in zip(paths, models.values(), strict=True):
        model.load_state_dict(load_file(path))
      return models

    def run(models):
      return peer_fusion_bench.run_algorithm(method, job.options, models)

  return Job(
    prepare=prepare,
    run=run,
    about={
      'threads': torch.get_num_threads(),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('fusion-bench', 'torch')
      },
    },
    requests={'save': peer_files.save},
  )
