"""The models and commands of `benchmarks.bench_merge`."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import subprocess
import time
from typing import Any

import numpy as np

from benchmarks.runs import HOST
from benchmarks.runs import ROOT

_BLOCK = 1 << 24

ENTRYWISE = ('average', 'weighted_average', 'task_arithmetic')
"""Methods that hold little beside the models."""
RANKED = ('consensus', 'dare', 'ties')
"""Methods of which FusionBench holds all models as vectors, many times."""


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
  python: str,
  folder: Path,
  num: int,
  method: str,
  options: Mapping[str, Any],
  out: Path,
) -> list[str]:
  """Returns the command of ours that merges files."""
  experts = [
    text for path in expert_paths(folder, num) for text in ('--expert', path)
  ]
  settings = [
    text
    for key, value in options.items()
    for text in ('--set', f'{key}={_literal(value)}')
  ]
  return [
    python,
    '-c',
    'from dam_jax import cli; cli.run()',
    'merge',
    *map(str, ('--base', folder / 'base.safetensors', *experts)),
    *('--method', method, *settings),
    *('--out', str(out)),
  ]


def _literal(value: Any) -> str:
  return value if isinstance(value, str) else repr(value)


def mergekit_argv(
  python: str,
  folder: Path,
  num: int,
  peer: Mapping[str, Any],
  out: Path,
  threads: int,
) -> list[str]:
  """Writes mergekit's configuration and returns the command that reads it.

  Args:
    python: beside which the command is.
    folder: of the models.
    num: of experts.
    peer: method, options and inputs, as `benchmarks.parity_cases.Peer` has
      them; an option with a value for each expert becomes that expert's own.
    out: folder to write.
    threads: that mergekit may use.
  """
  paths = expert_paths(folder, num)
  each = {k: x for k, x in peer['options'].items() if isinstance(x, list)}
  config: dict[str, Any] = {
    'merge_method': peer['method'],
    'models': [
      {
        'model': str(path),
        'parameters': {key: values[k] for key, values in each.items()},
      }
      for k, path in enumerate(paths)
    ],
    'parameters': {k: x for k, x in peer['options'].items() if k not in each},
  }
  if peer['inputs'] != 'experts':
    base = folder / 'base.safetensors'
    config['base_model'] = str(paths[0] if peer['inputs'] == 'first' else base)
  path = out.with_suffix('.yml')
  path.write_text(json.dumps(config))  # JSON is YAML
  command = Path(python).parent / 'mergekit-pytorch'
  return [str(command), str(path), str(out), '--num-threads', str(threads)]


def copy_files(folder: Path, num: int) -> dict[str, float]:
  """Reads the models that a merge reads and writes one; returns seconds."""
  base, out = folder / 'base.safetensors', folder / 'copied.safetensors'
  block = bytearray(_BLOCK)
  cpu, begin = time.process_time(), time.perf_counter()
  with out.open('wb', buffering=0) as target:
    for path in (base, *expert_paths(folder, num)):
      with path.open('rb', buffering=0) as source:
        while count := source.readinto(block):
          if path == base:
            target.write(memoryview(block)[:count])
    # What a merge of ours has written is on the disk, too.
    os.fsync(target.fileno())
  return {
    'seconds': time.perf_counter() - begin,
    'cpu': time.process_time() - cpu,
  }


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


def models_needed(program: str, method: str, form: str, num: int) -> int:
  """Returns how many models a program may hold at a time, inputs included."""
  if program == 'ours':
    if form.startswith('leaves'):
      return num + 6
    return 2 * num + 6 if method in ENTRYWISE else 5 * num + 6
  if program == 'fusion_bench' and method in RANKED:
    return 10 * num
  return num + 6 if method in ENTRYWISE else 3 * num + 6


def wrong(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Says where results differ by more than float32 explains."""
  return [
    f'{row["part"]}: {row["says"]}, {row["experts"]} experts, {row["form"]}: '
    f'differs from {name} by {found["difference"]:.1e}'
    for row in rows
    for name, found in row.get('peers', {}).items()
    if not found.get('difference', 0) <= row['tolerance']
  ]
