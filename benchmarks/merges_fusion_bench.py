"""FusionBench's merges of files held in memory, for `benchmarks.worker`.

Its algorithms get modules that are there already, and merge into the first one
where they can; that is put back before each merge and not timed.
"""

import importlib.metadata
from pathlib import Path

from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.task_arithmetic.task_arithmetic import (
  TaskArithmeticAlgorithm,
)
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import nn

from benchmarks.merge_runs import expert_paths
from benchmarks.worker import Job

State = dict[str, torch.Tensor]


def _module(state: State) -> nn.Module:
  """Makes a module of tensors by their names."""
  root = nn.Module()
  for name, tensor in state.items():
    *above, last = name.split('.')
    at = root
    for part in above:
      if not hasattr(at, part):
        at.add_module(part, nn.Module())
      at = getattr(at, part)
    at.register_parameter(last, nn.Parameter(tensor))
  return root


def _average(base: nn.Module, experts: list[nn.Module]) -> State:
  del base
  return simple_average([expert.state_dict() for expert in experts])


def _run(algorithm, base: nn.Module, experts: list[nn.Module]) -> State:
  named = {str(k): expert for k, expert in enumerate(experts)}
  return algorithm.run({'_pretrained_': base, **named}).state_dict()


def _task_arithmetic(base: nn.Module, experts: list[nn.Module]) -> State:
  return _run(TaskArithmeticAlgorithm(scaling_factor=0.3), base, experts)


def _ties(base: nn.Module, experts: list[nn.Module]) -> State:
  algorithm = TiesMergingAlgorithm(
    scaling_factor=0.3, threshold=0.2, remove_keys=[], merge_func='mean'
  )
  return _run(algorithm, base, experts)


METHODS = {
  'average': _average,
  'task_arithmetic': _task_arithmetic,
  'ties': _ties,
}


def load(*, folder: str, method: str, form: str, num: int, threads: int) -> Job:
  """Reads a base and its experts into modules."""
  del form
  torch.set_num_threads(threads)

  def read(path):
    # Copied: a tensor of a file is a map of it.
    return {name: x.clone() for name, x in load_file(path).items()}

  path = Path(folder) / 'base.safetensors'
  start, base = load_file(path), _module(read(path))
  experts = [_module(read(path)) for path in expert_paths(Path(folder), num)]

  def prepare():
    base.load_state_dict(start)
    return base

  return Job(
    prepare=prepare,
    run=lambda base: METHODS[method](base, experts),
    about={
      'threads': torch.get_num_threads(),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('fusion-bench', 'torch')
      },
    },
    requests={'save': save_file},
  )
