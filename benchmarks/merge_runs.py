"""What `benchmarks.merges` runs: models, workers and commands.

Imports neither JAX nor torch: Linux counts the memory of a process that starts
another one to the peak of that other one.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import subprocess
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.merge_worker import expert_paths

ROOT = Path(__file__).parents[1]
HOST = {'JAX_PLATFORMS': 'cpu'}
Run = Callable[[], dict[str, float]]


def tower_shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of CLIP's image tower, patches of 32 pixels."""
  linear = {
    **{f'self_attn.{x}_proj': (width, width) for x in 'kvq'},
    'self_attn.out_proj': (width, width),
    'mlp.fc1': (4 * width, width),
    'mlp.fc2': (width, 4 * width),
  }
  norm = {'weight': (width,), 'bias': (width,)}
  top, shapes = 'vision_model', {}
  shapes[f'{top}.embeddings.class_embedding'] = (width,)
  shapes[f'{top}.embeddings.patch_embedding.weight'] = (width, 3, 32, 32)
  shapes[f'{top}.embeddings.position_embedding.weight'] = (50, width)
  norms = [f'{top}.pre_layrnorm', f'{top}.post_layernorm']
  for i in range(layers):
    layer = f'{top}.encoder.layers.{i}'
    for name, shape in linear.items():
      shapes[f'{layer}.{name}.weight'] = shape
      shapes[f'{layer}.{name}.bias'] = shape[:1]
    norms += [f'{layer}.layer_norm1', f'{layer}.layer_norm2']
  for name in norms:
    shapes |= {f'{name}.{last}': shape for last, shape in norm.items()}
  shapes['visual_projection.weight'] = (width * 2 // 3, width)
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


class Worker:
  """A process of `benchmarks.merge_worker`; its models are there once made."""

  def __init__(
    self, python: str, *args: Any, env: Mapping[str, str] | None = None
  ):
    self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      [python, '-m', 'benchmarks.merge_worker', *map(str, args)],
      env={**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    self.about = self._answer()

  def _answer(self) -> Any:
    line = self._process.stdout.readline()
    if not line:
      self._process.communicate()
      self._errors.seek(0)
      raise RuntimeError(f'a worker failed:\n{self._errors.read()[-4000:]}')
    return json.loads(line)

  def ask(self, *request: Any) -> Any:
    """Sends a request and waits for its answer."""
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self._answer()

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *error: Any) -> None:
    self._process.communicate()
    self._errors.close()


def alternate(
  runs: Sequence[Run], repeats: int, seconds: float
) -> list[list[dict[str, float]]]:
  """Calls functions in turn, once at least.

  Args:
    runs: each returns what it measured.
    repeats: how often to call each.
    seconds: after which no other round begins.

  Returns:
    For each function what its calls returned.
  """
  found: list[list[dict[str, float]]] = [[] for _ in runs]
  begin = time.perf_counter()
  for i in range(repeats):
    if i and time.perf_counter() - begin > seconds:
      break
    for run, into in zip(runs, found, strict=True):
      into.append(run())
  return found


def run_command(argv: Sequence[str], log: Path) -> dict[str, float]:
  """Runs a command; returns its wall and CPU seconds and peak of memory."""
  with log.open('w') as file:
    begin = time.perf_counter()
    process = subprocess.Popen(
      argv,
      env={**os.environ, 'PYTHONPATH': str(ROOT), **HOST},
      stdout=file,
      stderr=subprocess.STDOUT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f'{argv} failed:\n{log.read_text()[-4000:]}')
  return {
    'seconds': seconds,
    'cpu': usage.ru_utime + usage.ru_stime,
    'peak': 1024 * usage.ru_maxrss,
  }


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
