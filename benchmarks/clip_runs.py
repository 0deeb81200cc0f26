"""CLIPs by ours and by transformers, and how far they are apart."""

from collections.abc import Callable, Iterator, Mapping
import json
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from benchmarks import clip_problem as problem
from benchmarks import runs
from dam_jax import checkpoint
from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import convert
from dam_jax.models import hub
from dam_jax.models import text
from dam_jax.models import tokens
from dam_jax.models import towers

Arrays = Mapping[str, np.ndarray]
FEATURES, GRADIENTS, SAME = 1e-5, 1e-4, 0.0


class Row(NamedTuple):
  """One figure.

  Attributes:
    model: what was computed with.
    what: was compared.
    error: the largest `|ours - theirs| / max|theirs|`, of any tensor.
    limit: that it must not exceed; None: only measured.
  """

  model: str
  what: str
  error: float
  limit: float | None

  @property
  def verdict(self) -> str:
    """'measured', 'same' or 'DIFFERS'."""
    if self.limit is None:
      return 'measured'
    # What is not a number is not within a limit either.
    return 'same' if self.error <= self.limit else 'DIFFERS'


def error(ours: np.ndarray, theirs: np.ndarray, scale: Any = None) -> float:
  """Returns the largest difference by the largest entry of theirs."""
  ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
  if ours.shape != theirs.shape:
    raise ValueError(f'ours is {ours.shape}, theirs {theirs.shape}')
  largest = np.abs(theirs if scale is None else scale).max()
  return float(np.abs(ours - theirs).max() / largest)


def gradient_errors(ours: Arrays, theirs: Arrays) -> dict[str, float]:
  """Returns the error of each gradient, by its name in the file.

  A key's bias has no effect on a softmax: its gradient is rounding, which is
  compared with the gradient of the query's bias.
  """
  if set(ours) != set(theirs):
    raise ValueError(f'other leaves: {sorted({*ours} ^ {*theirs})}')
  return {
    name: error(
      *(x, theirs[name]),
      theirs[name.replace('k_proj.bias', 'q_proj.bias')],
    )
    for name, x in ours.items()
  }


def compute(
  model: hub.Pretrained, given: Arrays, **options: Any
) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
  """Returns features and logits, and the gradients that theirs computes."""
  whole = towers.CLIP(model.config, **options)
  vision = clip.VisionTower(model.config.vision, **options)
  words = text.TextTower(model.config.text, **options)

  def apply(params):
    pixels, tokens = given['pixels'], given['tokens']
    return {
      'images': vision.apply({'params': params['vision']}, pixels),
      'texts': words.apply({'params': params['text']}, tokens),
      'logits': whole.apply({'params': params}, pixels, tokens).logits,
    }

  found, grad = _gradient(apply, model.params, given)
  return found, in_file(grad, convert.clip)


def _gradient(
  apply: Callable[[Any], Any], params: Any, given: Arrays
) -> tuple[dict[str, jax.Array], Any]:
  """Returns outputs and the gradient of their sum, weighted as theirs is."""

  def loss(params):
    found = apply(params)
    means = (jnp.mean(x * given[f'by/{name}']) for name, x in found.items())
    return sum(means, start=jnp.float32(0)), found

  grad, found = jax.jit(jax.grad(loss, has_aux=True))(params)
  return found, grad


def in_file(params: Any, name_map: checkpoint.NameMap) -> dict[str, np.ndarray]:
  """Returns leaves by their names and in their layouts in a file."""
  found = {}
  for path, x in tree.flatten(params).items():
    axes = name_map.axes(path)
    x = np.asarray(x)
    name = name_map.to_name(path) or path
    found[name] = x if axes is None else x.transpose(np.argsort(axes))
  return found


def _compare(
  model: str, found: Arrays, grad: Arrays, half: Arrays, theirs: Arrays
) -> Iterator[Row]:
  for name, x in found.items():
    yield Row(model, name, error(x, theirs[name]), FEATURES)
  prefix = 'grad/'
  gradients = {
    name.removeprefix(prefix): x
    for name, x in theirs.items()
    if name.startswith(prefix)
  }
  errors = gradient_errors(grad, gradients)
  worst = max(errors, key=lambda name: errors[name])
  yield Row(model, f'gradients, {worst}', errors[worst], GRADIENTS)
  for name, x in half.items():
    drift = error(x, found[name])
    yield Row(model, f'{name} of bfloat16 by float32, ours', drift, None)
    drift = error(theirs[f'bfloat16/{name}'], theirs[name])
    yield Row(model, f'{name} of bfloat16 by float32, theirs', drift, None)


def ask(python: str, folder: Path, **job: Any) -> None:
  """Has transformers do a job of `benchmarks.clips_torch`."""
  path = folder / 'job.json'
  path.write_text(json.dumps({**job, 'folder': str(folder.resolve())}))
  runs.check_module('transformers', python, 'clips_torch', path.resolve())


def _inputs(folder: Path, given: Arrays) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  save_file(dict(given), folder / 'inputs.safetensors')


def _outputs(path: Path) -> dict[str, np.ndarray]:
  return dict(load_file(path))


def versions(folder: Path) -> dict[str, str]:
  """Returns those of torch and transformers that wrote files in a folder."""
  found = sorted(folder.glob('*/versions.json'))
  return json.loads(found[0].read_text()) if found else {}


def whole(
  name: str, python: str, folder: Path, num: int, *, scan_layers: bool = False
) -> Iterator[Row]:
  """Compares a whole CLIP, made by transformers, and what it opens of ours.

  Args:
    name: of `clip_problem.SIZES`.
    python: that has torch and transformers.
    folder: for files.
    num: images, and texts.
    scan_layers: of ours, which else takes minutes to compile.
  """
  given = problem.inputs(problem.SIZES[name], num)
  _inputs(folder, given)
  config, files = problem.SIZES[name], {'inputs': 'inputs.safetensors'}
  ask(python, folder, config=config, model='theirs', out='out', **files)
  model = hub.load(folder / 'theirs')
  theirs = _outputs(folder / 'out')
  options = {'scan_layers': scan_layers}
  half, _ = compute(model, given, dtype=jnp.bfloat16, **options)
  found = compute(model, given, **options)
  yield from _compare(name, *found, half, theirs)
  hub.save(folder / 'ours', model)
  ask(python, folder, model='ours', out='again', more=False, **files)
  again = _outputs(folder / 'again')
  worst = max(error(x, theirs[key]) for key, x in again.items())
  yield Row(name, 'written by ours, opened by transformers', worst, SAME)


def tower(pool: Path, python: str, folder: Path, num: int) -> Iterator[Row]:
  """Compares the image tower of a pool's base on dev images of its first task.

  Args:
    pool: its folder.
    python: that has torch and transformers.
    folder: for files.
    num: images.
  """
  base, config = (
    pool / 'checkpoints' / x for x in ('base.safetensors', 'config.json')
  )
  task = sorted((pool / 'tasks').glob('*.npz'))[0]
  with np.load(task) as arrays:
    images = arrays['dev_images'][:num] / np.float32(255)
  pixels = np.asarray(clip.normalize(jnp.asarray(images, jnp.float32)))
  sizes = clip.load_config(config)
  rng = np.random.default_rng(0)
  by = rng.normal(size=(num, sizes.projection_dim)).astype(np.float32)
  given = {'pixels': pixels, 'by/images': by}
  _inputs(folder, given)
  (folder / 'theirs').mkdir(exist_ok=True)
  shutil.copyfile(config, folder / 'theirs' / 'config.json')
  shutil.copyfile(base, folder / 'theirs' / 'model.safetensors')
  ask(python, folder, model='theirs', inputs='inputs.safetensors', out='out')
  params = checkpoint.load_params(base, name_map=convert.clip_vision)

  def run(dtype):
    model = clip.VisionTower(sizes, dtype=dtype)
    found, grad = _gradient(
      lambda params: {'images': model.apply({'params': params}, pixels)},
      *(params, given),
    )
    return found, in_file(grad, convert.clip_vision)

  half, _ = run(jnp.bfloat16)
  yield from _compare('pool', *run(None), half, _outputs(folder / 'out'))


def tokenizer(python: str, folder: Path, source: Path | None) -> Iterator[Row]:
  """Compares numbers of tokens, of files of both kinds.

  Args:
    python: that has transformers.
    folder: for files.
    source: folder of a tokenizer; None makes one of a few words.
  """
  if source is None:
    problem.write_tokenizer(folder)
  else:
    shutil.copytree(source, folder, dirs_exist_ok=True)
  ask(python, folder, tokens=True)
  theirs = np.array(json.loads((folder / 'tokens.json').read_text()))
  for what, at in (('files', folder), ('tokenizer.json', folder / 'saved')):
    ours = tokens.Tokenizer(at)(problem.TEXTS, truncate=True)
    apart = float((ours != theirs).sum())
    yield Row('tokenizer', f'numbers that differ, {what}', apart, SAME)
