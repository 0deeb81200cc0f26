"""The models and commands of `benchmarks.bench_merge`."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import subprocess
from typing import Any

import numpy as np

from benchmarks.runs import HOST
from benchmarks.runs import ROOT


def expert_paths(folder: Path, num: int) -> list[Path]:
  """Returns the files of the first experts."""
  return [folder / f'expert_{k}.safetensors' for k in range(num)]


def tower_shapes(
  width: int,
  layers: int,
  *,
  patch: int = 32,
  tokens: int = 50,
  projection: int = 0,
) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of CLIP's image tower, by default ViT-B/32's.

  Args:
    width: of the residual stream.
    layers: number of blocks.
    patch: side of the patches, in pixels.
    tokens: patches of an image and the class token.
    projection: size of the features; 0 is two thirds of the width.
  """
  linear = {
    **{f'self_attn.{x}_proj': (width, width) for x in 'kvq'},
    'self_attn.out_proj': (width, width),
    'mlp.fc1': (4 * width, width),
    'mlp.fc2': (width, 4 * width),
  }
  norm = {'weight': (width,), 'bias': (width,)}
  top, shapes = 'vision_model', {}
  shapes[f'{top}.embeddings.class_embedding'] = (width,)
  shapes[f'{top}.embeddings.patch_embedding.weight'] = (width, 3, patch, patch)
  shapes[f'{top}.embeddings.position_embedding.weight'] = (tokens, width)
  norms = [f'{top}.pre_layrnorm', f'{top}.post_layernorm']
  for i in range(layers):
    layer = f'{top}.encoder.layers.{i}'
    for name, shape in linear.items():
      shapes[f'{layer}.{name}.weight'] = shape
      shapes[f'{layer}.{name}.bias'] = shape[:1]
    norms += [f'{layer}.layer_norm1', f'{layer}.layer_norm2']
  for name in norms:
    shapes |= {f'{name}.{last}': shape for last, shape in norm.items()}
  shapes['visual_projection.weight'] = (projection or width * 2 // 3, width)
  return shapes


def make_models(
  folder: Path, shapes: Mapping[str, tuple[int, ...]], num: int
) -> None:
  """Writes a random base and its experts, an entry of memory at a time."""
  entries, end = {}, 0
  for name, shape in shapes.items():
    begin, end = end, end + 4 * int(np.prod(shape))
    entries[name] = {
      'dtype': 'F32',
      'shape': shape,
      'data_offsets': (begin, end),
    }
  head = json.dumps({'__metadata__': {'format': 'pt'}, **entries}).encode()
  head += b' ' * (-len(head) % 8)
  paths = [folder / 'base.safetensors', *expert_paths(folder, num)]
  rngs = [np.random.default_rng(k) for k in range(1 + num)]
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(path.open('wb')) for path in paths]
    for file in files:
      file.write(len(head).to_bytes(8, 'little') + head)
    for shape in shapes.values():
      base = 2e-2 * rngs[0].standard_normal(shape, np.float32)
      base.tofile(files[0])
      for rng, file in zip(rngs[1:], files[1:], strict=True):
        (base + 1e-3 * rng.standard_normal(shape, np.float32)).tofile(file)


def ours_argv(
  python: str, folder: Path, num: int, method: Sequence[str], out: Path
) -> list[str]:
  """Returns the command of ours that merges files."""
  experts = [
    text for path in expert_paths(folder, num) for text in ('--expert', path)
  ]
  return [
    python,
    '-c',
    'from dam_jax import cli; cli.run()',
    'merge',
    *map(str, ('--base', folder / 'base.safetensors', *experts)),
    *('--method', *method),
    *('--out', str(out)),
  ]


def mergekit_argv(
  python: str,
  folder: Path,
  num: int,
  method: str,
  parameters: Mapping[str, Any],
  out: Path,
  threads: int,
) -> list[str]:
  """Writes mergekit's configuration and returns the command that reads it."""
  config: dict[str, Any] = {
    'merge_method': method,
    'models': [{'model': str(path)} for path in expert_paths(folder, num)],
    'parameters': dict(parameters),
  }
  if method != 'linear':
    config['base_model'] = str(folder / 'base.safetensors')
  path = out.with_suffix('.yml')
  path.write_text(json.dumps(config))  # JSON is YAML
  command = Path(python).parent / 'mergekit-pytorch'
  return [str(command), str(path), str(out), '--num-threads', str(threads)]


def difference(python: str, base: Path, ours: Path, peer: Path) -> float:
  """Returns the norm of the difference of two models by that of the merge."""
  argv = ['diff', '--json', '--base', str(base), str(ours), str(peer)]
  done = subprocess.run(
    [python, '-c', 'from dam_jax import cli; cli.run()', *argv],
    env={**os.environ, 'PYTHONPATH': str(ROOT), **HOST},
    stdout=subprocess.PIPE,
    text=True,
    check=False,
  )
  found = json.loads(done.stdout)['whole']
  return found['norm_difference'] / found['norm_task_vector_b']
