"""Reads the reference's arrays, and says how far ours are from them.

A parameter vector of the reference lies in the order of `param_names`, its
kernels `[out, in]`. Here all is compared in that order.
"""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import convert

_DATA = ('inputs', 'images', 'noise')
_KINDS = {
  'data': _DATA,
  'forward': ('forward',),
  'static': ('linear', 'slerp', 'ties', 'dare'),
  'statistics': ('fisher', 'regmean'),
}
_PROVENANCE = {'fusion_bench', 'torch', 'dtype', 'tasks', 'note'}


def _kind(path: Path) -> str:
  """Says which test reads a file; that of learned merges refuses the rest."""
  stem = path.stem.removesuffix('_f64')
  return next((k for k, stems in _KINDS.items() if stem in stems), 'learned')


def pytest_generate_tests(metafunc):
  """Runs a test that takes `forward_path` or the like on each such file."""
  for kind in [*_KINDS, 'learned']:
    if f'{kind}_path' in metafunc.fixturenames:
      folder = metafunc.config.getoption('golden')
      found = [p for p in sorted(folder.glob('*.npz')) if _kind(p) == kind]
      none = pytest.mark.skip(f'no {kind} arrays in {folder}')
      metafunc.parametrize(
        f'{kind}_path',
        found or [pytest.param(None, marks=none)],
        ids=[path.stem for path in found] or ['none'],
      )


def pytest_terminal_summary(terminalreporter):
  """Prints each file's largest relative error."""
  rows = [
    value
    for outcome in ('passed', 'failed')
    for report in terminalreporter.getreports(outcome)
    for name, value in report.user_properties
    if name == 'golden'
  ]
  if rows:
    terminalreporter.section('largest relative errors to the reference')
  for row in sorted(rows):
    terminalreporter.write_line(row)


@dataclasses.dataclass(frozen=True)
class File:
  """Arrays of one file, and the hyper-parameters that made them."""

  name: str
  arrays: dict[str, np.ndarray]
  meta: dict[str, Any]

  @property
  def dtype(self) -> np.dtype:
    """What the reference computed in."""
    return np.dtype(np.float64 if self.name.endswith('_f64') else np.float32)

  @contextlib.contextmanager
  def precision(self) -> Iterator[None]:
    """Lets JAX compute in the reference's precision."""
    wide = self.dtype == np.float64
    # Flax asks for the promotion of float64 with float32, which is not strict.
    promotion = 'standard' if wide else 'strict'
    with jax.enable_x64(wide), jax.numpy_dtype_promotion(promotion):
      yield

  def options(self, known: Iterable[str]) -> dict[str, Any]:
    """Returns the hyper-parameters, or fails where one is not known."""
    own = {k: v for k, v in self.meta.items() if k not in _PROVENANCE}
    unknown = sorted(set(own) - set(known))
    if unknown:
      pytest.fail(
        f'{self.name}: no test knows what {", ".join(unknown)} in meta means: '
        f'{ {k: own[k] for k in unknown} }'
      )
    return own


def _read(path: Path) -> File:
  with np.load(path) as file:
    arrays = dict(file)
  meta = json.loads(str(arrays.pop('meta')))
  return File(path.stem, arrays, meta)


class Inputs:
  """Models, heads, images and noise that the reference's arrays are made of."""

  def __init__(self, inputs: File, images: File, noise: File):
    a = inputs.arrays
    self.base, self.experts = a['pre'], a['ft']
    self.images = images.arrays['images'].transpose(1, 0, 2, 4, 5, 3)
    self.uniform = noise.arrays['uniform']
    self.dare_uniform = noise.arrays['dare_uniform']
    self.scale = float(a['logit_scale_exp'])
    self.heads = [a[f'head{t}'].T for t in range(len(a['tasks']))]
    fields = {f.name for f in dataclasses.fields(clip.VisionConfig)}
    config = json.loads(str(a['config']))
    self.config = clip.VisionConfig(
      **{k: v for k, v in config.items() if k in fields}
    )
    self._projection = a['visual_projection'].T
    self._shapes = [json.loads(shape) for shape in a['param_shapes']]
    self._paths = [convert.clip_vision.to_path(n) for n in a['param_names']]
    sizes = [math.prod(shape) for shape in self._shapes]
    self._ends = np.cumsum(sizes)[:-1]
    places = self.unflatten(np.arange(self.base.size, dtype=np.int32))
    ours = jax.eval_shape(tree.ravel, self.unflatten(self.base)).layout.names
    self._leaves = [ours.index(path) for path in self._paths]
    places = tree.flatten(places)
    self._order = np.concatenate([np.ravel(places[path]) for path in ours])
    dead = ['k_proj/bias' in path for path in self._paths]
    self.dead = np.repeat(dead, sizes)

  def unflatten(self, vector: np.ndarray) -> Any:
    """Makes the tower's pytree of a vector `[..., P]` of the reference."""
    leaves, lead = {}, vector.ndim - 1
    parts = np.split(vector, self._ends, axis=-1)
    for path, shape, x in zip(self._paths, self._shapes, parts, strict=True):
      axes = convert.clip_vision.axes(path) or range(len(shape))
      x = x.reshape(*vector.shape[:-1], *shape)
      x = x.transpose(*range(lead), *[lead + axis for axis in axes])
      leaves[path] = jnp.asarray(x)
    return traverse_util.unflatten_dict(leaves, sep='/')

  def flatten(self, params: Any) -> np.ndarray:
    """Returns a pytree's vector `[P]` in the reference's order."""
    leaves, parts = tree.flatten(params), []
    for path in self._paths:
      x = np.asarray(leaves[path])
      axes = convert.clip_vision.axes(path) or range(x.ndim)
      parts.append(x.transpose(np.argsort(axes)).ravel())
    return np.concatenate(parts)

  def ravel(self, vector: np.ndarray) -> np.ndarray:
    """Puts a vector `[..., P]` of the reference in our order."""
    return vector[..., self._order]

  def flat(self, vector: jax.Array) -> np.ndarray:
    """Puts a raveled vector `[..., P]` in the reference's order."""
    out = np.empty_like(np.asarray(vector))
    out[..., self._order] = vector
    return out

  def by_leaf(self, coefficients: jax.Array) -> np.ndarray:
    """Puts `[K, leaves]` in the reference's order; `[K]` stays."""
    w = np.asarray(coefficients)
    return w if w.ndim == 1 else w[:, self._leaves]

  def tower(
    self, params: Any, pixels: jax.Array, *, every_token=False, **options: Any
  ) -> Any:
    """Applies the tower with the reference's frozen projection."""
    params = self.with_projection(params)
    return clip.VisionTower(self.config, every_token=every_token).apply(
      {'params': params}, pixels, **options
    )

  def with_projection(self, params: Any) -> Any:
    """Adds the reference's frozen projection to a tower's parameters."""
    dtype = jnp.result_type(*jax.tree.leaves(params))
    kernel = jnp.asarray(self._projection, dtype)
    return {**params, 'visual_projection': {'kernel': kernel}}

  def logits_fn(self, params: Any, images: jax.Array) -> jax.Array:
    """Logits of all tasks, `[T, B, L]`."""
    heads = clip.stack_heads(self.heads, scale=self.scale)
    return clip.zero_shot(self.tower, heads)(params, images)


def _find(name: str, folder: Path, request) -> File:
  path = folder / f'{name}.npz'
  if not path.is_file():
    path = request.getfixturevalue('shared') / 'golden' / path.name
  return _read(path)


@pytest.fixture(scope='session')
def inputs(golden, request) -> Inputs:
  """What the reference's arrays are made of.

  Where the folder lacks a part, the shared folder's is meant.
  """
  return Inputs(*[_find(name, golden, request) for name in _DATA])


@pytest.fixture(scope='session')
def quick_jit():
  """`jax.jit` for what runs a few times: compiles in a quarter of the time."""
  options = {
    'xla_backend_optimization_level': 0,
    'xla_cpu_use_fusion_emitters': False,
    'xla_llvm_disable_expensive_passes': True,
  }
  return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture(scope='session')
def read():
  """Reads one file of reference arrays."""
  return _read


def _error(got: Any, want: np.ndarray) -> float:
  """Largest error, relative to the largest magnitude."""
  got, want = np.asarray(got, want.dtype), np.asarray(want)
  if got.shape != want.shape:
    return float('inf')
  error = np.max(np.abs(got - want), initial=0)
  scale = np.max(np.abs(want), initial=0)
  return float(error / scale) if scale else float(error)


@pytest.fixture
def compare(record_property):
  """Compares all arrays of a file with ours by name, and keeps the worst."""

  def compare_fn(file: File, ours: dict[str, Any], tolerance: dict[str, float]):
    """Fails where an array is not computed or too far from the reference's.

    Args:
      file: of the reference.
      ours: by the file's names; others are left alone.
      tolerance: of arrays whose name begins so, the first that fits; '' fits
        all.
    """
    missing = sorted(set(file.arrays) - set(ours))
    errors = {
      k: _error(ours[k], v) for k, v in file.arrays.items() if k in ours
    }
    worst = max(errors, key=errors.get)
    line = f'{file.name}: {errors[worst]:.1e}: {worst}'
    record_property('golden', f'{line} ({len(errors)} arrays)')
    lines = [f'{file.name}: {name}: no test computes it' for name in missing]
    for name, error in errors.items():
      allowed = next(v for k, v in tolerance.items() if name.startswith(k))
      if not error <= allowed:
        lines.append(
          f'{file.name}: {name}: largest relative error {error:.1e}, '
          f'allowed {allowed:.0e}'
        )
    if lines:
      pytest.fail('\n'.join(lines), pytrace=False)

  return compare_fn
