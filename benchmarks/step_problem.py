"""The problem of `benchmarks.bench_meta_step`, the same for every program.

Random towers by Hugging Face's names, heads and images. Each is drawn from its
name and number, so that programs of different libraries compute with the same
bits and pass no files. Needs NumPy alone.
"""

import math
from typing import Any
import zlib

import numpy as np

from benchmarks import merge_runs

CLASSES = 100
"""Of each task."""
PRODUCT = (4800, 768, 3072)
"""Rows, inputs and outputs of the product that says how fast a machine is."""
COPIED = 1 << 26
"""Entries of float32 that say how fast it copies."""
PROJECTION = 'visual_projection.weight'
NOISE = 0.1
"""How far experts are from the base, by the deviation of its entries."""


def _sizes(width: int, layers: int, head: int, projection: int, *image: int):
  return {
    'hidden_size': width,
    'intermediate_size': 4 * width,
    'num_hidden_layers': layers,
    'num_attention_heads': width // head,
    'image_size': image[0],
    'patch_size': image[1],
    'projection_dim': projection,
  }


SIZES = {
  'nano': _sizes(64, 2, 32, 48, 32, 8),
  'pool': _sizes(192, 8, 64, 384, 32, 4),
  'vit_b32': _sizes(768, 12, 64, 512, 224, 32),
  'vit_b16': _sizes(768, 12, 64, 512, 224, 16),
  'vit_l14': _sizes(1024, 24, 64, 768, 224, 14),
}
"""Towers by name, in the words of Hugging Face's configuration."""


def tokens(model: str) -> int:
  """Returns how many tokens an image has."""
  sizes = SIZES[model]
  return (sizes['image_size'] // sizes['patch_size']) ** 2 + 1


def shapes(model: str) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of a tower's parameters."""
  sizes = SIZES[model]
  return merge_runs.tower_shapes(
    sizes['hidden_size'],
    sizes['num_hidden_layers'],
    patch=sizes['patch_size'],
    tokens=tokens(model),
    projection=sizes['projection_dim'],
  )


def _rng(name: str, *numbers: int) -> np.random.Generator:
  return np.random.default_rng([zlib.crc32(name.encode()), *numbers])


def leaf(
  name: str, shape: tuple[int, ...], num: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one parameter.

  Args:
    name: of the parameter.
    shape: of it.
    num: of experts.

  Returns:
    The base's and the experts', `[num, *shape]`, float32.
  """
  inputs = math.prod(shape[1:]) if len(shape) > 1 else 2500
  scale = np.float32(inputs**-0.5)
  base = scale * _rng(name, 0).standard_normal(shape, np.float32)
  if 'norm' in name and name.endswith('weight'):
    base += 1
  experts = np.empty((num, *shape), np.float32)
  for k, expert in enumerate(experts):
    expert[...] = base
    # FusionBench never merges the projection: all experts have the base's.
    if name != PROJECTION:
      noise = _rng(name, k + 1).standard_normal(shape, np.float32)
      expert += np.float32(NOISE) * scale * noise
  return base, experts


def heads(model: str, num: int) -> np.ndarray:
  """Returns a unit vector a class, `[num, features, CLASSES]`."""
  shape = (num, SIZES[model]['projection_dim'], CLASSES)
  x = _rng('heads').standard_normal(shape, np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def images(
  model: str, phases: int, num: int, batch: int, step: int
) -> np.ndarray:
  """Returns a step's images in [0, 1], `[phases, num, batch, H, W, 3]`."""
  rng, side = _rng('images', step), SIZES[model]['image_size']
  lead = (phases, num, batch)
  # Each has a colour of its own, or all would have nearly the same features.
  colour = rng.random((*lead, 1, 1, 3), np.float32)
  x = rng.random((*lead, side, side, 3), np.float32)
  x += colour
  x *= np.float32(0.5)
  return x


def references(phases: int, num: int, batch: int, step: int) -> np.ndarray:
  """Returns class probabilities, `[phases, num, batch, CLASSES]`."""
  shape = (phases, num, batch, CLASSES)
  x = np.exp(_rng('references', step).standard_normal(shape, np.float32))
  return x / x.sum(-1, keepdims=True)


def total(model: str) -> int:
  """Returns the number of a tower's parameters."""
  return sum(map(math.prod, shapes(model).values()))


def difference(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
  """Compares what two programs found in their first step.

  Args:
    ours: losses and norms, numbers; gradients, lists by parameter.
    peer: the same, or a part of it.

  Returns:
    By name, the norm of the difference by the norm of ours.
  """
  found = {}
  for name, theirs in peer.items():
    mine = ours[name]
    if isinstance(theirs, dict):
      mine = np.array([mine[key] for key in theirs])
      theirs = np.array(list(theirs.values()))
    gap = np.linalg.norm(np.subtract(mine, theirs))
    found[name] = float(gap / np.linalg.norm(mine))
  return found
