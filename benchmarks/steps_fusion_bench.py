"""FusionBench's learned merges, driven step by step, for `benchmarks.worker`.

Its classes run whole, in a thread of their own, with their published options.
Where the first task's images of a step are asked for, that thread waits, so
that a step is from there to there. What the released class of Defense-Aware
Merging needs to run at all is `benchmarks.security_fusion_bench`'s.
"""

from collections.abc import Iterator, Mapping
import functools
import importlib.metadata
import itertools
from pathlib import Path
import sys
import threading
from typing import Any
from unittest import mock

from fusion_bench.method.adamerging.clip_layer_wise_adamerging import (
  CLIPLayerWiseAdaMergingAlgorithm,
)
from fusion_bench.method.concrete_subspace import clip_concrete_adamerging
from fusion_bench.method.concrete_subspace import clip_safe_concrete_adamerging
from fusion_bench.modelpool import BaseModelPool
import numpy as np
from omegaconf import OmegaConf
from safetensors.torch import load_file
import torch
from torch import Tensor
from torch import nn
from transformers import CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from benchmarks import security_fusion_bench as security
from benchmarks import step_problem as problem
from benchmarks import steps_torch
from benchmarks.worker import Job

ADAMERGING = {
  'optimizer': 'adam',
  'lr': 1e-3,
  'init_values': 0.3,
  'weights': None,
  'clamp_weights': False,
  'tie_weights': True,
  'strict': False,
  'max_steps': sys.maxsize,
}
"""Of `adamerging/clip.yaml`, and as many steps as are asked for."""
SAFE = security.OPTIONS | {
  'max_steps': sys.maxsize,
  'save_interval': sys.maxsize,
}
"""Of the safe class, which the other one reads too."""
METHODS = {
  'adamerging_layer_wise': (
    CLIPLayerWiseAdaMergingAlgorithm,
    ADAMERGING,
    ('coefficients',),
  ),
  'concrete_layer_wise': (
    clip_concrete_adamerging.ConcreteLayerWiseAdaMergingForCLIP,
    SAFE,
    ('inner', 'masks'),
  ),
  'dam_released': (
    clip_safe_concrete_adamerging.ConcreteSafeLayerWiseAdaMergingForCLIP,
    SAFE,
    ('inner', 'perturbation', 'masks'),
  ),
}
"""Class, options, and phases, each of which reads one draw of images."""


class Gate:
  """Where the merge waits before each step.

  Attributes:
    images: of the step, `[S, T, B, 3, H, W]`, normalised.
  """

  def __init__(self, phases: int, num: int):
    self.images = torch.empty(0)
    self._lead, self._taken = (phases, num), 0
    self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
    self._ended = False

  def iterator(self, task: str) -> Iterator[tuple[Tensor]]:
    """Returns an iterator over the next batch of a task, and no more."""
    phases, num = self._lead
    if self._taken % (phases * num) == 0:
      self._done.release()
      self._go.acquire()
    draw = self._taken // num % phases
    self._taken += 1
    return iter([(self.images[draw, int(task)],)])

  def wait(self) -> None:
    """Waits until the merge wants images.

    Raises:
      RuntimeError: where it never will.
    """
    self._done.acquire()
    if self._ended:
      raise RuntimeError('the merge has ended, see above')

  def step(self, images: Tensor) -> None:
    """Takes a step."""
    self.images = images
    self._go.release()
    self.wait()

  def start(self, algorithm: Any, pool: BaseModelPool) -> None:
    """Begins a merge, up to its first step."""

    def run():
      try:
        with security.mended():
          algorithm.run(pool)
      finally:
        self._ended = True
        self._done.release()

    threading.Thread(target=run, daemon=True).start()
    self.wait()


class Record:
  """Losses and gradients of the first step, by phase.

  Attributes:
    module: that merges, once it is there.
    mask_model: the logits of the mask, likewise.
    phases: of a step.
    found: as `steps_ours` has them: of gradients a tenth, Adam's first moment.
  """

  def __init__(self, algorithm: Any, phases: tuple[str, ...], num: int):
    self.found: dict[str, Any] = {}
    self._algorithm, self._fabric = algorithm, algorithm.fabric
    self._backward = algorithm.fabric.backward
    calls = num if phases == ('coefficients',) else 1
    self.phases = phases
    self._next = iter([phase for phase in phases for _ in range(calls)])
    self.module = self.mask_model = None

  def backward(self, loss: Tensor, **options: Any) -> None:
    """Computes gradients, and writes down those of the first step."""
    self._backward(loss, **options)
    phase = next(self._next, None)
    if phase is None:
      self._fabric.backward = self._backward
      return
    total = self.found.get(f'{phase}/loss', 0.0) + float(loss)
    self.found[f'{phase}/loss'] = total
    if phase in ('coefficients', 'inner'):
      names = [
        name for name, _ in self.module.task_vectors[0].named_parameters()
      ]
      columns = (0.1 * self.module.merge_weight.grad).T.tolist()
      self.found['coefficients'] = {
        f'vision_model.{name}': column
        for name, column in zip(names, columns, strict=True)
      }
    elif phase == 'perturbation':
      grad = self._algorithm.pertubed_model.perturbed_input.grad
      self.found['perturbation/gradient'] = 0.1 * float(grad.norm())
    else:
      grads = [p.grad for p in self.mask_model.parameters()]
      norm = torch.stack([grad.norm() for grad in grads]).norm()
      self.found['shared/gradient'] = 0.1 * float(norm)


def _given_first(mask_model: nn.Module, uniforms: Mapping[str, Tensor]) -> None:
  """Draws the masks of the first step from given numbers."""
  sample = mask_model.sample_mask

  def first(*args, **options):
    mask_model.sample_mask = sample
    given = iter(
      [uniforms[f'vision_model.{n}'] for n, _ in mask_model.named_parameters()]
    )
    with mock.patch.object(torch, 'rand', side_effect=given):
      return sample(*args, **options)

  mask_model.sample_mask = first


def _models(model: str, num: int) -> list[nn.Module]:
  """Draws a base and its experts; what has its weights is on the CPU."""
  shapes = problem.shapes(model).items()
  leaves = {name: problem.leaf(name, shape, num) for name, shape in shapes}
  found = []
  for k in range(-1, num):
    config = CLIPVisionConfig(**problem.SIZES[model])
    tower = CLIPVisionModelWithProjection(config)
    tower.load_state_dict(
      {
        name: torch.from_numpy(base if k < 0 else experts[k])
        for name, (base, experts) in leaves.items()
      }
    )
    found.append(tower)
  return found


def _watch(
  algorithm: Any,
  record: Record,
  shape: tuple[int, ...],
  uniforms: Mapping[str, Tensor],
) -> None:
  """Lets the first step be recorded and, where it draws masks, be given them.

  Args:
    algorithm: to watch.
    record: that gets its modules.
    shape: of the perturbations; the released class has 224 x 224 pixels.
    uniforms: what masks are drawn from, by parameter.
  """
  if record.phases == ('coefficients',):
    construct = algorithm.construct_layer_wise_merged_model

    def construct_merged_model(pool):
      record.module = construct(pool)
      return record.module

    algorithm.construct_layer_wise_merged_model = construct_merged_model
    return
  setup = algorithm.setup_models

  def setup_models():
    record.module, record.mask_model = setup()
    _given_first(record.mask_model, uniforms)
    if 'perturbation' in record.phases:
      perturbed = nn.Parameter(torch.zeros(shape))
      algorithm.pertubed_model.perturbed_input = perturbed
    return record.module, record.mask_model

  algorithm.setup_models = setup_models


def _algorithm(
  method: str, model: str, num: int, compute: str, device: str
) -> Any:
  """Makes an algorithm that needs neither the hub, nor data, nor a logger."""
  make, options, _ = METHODS[method]
  fabric = {
    '_target_': 'lightning.Fabric',
    'accelerator': device,
    'devices': 1,
    'precision': 'bf16-mixed' if compute == 'bfloat16' else '32-true',
  }
  algorithm = make(OmegaConf.create({**options, 'fabric': fabric}))
  algorithm.log_hyperparams = lambda *args, **options: None
  algorithm.print_profile_summary = lambda *args: None
  heads = torch.from_numpy(problem.heads(model, num)).to(device)
  algorithm.zeroshot_weights = {
    str(t): head.T.contiguous() for t, head in enumerate(heads)
  }
  algorithm.logit_scale_exp = torch.tensor(100.0, device=device)
  algorithm.setup_zero_shot_classification_head = lambda: None
  return algorithm


def load(
  *,
  model: str,
  method: str,
  num: int,
  batch: int,
  compute: str,
  threads: int,
  device: str,
  draws: str,
) -> Job:
  """Begins a merge; see `steps_torch.load` for the arguments."""
  steps_torch.configure(threads, device)
  phases = METHODS[method][2]
  algorithm = _algorithm(method, model, num, compute, device)
  base, *experts = _models(model, num)
  projection = base.visual_projection.requires_grad_(False).to(device)
  algorithm.visual_projection = projection
  gate, record = Gate(len(phases), num), Record(algorithm, phases, num)
  algorithm.get_shuffled_test_loader_iter = gate.iterator
  algorithm.fabric.backward = record.backward
  uniforms, path = {}, Path(draws) / 'shared.safetensors'
  if 'masks' in phases:
    uniforms = load_file(path, device=device)
  side = problem.SIZES[model]['image_size']
  _watch(algorithm, record, (num, 3, side, side), uniforms)
  named = {str(k): expert.vision_model for k, expert in enumerate(experts)}
  pool = BaseModelPool({'_pretrained_': base.vision_model, **named})
  gate.start(algorithm, pool)

  def draw(step):
    x = problem.images(model, len(phases), num, batch, step)
    x = (x - np.float32(security.MEAN)) / np.float32(security.STD)
    return torch.from_numpy(x).permute(0, 1, 2, 5, 3, 4).contiguous().to(device)

  def run(images):
    gate.step(images)
    if device == 'cuda':
      torch.cuda.synchronize()

  steps = map(draw, itertools.count())
  return Job(
    prepare=lambda: next(steps),
    run=run,
    about={
      'threads': torch.get_num_threads(),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('fusion-bench', 'torch', 'transformers')
      },
      'compile': None,
    },
    requests={
      'check': lambda result: record.found,
      'memory': functools.partial(steps_torch.device_memory, device),
    },
  )
