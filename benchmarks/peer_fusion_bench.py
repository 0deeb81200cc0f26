"""Runs FusionBench's algorithms on given files.

Each `ALGORITHMS` class is run whole, on modules made of the files' tensors.
The others need data or a trained mask, or return more than one model: there
the function that merges is called with what the files give it.
"""

from collections.abc import Callable, Mapping
import copy
from typing import Any
from unittest import mock

from fusion_bench.method.dare.simple_average import DareSimpleAverage
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.emr_merging.emr_merging import EMRMerging
from fusion_bench.method.fisher_merging.fisher_merging import (
  merging_with_fisher_weights,
)
from fusion_bench.method.isotropic_merging.iso import ISO_C_Merge
from fusion_bench.method.isotropic_merging.iso import ISO_CTS_Merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.magmax.magmax import MagMaxAlgorithm
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.tall_mask import utils as tall_mask
from fusion_bench.method.task_arithmetic.task_arithmetic import (
  TaskArithmeticAlgorithm,
)
from fusion_bench.method.task_singular_vector.TSVM import (
  TaskSingularVectorMerging,
)
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.weighted_average.weighted_average import (
  WeightedAverageAlgorithm,
)
from fusion_bench.method.wudi.wudi import WUDIMerging
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils import state_dict_to_vector
from fusion_bench.utils import vector_to_state_dict
import torch
from torch import nn

from benchmarks import peer_files
from benchmarks.peer_files import Job
from benchmarks.peer_files import State

ALGORITHMS = {
  'simple_average': SimpleAverageAlgorithm,
  'weighted_average': WeightedAverageAlgorithm,
  'task_arithmetic': TaskArithmeticAlgorithm,
  'ties': TiesMergingAlgorithm,
  'dare_average': DareSimpleAverage,
  'dare_task_arithmetic': DareTaskArithmetic,
  'dare_ties': DareTiesMerging,
  'slerp': SlerpMergeAlgorithm,
  'model_stock': ModelStock,
  'magmax': MagMaxAlgorithm,
  'tsv_m': TaskSingularVectorMerging,
  'iso_c': ISO_C_Merge,
  'iso_cts': ISO_CTS_Merge,
  'wudi': WUDIMerging,
}


def module(state: State) -> nn.Module:
  """Makes a model of tensors: linear layers where they look like it."""
  root, layers = nn.Module(), {}
  for name, tensor in state.items():
    prefix, _, last = name.rpartition('.')
    layers.setdefault(prefix, {})[last] = nn.Parameter(tensor.clone())
  for prefix, params in layers.items():
    at = root
    for part in prefix.split('.')[:-1]:
      if not hasattr(at, part):
        at.add_module(part, nn.Module())
      at = getattr(at, part)
    weight = params.get('weight')
    linear = weight is not None and weight.ndim == 2 and 'embed' not in prefix
    layer = nn.Linear(1, 1, bias='bias' in params) if linear else nn.Module()
    for last, parameter in params.items():
      setattr(layer, last, parameter)
    at.add_module(prefix.split('.')[-1], layer)
  return root


def _models(job: Job) -> dict[str, nn.Module]:
  models = {f'expert_{k}': module(x) for k, x in enumerate(job.experts)}
  if job.inputs == 'base':
    models = {'_pretrained_': module(job.base), **models}
  return models


def run_algorithm(
  method: str, options: Mapping[str, Any], models: dict[str, nn.Module]
) -> State:
  """Runs an algorithm on modules, into one of which it may merge."""
  merged = ALGORITHMS[method](**options).run(BaseModelPool(models))
  return dict(merged.state_dict())


def _linear(model: nn.Module) -> list[str]:
  return [
    f'{name}.weight'
    for name, layer in model.named_modules()
    if isinstance(layer, nn.Linear)
  ]


def _algorithm(job: Job) -> State:
  model = module(job.base)
  names = [name for name, _ in model.named_parameters()]
  if job.options.get('only_on_linear_weights'):
    names = _linear(model)
  # FusionBench goes model by model, and draws for one leaf after the other.
  uniform = job.each('uniform')
  draws = [x[name] for x in uniform for name in names]
  with peer_files.given_draws(draws):
    return run_algorithm(job.method, job.options, _models(job))


def _vectors(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns the base `[P]` and the experts `[K, P]`."""
  experts = [state_dict_to_vector(x) for x in job.experts]
  return state_dict_to_vector(job.base), torch.stack(experts)


def _tall_masks(job: Job, scale: float) -> torch.Tensor:
  base, experts = _vectors(job)
  return tall_mask.generate_task_masks(
    experts - base, experts, base, tall_mask_lambda=scale
  )


def _stacked(job: Job, vectors: torch.Tensor) -> State:
  """Returns one model for each task, leaves `[K, ...]`."""
  each = [vector_to_state_dict(x, copy.deepcopy(job.base)) for x in vectors]
  return {name: torch.stack([x[name] for x in each]) for name in job.base}


def _tall(job: Job) -> State:
  base, experts = _vectors(job)
  masks = _tall_masks(job, job.options['tall_mask_lambda'])
  return _stacked(job, base + masks * (experts - base).sum(0))


def _consensus(job: Job) -> State:
  """The masks that a task's validation chose come from a file there."""
  base, experts = _vectors(job)
  masks = _tall_masks(job, job.options['tall_mask_lambda'])
  each = {
    str(k): vector_to_state_dict(mask.float(), copy.deepcopy(job.base))
    for k, mask in enumerate(masks)
  }
  with mock.patch.object(tall_mask, 'load_tall_mask', return_value=each):
    kept = tall_mask.construct_consensus_mask(
      job.base, job.options['prun_thre_k'], None
    )
  update = job.options['scaling_factor'] * (experts - base).sum(0)
  merged = base + kept * update
  return vector_to_state_dict(merged, copy.deepcopy(job.base))


def _emr(job: Job) -> State:
  merged = EMRMerging().run(BaseModelPool(_models(job)))
  models = []
  for task in merged.modulators:
    model = copy.deepcopy(merged)
    model.set_task(task)
    models.append(model.backbone.state_dict())
  return {name: torch.stack([x[name] for x in models]) for name in job.base}


def _knots(job: Job) -> State:
  """TIES of the aligned task vectors, layers one by one; others averaged.

  The package has the alignment only.
  """
  merged = {}
  linear = _linear(module(job.base))
  for name, base in job.base.items():
    deltas = [x[name] - base for x in job.experts]
    if name in linear:
      u, s, vhs = subspace_alignment(deltas)
      aligned = torch.stack([(s[:, None] * vh).reshape(-1) for vh in vhs])
      update = ties_merging(
        aligned, job.options['threshold'], job.options['merge_func']
      )
      update = u @ update.reshape(vhs[0].shape)
    else:
      update = torch.stack(deltas).mean(0)
    merged[name] = base + job.options['scaling_factor'] * update
  return merged


def _lists(job: Job) -> dict[str, list[torch.Tensor]]:
  return {name: [x[name] for x in job.experts] for name in job.base}


def _fisher(job: Job) -> State:
  num = len(job.experts)
  return merging_with_fisher_weights(
    _lists(job), job.each('fisher'), torch.ones(num) / num, **job.options
  )


def _regmean(job: Job) -> State:
  return merging_with_regmean_weights(
    _lists(job), job.each('gram'), **job.options
  )


FUNCTIONS: dict[str, Callable[[Job], State]] = {
  'tall_mask': _tall,
  'consensus': _consensus,
  'emr': _emr,
  'knots': _knots,
  'fisher': _fisher,
  'regmean': _regmean,
}


def merge(job: Job) -> State:
  return FUNCTIONS.get(job.method, _algorithm)(job)


if __name__ == '__main__':
  peer_files.run(merge, ('fusion-bench', 'transformers'))
