"""What safetensors files hold, unread: names, shapes, dtypes and offsets."""

import collections
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': jnp.dtype('bfloat16'),
  'F8_E4M3': jnp.dtype('float8_e4m3fn'),
  'F8_E4M3FNUZ': jnp.dtype('float8_e4m3fnuz'),
  'F8_E5M2': jnp.dtype('float8_e5m2'),
  'F8_E5M2FNUZ': jnp.dtype('float8_e5m2fnuz'),
  'F8_E8M0': jnp.dtype('float8_e8m0fnu'),
  'C64': np.dtype('complex64'),
  'I64': np.dtype('int64'),
  'I32': np.dtype('int32'),
  'I16': np.dtype('int16'),
  'I8': np.dtype('int8'),
  'U64': np.dtype('uint64'),
  'U32': np.dtype('uint32'),
  'U16': np.dtype('uint16'),
  'U8': np.dtype('uint8'),
  'BOOL': np.dtype('bool'),
}
"""The format's dtypes; those of less than a byte are not supported."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
"""The other way."""

_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')


class NameMap:
  """How a file's tensors are named and laid out in a pytree.

  This one takes names as paths: `a.b` is `{'a': {'b': ...}}`.
  """

  ignored: Sequence[str] = ()
  """Names of tensors that are not parameters and are not read."""

  def to_path(self, name: str) -> str | None:
    """Returns the leaf's path of a tensor's name, or None if unknown."""
    return name.replace('.', '/')

  def to_name(self, path: str) -> str | None:
    """Returns the tensor's name of a leaf's path, or None if unknown."""
    return path.replace('/', '.')

  def axes(self, path: str) -> Sequence[int] | None:
    """Returns the file's axes in the leaf's order; None keeps them."""
    del path
    return None


PATHS = NameMap()
"""The names that dam_jax itself gives to a pytree's leaves."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor's place in a file.

  Attributes:
    shape: in the file.
    dtype: of the file.
    start: first byte in the file.
    stop: first byte after it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Header:
  """A safetensors file's contents, unread.

  Attributes:
    path: of the file.
    tensors: by name, in the order of their bytes.
    metadata: of the file.
  """

  path: pathlib.Path
  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, str]


def raise_if(lines: Sequence[str], head: str) -> None:
  """Raises ValueError with all lines, if there is one."""
  if lines:
    raise ValueError('\n  '.join([head, *lines]))


def pickled(path: pathlib.Path) -> str:
  """Says why a pickle is not read, and what to do."""
  return (
    f'{path}: a pickle, which can run any code when it is read: load it where '
    'that does no harm and save it again as safetensors, with '
    'model.save_pretrained(folder, safe_serialization=True) or '
    'safetensors.torch.save_file(tensors, path)'
  )


def is_pickle(path: pathlib.Path) -> bool:
  """Says whether a file's name is that of a pickle."""
  return path.suffix in _PICKLES


@contextlib.contextmanager
def opened(path: epath.PathLike):
  """Opens a safetensors file, or raises ValueError with the reason."""
  path = pathlib.Path(path)
  if is_pickle(path):
    raise ValueError(pickled(path))
  try:
    with safetensors.safe_open(os.fspath(path), framework='numpy') as file:
      yield file
  except FileNotFoundError as e:
    raise ValueError(f'{path}: no such file') from e
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{path}: not a readable safetensors file: {e}') from e


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Makes a JSON object's dict, for `json.loads`; refuses a key given twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    raise ValueError(f'given twice: {", ".join(sorted(twice))}')
  return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object, or raises ValueError with the reason."""
  try:
    found = json.loads(path.read_bytes(), object_pairs_hook=unique)
  except FileNotFoundError as e:
    raise ValueError(f'{path}: no such file') from e
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{path}: not readable as JSON: {e}') from e
  if not isinstance(found, dict):
    raise ValueError(f'{path}: want a JSON object, got {found!r:.80}')
  return found


def read_header(path: epath.PathLike) -> Header:
  """Reads what a safetensors file holds.

  Args:
    path: of the file.

  Returns:
    Its contents. The safetensors library has checked that the tensors' bytes
    are within the file and fill it.

  Raises:
    ValueError: where it cannot be read, or has dtypes that are not supported
      (all of them).
  """
  path = pathlib.Path(path)
  with opened(path), path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    text = file.read(size)
  try:
    entries = json.loads(text, object_pairs_hook=unique)
  except ValueError as e:
    raise ValueError(f'{path}: not a readable safetensors file: {e}') from e
  metadata = entries.pop('__metadata__', None) or {}
  raise_if(
    [
      f'{path}: {name} is {entry["dtype"]}, which is not supported'
      for name, entry in entries.items()
      if entry['dtype'] not in DTYPES
    ],
    'dtypes:',
  )
  tensors = {
    name: Tensor(
      tuple(entry['shape']),
      DTYPES[entry['dtype']],
      *(8 + size + offset for offset in entry['data_offsets']),
    )
    for name, entry in entries.items()
  }
  in_order = sorted(tensors.items(), key=lambda item: item[1].start)
  return Header(path, dict(in_order), metadata)


def to_leaves(
  header: Header, name_map: NameMap
) -> tuple[dict[str, tuple[str, jax.ShapeDtypeStruct]], list[str]]:
  """Gives a file's tensors their paths.

  Args:
    header: of the file.
    name_map: names and layouts.

  Returns:
    `(leaves, unknown)`: the tensor's name, and shape in the leaf's layout and
    dtype, by path; and a line for each tensor that has no place.
  """
  leaves, unknown = {}, []
  for name, tensor in header.tensors.items():
    if name in name_map.ignored:
      continue
    path = name_map.to_path(name)
    if path is None or name_map.to_name(path) != name:
      unknown.append(name)
      continue
    axes = name_map.axes(path)
    if axes is not None and len(axes) != len(tensor.shape):
      unknown.append(f'{name} (of shape {list(tensor.shape)})')
      continue
    shape = tensor.shape
    shape = shape if axes is None else tuple(shape[a] for a in axes)
    leaves[path] = name, jax.ShapeDtypeStruct(shape, tensor.dtype)
  return leaves, unknown
