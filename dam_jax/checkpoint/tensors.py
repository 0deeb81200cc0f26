"""Whole models of safetensors in and out, straight into the stacked tree.

Headers are compared before any weight is read, and each weight is read once.
What is written goes to a temporary name first and is then moved into place.
"""

from collections.abc import Mapping
import contextlib
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dam_jax import tree
from dam_jax.checkpoint import headers
from dam_jax.checkpoint import models
from dam_jax.checkpoint.headers import PATHS
from dam_jax.checkpoint.headers import NameMap
from dam_jax.typing import Params

# Integers of a byte and eighths of a float are packed weights, which mean
# nothing without their scales.
_WHOLE = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'BOOL')


def _open(path: epath.PathLike, name_map: NameMap) -> models.Model:
  model = models.open_model(path, name_map=name_map)
  codes = {
    p: headers.CODES.get(x.dtype, x.dtype) for p, x in model.leaves.items()
  }
  headers.raise_if(
    [
      f'{path}: {name_map.to_name(p)} is {code}, which is not supported'
      for p, code in codes.items()
      if code not in _WHOLE
    ],
    'weights:',
  )
  return model


def _empty(model: models.Model, lead: tuple[int, ...], dtype: Any):
  def make(struct):
    floating = jnp.issubdtype(struct.dtype, jnp.floating)
    return np.empty((*lead, *struct.shape), dtype if floating else struct.dtype)

  return {path: make(s) for path, s in model.leaves.items()}


def _read(
  where: epath.PathLike, model: models.Model, into: Mapping[str, np.ndarray]
) -> list[str]:
  """Fills arrays with a model's leaves; returns what is not finite."""
  bad = []
  for path, out in into.items():
    out[...] = model.read(path)
    floating = jnp.issubdtype(out.dtype, jnp.floating)
    if floating and not np.isfinite(out).all():
      count = int(out.size - np.isfinite(out).sum())
      bad.append(f'{where}: {path}: {count} of {out.size} not finite')
  return bad


def load_abstract(path: epath.PathLike, *, name_map: NameMap = PATHS) -> Params:
  """Reads the names, shapes and dtypes of a model.

  Args:
    path: of the file or folder, as `open_model` takes it.
    name_map: names and layouts.

  Returns:
    A pytree of `jax.ShapeDtypeStruct`s, in the file's dtypes.

  Raises:
    ValueError: where the file cannot be read or has an unknown tensor.
  """
  return models.nest(_open(path, name_map).leaves)


def load_params(
  path: epath.PathLike,
  *,
  name_map: NameMap = PATHS,
  like: Params | None = None,
  dtype: Any = np.float32,
) -> Params:
  """Reads a whole model.

  Args:
    path: of the file or folder, as `open_model` takes it.
    name_map: names and layouts, such as `dam_jax.models.convert.clip_vision`.
    like: a pytree, abstract or not, whose names and shapes it must have.
    dtype: of the floating-point leaves, whatever the file's.

  Returns:
    A nested dict of NumPy arrays.

  Raises:
    ValueError: where the file cannot be read, differs from `like` (all
      differences), or has values that are not finite (all tensors).
  """
  model = _open(path, name_map)
  if like is not None:
    lines = tree.differences(like, models.nest(model.leaves), dtypes=False)
    headers.raise_if(lines, f'{path} does not fit the model:')
  arrays = _empty(model, (), dtype)
  headers.raise_if(_read(path, model, arrays), 'weights:')
  return models.nest(arrays)


def load_experts(
  base: epath.PathLike,
  experts: Mapping[str, epath.PathLike],
  *,
  name_map: NameMap = PATHS,
  like: Params | None = None,
  dtype: Any = np.float32,
) -> tuple[Params, Params]:
  """Reads a base and its fine-tuned experts, each tensor once.

  Args:
    base: path of the model that all experts were fine-tuned from.
    experts: paths by name; their order is that of the task axis.
    name_map: names and layouts.
    like: a pytree, abstract or not, whose names and shapes they must have.
    dtype: of the floating-point leaves, whatever the files'.

  Returns:
    The base, and the experts stacked on a leading task axis, as NumPy arrays.

  Raises:
    ValueError: before a weight is read, where a file cannot be read or names,
      shapes or dtypes differ from the base's (all of them); after, where
      weights are not finite (all of them).
  """
  if not experts:
    raise ValueError('no experts: a merge needs at least one')
  opened = _open(base, name_map)
  others = {name: _open(path, name_map) for name, path in experts.items()}
  wanted = models.nest(opened.leaves)
  if like is not None:
    lines = tree.differences(like, wanted, dtypes=False)
    headers.raise_if(lines, f'{base} does not fit the model:')
  tree.check_compatible(
    wanted, {name: models.nest(m.leaves) for name, m in others.items()}
  )
  arrays = _empty(opened, (), dtype)
  stacked = _empty(opened, (len(others),), dtype)
  bad = _read(base, opened, arrays)
  for k, (name, model) in enumerate(others.items()):
    bad += _read(experts[name], model, {p: x[k] for p, x in stacked.items()})
  headers.raise_if(bad, 'weights:')
  return models.nest(arrays), models.nest(stacked)


def load_metadata(path: epath.PathLike) -> dict[str, str]:
  """Reads the metadata of a safetensors file."""
  with headers.opened(path) as file:
    return file.metadata() or {}


@contextlib.contextmanager
def replacing(path: epath.PathLike):
  """Gives a temporary name beside `path`, moved onto it when all went well."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(
    dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp'
  )
  os.close(handle)
  os.chmod(temporary, 0o644)
  try:
    yield pathlib.Path(temporary)
    os.replace(temporary, path)
  finally:
    pathlib.Path(temporary).unlink(missing_ok=True)


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a small file, whole or not at all, and the folders above it."""
  data = content.encode() if isinstance(content, str) else content
  with replacing(path) as temporary:
    temporary.write_bytes(data)


def cast(array: np.ndarray, dtype: Any) -> tuple[np.ndarray, bool]:
  """Rounds to nearest even; says whether finite values stayed finite."""
  if array.dtype == dtype:
    return array, True
  with np.errstate(over='ignore', invalid='ignore'):
    rounded = array.astype(dtype)
  return rounded, bool((np.isfinite(rounded) | ~np.isfinite(array)).all())


def save_params(
  path: epath.PathLike,
  params: Params,
  *,
  name_map: NameMap = PATHS,
  dtype: Any = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a model to a safetensors file, at once or not at all.

  Args:
    path: of the file.
    params: a pytree of arrays.
    name_map: names and layouts.
    dtype: of the floating-point tensors; None keeps the leaves'.
    metadata: of the file; `{'format': 'pt'}` is what transformers expects.

  Raises:
    ValueError: where a leaf has no name in the file, or the dtype cannot hold
      its values.
  """
  leaves = tree.flatten(params)
  unnamed = [p for p in leaves if name_map.to_name(p) is None]
  headers.raise_if(unnamed, 'leaves that have no name in the file:')
  tensors, overflow = {}, []
  for leaf, value in leaves.items():
    array = np.asarray(value)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
      array, fits = cast(array, dtype)
      overflow += [] if fits else [leaf]
    axes = name_map.axes(leaf)
    if axes is not None:
      array = array.transpose(np.argsort(axes))
    tensors[name_map.to_name(leaf)] = np.asarray(array, order='C')
  headers.raise_if(overflow, f'leaves that {dtype} cannot hold:')
  with replacing(path) as temporary:
    save_file(tensors, temporary, metadata=dict(metadata or {'format': 'pt'}))
