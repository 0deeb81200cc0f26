"""FusionBench's Defense-Aware Merging on a pool's files.

  python -m benchmarks.security_fusion_bench POOL JOB

in FusionBench's own environment, which needs neither JAX nor dam_jax. JOB is a
JSON file {'experts': name of a checkpoint by task, 'steps',
'coefficient_steps', 'seed', 'out'}; the merged model is written to the
safetensors file `out`.

The algorithm is the package's, with its published options. As released it
stops on an undefined `config`, then on an argument that its merged model does
not take, and its perturbations have 224 x 224 pixels. These three are mended
from outside.
"""

from collections.abc import Iterator
import contextlib
import functools
import json
from pathlib import Path
import sys
import time
from unittest import mock

from fusion_bench.method.concrete_subspace import clip_safe_concrete_adamerging
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.data import InfiniteDataLoader
import numpy as np
from omegaconf import OmegaConf
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset
from transformers import CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
OPTIONS = {
  'optimizer': 'adam',
  'lr': 1e-3,
  'base_lr': 1,
  'adamerging_lr': 1e-3,
  'scaling_factor': 0.3,
  'initial_logits': 0,
  'temperature': 0.5,
  'adv_lr': 1e-4,
  'adv_weight': 0.1,
  'eval_mask_type': 'continuous',
  'mask_checkpoint': None,
  'clamp_weights': False,
  'tie_weights': True,
  'strict': False,
}
"""Of `clip_safe_concrete_layer_wise_adamerging.yaml`."""


class Released(
  clip_safe_concrete_adamerging.ConcreteSafeLayerWiseAdaMergingForCLIP
):
  """The released class, with a pool's images and heads for those of the hub."""

  def __init__(self, config, pool: Path, projection: torch.Tensor):
    super().__init__(config)
    self._pool, self._projection = pool, projection
    self._iterators: dict[str, Iterator] = {}

  def setup_models(self):
    module, mask_model = super().setup_models()
    size = module.pretrained_model.config.image_size
    shape = (len(self.modelpool.model_names), 3, size, size)
    self.pertubed_model.perturbed_input = nn.Parameter(torch.zeros(shape))
    return module, mask_model

  def _task(self, task: str) -> dict[str, np.ndarray]:
    with np.load(self._pool / 'tasks' / f'{task}.npz') as file:
      return {name: file[name] for name in ('dev_images', 'head')}

  def setup_zero_shot_classification_head(self):
    self.visual_projection = nn.Linear(
      *self._projection.shape[::-1], bias=False
    )
    self.visual_projection.weight.data = self._projection
    self.visual_projection.requires_grad_(False)
    self.logit_scale_exp = torch.tensor(100.0)
    for task in self.modelpool.model_names:
      head = torch.from_numpy(self._task(task)['head'])
      self.zeroshot_weights[task] = head.T.contiguous()

  def get_shuffled_test_loader_iter(self, task: str):
    if task not in self._iterators:
      images = torch.from_numpy(self._task(task)['dev_images']).float() / 255
      pixels = (images - torch.tensor(MEAN)) / torch.tensor(STD)
      pixels = pixels.permute(0, 3, 1, 2).contiguous()
      # The released class never hands its batch size on: batches are of one.
      loader = DataLoader(TensorDataset(pixels), shuffle=True)
      self._iterators[task] = iter(InfiniteDataLoader(loader))
    return self._iterators[task]

  def log_hyperparams(self, *args, **kwargs):
    """Logs nothing: there is no logger."""

  def print_profile_summary(self, title=None):
    """Prints nothing; the released class would in every step."""


def _without_dtype(merged_model, *args, layer_vector_dtype, **options):
  assert layer_vector_dtype is None
  return merged_model(*args, **options)


@contextlib.contextmanager
def mended() -> Iterator[None]:
  """Lets the released class run, but for the size of its perturbations."""
  module = clip_safe_concrete_adamerging
  merged_model = functools.partial(_without_dtype, module.LayerWiseMergedModel)
  with (
    mock.patch.object(module, 'config', {}, create=True),
    mock.patch.object(module, 'LayerWiseMergedModel', merged_model),
  ):
    yield


def merge(pool: Path, job: dict) -> dict[str, torch.Tensor]:
  """Runs the algorithm and returns the merged model by Hugging Face's names."""
  folder = pool / 'checkpoints'
  config = CLIPVisionConfig.from_json_file(folder / 'config.json')

  def load(name: str):
    model = CLIPVisionModelWithProjection(config).float()
    state = load_file(folder / f'{name}.safetensors')
    model.load_state_dict({key: x.float() for key, x in state.items()})
    return model

  base = load('base')
  projection = base.visual_projection.weight.detach().clone()
  named = {'_pretrained_': 'base', **job['experts']}
  models = {task: load(name).vision_model for task, name in named.items()}
  torch.manual_seed(job['seed'])
  options = OmegaConf.create(
    OPTIONS
    | {
      'max_steps': job['steps'],
      'max_adamerging_steps': job['coefficient_steps'],
      'save_interval': sys.maxsize,
    }
  )
  with mended():
    merged = Released(options, pool, projection).run(BaseModelPool(models))
  base.vision_model.load_state_dict(merged.state_dict())
  return base.state_dict()


def main() -> None:
  pool, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
  begin = time.perf_counter()
  merged = merge(pool, job)
  seconds = time.perf_counter() - begin
  merged = {name: x.detach().contiguous() for name, x in merged.items()}
  save_file(merged, job['out'], {'seconds': f'{seconds:.1f}'})


if __name__ == '__main__':
  main()
