"""Steps of a learned merge in PyTorch, for `benchmarks.worker`.

What someone who knows torch well would write: parameters in one flat vector,
groups of leaves of one size merged at once, one forward pass for the images of
all tasks through `functional_call`, everything compiled by inductor, Adam of
one kernel. AdaMerging, Concrete and the two-mask step of `dam_paper`, one
coefficient a task and leaf.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.metadata
import itertools
import math
import os
from pathlib import Path
import shutil
import time
from typing import Any, NamedTuple

from safetensors.torch import load_file
import torch
from torch import Tensor
from torch.func import functional_call
import torch.nn.functional as F
from transformers import CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from benchmarks import step_problem as problem
from benchmarks.worker import Job

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
INIT = 0.3
RADIUS = 8 / 255


class Mask(NamedTuple):
  """Of `dam_jax.masks.Mask`: where logits start, what they are multiplied by.

  Attributes:
    init: the initial logit.
    mean: whether to divide by each leaf's mean.
    lr: of Adam.
  """

  init: float
  mean: bool
  lr: float


MASKS = {
  'adamerging_layer_wise': {},
  'concrete_layer_wise': {'shared': Mask(0.0, True, 1e-3)},
  'dam_paper': {
    'shared': Mask(0.0, True, 1e-2),
    'safety': Mask(3.0, False, 1e-2),
  },
}
PHASES = {'adamerging_layer_wise': 1, 'concrete_layer_wise': 2, 'dam_paper': 4}
"""Draws of images that a step reads."""


class _Group(NamedTuple):
  """Leaves of one size, which lie side by side."""

  begin: int
  first: int
  num: int
  size: int


def _groups(sizes: Sequence[int]) -> list[_Group]:
  found, begin, first = [], 0, 0
  for size, same in itertools.groupby(sizes):
    num = len(list(same))
    found.append(_Group(begin, first, num, size))
    begin, first = begin + num * size, first + num
  return found


class Model:
  """A base, its task vectors and the functions of a merged model.

  Attributes:
    names: of the parameters, the smallest first.
    base: `[P]`.
    deltas: `[K, P]`.
  """

  def __init__(self, model: str, num: int, compute: str, device: str):
    shapes = problem.shapes(model)
    self.names = sorted(shapes, key=lambda name: math.prod(shapes[name]))
    self._shapes = [shapes[name] for name in self.names]
    self._sizes = [math.prod(shape) for shape in self._shapes]
    self._groups = _groups(self._sizes)
    total = sum(self._sizes)
    self.base = torch.empty(total)
    self.deltas = torch.empty(num, total)
    parts = zip(
      self.names,
      self._shapes,
      self.base.split(self._sizes),
      self.deltas.split(self._sizes, dim=1),
      strict=True,
    )
    for name, shape, base, deltas in parts:
      leaf, experts = problem.leaf(name, shape, num)
      base.copy_(torch.from_numpy(leaf.reshape(-1)))
      deltas.copy_(torch.from_numpy((experts - leaf).reshape(num, -1)))
    self.base, self.deltas = self.base.to(device), self.deltas.to(device)
    self.heads = torch.from_numpy(problem.heads(model, num)).to(device)
    with torch.device('meta'):
      config = CLIPVisionConfig(**problem.SIZES[model])
      self._tower = CLIPVisionModelWithProjection(config).eval()
    tokens = torch.arange(problem.tokens(model), device=device)[None]
    self._buffers = {'vision_model.embeddings.position_ids': tokens}
    self._mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    self._std = torch.tensor(STD, device=device).view(3, 1, 1)
    self._compute, self._device = getattr(torch, compute), device

  def merge(
    self, w: Tensor, values: Sequence[Tensor], means: Sequence[bool]
  ) -> Tensor:
    """Returns the merged model `[P]`.

    Args:
      w: coefficients, `[K, leaves]`.
      values: of the masks, `[P]` each.
      means: whether each is divided by the means of its leaves.
    """
    parts = []
    for begin, first, num, size in self._groups:
      at = slice(begin, begin + num * size)
      scale = w[:, first : first + num, None]
      deltas = self.deltas[:, at].view(-1, num, size)
      terms = [s * d for s, d in zip(scale, deltas, strict=True)]
      total = functools.reduce(torch.add, terms)
      for value, mean in zip(values, means, strict=True):
        m = value[at].view(num, size)
        total = total * (m / m.mean(1, keepdim=True) if mean else m)
      parts.append(total.reshape(-1))
    return self.base + torch.cat(parts)

  def named(self, theta: Tensor) -> dict[str, Tensor]:
    """Returns the parameters by name, views of a flat vector."""
    parts = theta.split(self._sizes)
    return {
      name: part.view(shape)
      for name, part, shape in zip(self.names, parts, self._shapes, strict=True)
    }

  def logits(self, theta: Tensor, images: Tensor) -> Tensor:
    """Maps images `[T, B, 3, H, W]` in [0, 1] to logits `[T, B, L]`."""
    pixels = ((images - self._mean) / self._std).flatten(0, 1)
    state = {**self.named(theta), **self._buffers}
    with torch.autocast(
      self._device, self._compute, enabled=self._compute != torch.float32
    ):
      out = functional_call(self._tower, state, (pixels,))
    features = F.normalize(out.image_embeds.float(), dim=-1)
    features = features.view(*images.shape[:2], -1)
    return 100 * torch.einsum('tbd,tdl->tbl', features, self.heads)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
  """Draws from the relaxed Bernoulli of temperature 0.5."""
  eps = torch.finfo(torch.float32).eps
  noise = torch.logit(uniform.clamp(eps, 1 - eps))
  return torch.sigmoid((noise + logits) / 0.5)


def entropy(logits: Tensor) -> Tensor:
  """Returns the mean entropy of predictions, `[T]`."""
  p = torch.softmax(logits, -1)
  return -(p * torch.log(p + 1e-8)).sum(-1).mean(-1)


def _adam(parameter: Tensor, lr: float) -> torch.optim.Optimizer:
  return torch.optim.Adam([parameter], lr=lr, fused=True)


class Stepper:
  """A method's compiled functions, its state, and its step."""

  def __init__(
    self,
    model: Model,
    method: str,
    compile_fn: Callable[[Callable], Callable],
    shape: Sequence[int],
  ):
    self.model, self.method, self._shape = model, method, shape
    self.masks = MASKS[method]
    self._merge = compile_fn(self._merged)
    self._entropy = compile_fn(self._entropies)
    self._forward = compile_fn(model.logits)
    self._gain = compile_fn(self._gains)
    self._draw = compile_fn(torch.rand_like)
    self.reset()

  def reset(self) -> None:
    """Goes back to the state before the first step."""
    base, num = self.model.base, len(self.model.deltas)
    self.coefficients = torch.full(
      (num, len(self.model.names)),
      INIT,
      device=base.device,
      requires_grad=True,
    )
    if self.method == 'dam_paper':
      self.inner_tx = torch.optim.SGD([self.coefficients], lr=0.01)
    else:
      lr = 1.0 if self.masks else 1e-3
      self.inner_tx = _adam(self.coefficients, lr)
    self.logits = {
      name: torch.full_like(base, mask.init, requires_grad=True)
      for name, mask in self.masks.items()
    }
    self.mask_tx = {
      name: _adam(self.logits[name], mask.lr)
      for name, mask in self.masks.items()
    }
    shape = (num, *self._shape)
    self.delta = torch.zeros(shape, device=base.device, requires_grad=True)
    self.adversary_tx = _adam(self.delta, 1e-2)

  def _merged(self, w, logits, uniforms):
    values = [sample(x, u) for x, u in zip(logits, uniforms, strict=True)]
    means = [mask.mean for mask in self.masks.values()]
    return self.model.merge(w, values, means)

  def _entropies(self, theta, images):
    return entropy(self.model.logits(theta, images))

  def _gains(self, theta, images, delta, labels):
    perturbed = (images + delta[:, None]).clamp(0, 1)
    logits = self.model.logits(theta, perturbed)
    each = F.cross_entropy(
      logits.flatten(0, 1), labels.flatten(), reduction='none'
    )
    return -each.view(labels.shape).mean(-1)

  def step(
    self, images: Tensor, uniforms: Mapping[str, Tensor] | None = None
  ) -> dict[str, Tensor]:
    """Takes a step; returns its losses `[T]`.

    Args:
      images: `[S, T, B, 3, H, W]` in [0, 1].
      uniforms: what masks are drawn from, `[P]` each; None draws them.
    """
    draws = [
      self._draw(x) if uniforms is None else uniforms[name]
      for name, x in self.logits.items()
    ]
    losses = {}
    if self.method == 'adamerging_layer_wise':
      losses['coefficients/loss'] = self._inner(images[0], draws)
      return losses
    losses['inner/loss'] = self._inner(images[0], draws)
    if self.method == 'concrete_layer_wise':
      losses['clean/loss'] = self._move('shared', images[1], draws)
      return losses
    losses['perturbation/loss'] = self._ascend(images[1], draws)
    perturbed = (images[2] + self.delta.detach()[:, None]).clamp(0, 1)
    losses['safety/loss'] = self._move('safety', perturbed, draws)
    losses['clean/loss'] = self._move('shared', images[3], draws)
    return losses

  def _theta(self, draws, moved=None):
    w = self.coefficients if moved is None else self.coefficients.detach()
    logits = [
      x if name == moved else x.detach() for name, x in self.logits.items()
    ]
    return self._merge(w, logits, draws)

  def _inner(self, images, draws):
    """Moves the coefficients: adapts them to the masks, where there are any."""
    if self.method == 'dam_paper':
      self.coefficients.data.fill_(INIT)
    self.inner_tx.zero_grad()
    losses = self._entropy(self._theta(draws), images)
    losses.sum().backward()
    if self.masks:
      self.coefficients.data.fill_(INIT)
    self.inner_tx.step()
    return losses.detach()

  def _ascend(self, images, draws):
    """Moves the perturbations, where the merged model stays as it is."""
    with torch.no_grad():
      theta = self._theta(draws)
      labels = self._forward(theta, images).argmax(-1)
    self.adversary_tx.zero_grad()
    losses = self._gain(theta, images, self.delta, labels)
    losses.sum().backward()
    self.adversary_tx.step()
    self.delta.data.clamp_(-RADIUS, RADIUS)
    return losses.detach()

  def _move(self, name, images, draws):
    """Moves one mask."""
    self.mask_tx[name].zero_grad()
    losses = self._entropy(self._theta(draws, name), images)
    losses.sum().backward()
    self.mask_tx[name].step()
    return losses.detach()

  def check(self, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns losses, summed over tasks, and gradients of the first step."""
    found = {name: float(x.sum()) for name, x in losses.items()}

    def moment(tx, parameter):
      return tx.state[parameter].get('exp_avg')

    for name, tx in self.mask_tx.items():
      norm = moment(tx, self.logits[name]).norm()
      found[f'{name}/gradient'] = float(norm)
    if self.method == 'dam_paper':
      norm = moment(self.adversary_tx, self.delta).norm()
      found['perturbation/gradient'] = float(norm)
    moved = moment(self.inner_tx, self.coefficients)
    if moved is None:
      moved = self.coefficients.detach() - INIT
    columns = moved.T.tolist()
    found['coefficients'] = dict(zip(self.model.names, columns, strict=True))
    return found


def _compiles() -> bool:
  """Whether there is a compiler of C++, without which inductor does nothing."""
  names = (os.environ.get('CXX', 'g++'), 'clang++')
  return any(map(shutil.which, names))


def configure(threads: int, device: str) -> None:
  """Sets threads, and how float32 is multiplied: on a GPU as JAX does it."""
  torch.set_num_threads(threads)
  if device == 'cuda':
    torch.set_float32_matmul_precision('high')


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
  """Makes a problem and compiles a step by taking one.

  Args:
    model: one of `step_problem.SIZES`.
    method: one of `MASKS`.
    num: of experts and tasks.
    batch: images a task and draw.
    compute: dtype of the forward and backward passes; all else is float32.
    threads: of torch.
    device: 'cpu' or 'cuda'.
    draws: folder with what the masks of the first step are drawn from.

  Returns:
    The step.
  """
  configure(threads, device)
  compiles, side = _compiles(), problem.SIZES[model]['image_size']
  merged = Model(model, num, compute, device)
  compile_fn = functools.partial(torch.compile, fullgraph=True, dynamic=False)
  stepper = Stepper(
    merged, method, compile_fn if compiles else _as_is, (3, side, side)
  )

  def draw(step):
    x = problem.images(model, PHASES[method], num, batch, step)
    return torch.from_numpy(x).permute(0, 1, 2, 5, 3, 4).contiguous().to(device)

  def run(given):
    losses = stepper.step(*given)
    if device == 'cuda':
      torch.cuda.synchronize()
    return losses

  first, uniforms = draw(0), {}
  for name in MASKS[method]:
    leaves = load_file(Path(draws) / f'{name}.safetensors')
    flat = torch.cat([leaves[key].reshape(-1) for key in merged.names])
    uniforms[name] = flat.to(device)
  begin = time.perf_counter()
  run((first,))
  seconds = time.perf_counter() - begin
  stepper.reset()
  later = ((draw(step),) for step in itertools.count(1))
  steps = itertools.chain([(first, uniforms)], later)
  return Job(
    prepare=lambda: next(steps),
    run=run,
    about={
      'threads': torch.get_num_threads(),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('torch', 'transformers')
      },
      'compile': seconds if compiles else None,
      'precision': torch.get_float32_matmul_precision(),
    },
    requests={
      'check': stepper.check,
      'machine': functools.partial(_machine, compute, device),
      'memory': functools.partial(device_memory, device),
    },
  )


def _as_is(fn: Callable) -> Callable:
  return fn


def _machine(compute: str, device: str, result: Any) -> dict[str, float]:
  """Measures operations and bytes a second of a product and of a copy."""
  del result
  rows, inputs, outputs = problem.PRODUCT
  # A chip takes microseconds for one, less than it takes to ask it to.
  num = 1 if device == 'cpu' else 200
  x = torch.randn(rows, inputs, device=device, dtype=getattr(torch, compute))
  weights = torch.randn(inputs, outputs, device=device, dtype=x.dtype) / 100
  entries = torch.ones(problem.COPIED, device=device)

  def products(x):
    for _ in range(num):
      x = torch.relu(x @ weights) @ weights.T

  def timed(fn, *args):
    fn(*args)
    if device == 'cuda':
      torch.cuda.synchronize()
    begin = time.perf_counter()
    fn(*args)
    if device == 'cuda':
      torch.cuda.synchronize()
    return time.perf_counter() - begin

  product, copy = timed(products, x), timed(entries.add_, 1)
  return {
    'flops': 4 * num * rows * inputs * outputs / product,
    'bytes': 8 * problem.COPIED / copy,
  }


def device_memory(device: str, result: Any) -> int | None:
  """Returns the peak of an accelerator's memory in bytes."""
  del result
  return torch.cuda.max_memory_allocated() if device == 'cuda' else None
