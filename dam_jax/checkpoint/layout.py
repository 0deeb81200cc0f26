"""Where each tensor lies in the files of a model to be written."""

from collections.abc import Mapping
import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np

from dam_jax.checkpoint import headers

INDEX = 'model.safetensors.index.json'
FILE = 'model.safetensors'

# Data begins at a page: the header keeps its room when a run that goes on has
# other metadata.
_PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is written of a leaf: the tensor's name, shape and dtype."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
  """A safetensors file to be written.

  Attributes:
    name: of the file.
    header: all bytes before the data.
    starts: first byte of each leaf in the file, by path.
    size: of the file, in bytes.
  """

  name: str
  header: bytes
  starts: Mapping[str, int]
  size: int


def split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
  """Splits tensors into shards as Hugging Face's libraries do.

  Args:
    sizes: bytes of each, by name, in the order to be filled in.
    max_bytes: of a shard; a tensor that is larger has one of its own.

  Returns:
    The names in each shard.

  Examples:
    >>> split({'a': 3, 'b': 9, 'c': 2, 'd': 4}, 6)
    [['b'], ['a', 'c'], ['d']]
  """
  shards: list[list[str]] = []
  last: list[str] = []
  room = max_bytes
  for name, size in sizes.items():
    if size > max_bytes:
      shards.append([name])
      continue
    if size > room:
      shards.append(last)
      last, room = [], max_bytes
    last.append(name)
    room -= size
  return [*shards, last] if last else shards


def shards(
  specs: Mapping[str, Spec],
  *,
  file: str | None,
  max_bytes: int,
  metadata: Mapping[str, str],
) -> list[Shard]:
  """Gives every tensor its place.

  Args:
    specs: by path of the leaf, in the order to be filled in.
    file: name of the one file; None names them as Hugging Face does.
    max_bytes: of the tensors in a file where there may be several.
    metadata: of each file.

  Returns:
    The files.
  """
  if file is not None:
    return [_shard(file, specs, metadata)]
  parts = split({p: spec.size for p, spec in specs.items()}, max_bytes)
  names = [
    f'model-{i:05d}-of-{len(parts):05d}.safetensors'
    for i in range(1, len(parts) + 1)
  ]
  return [
    _shard(name, {p: specs[p] for p in part}, metadata)
    for name, part in zip(names if parts[1:] else [FILE], parts, strict=True)
  ]


def _shard(
  name: str, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> Shard:
  # Wide dtypes first, so that every tensor is aligned.
  specs = dict(sorted(specs.items(), key=lambda i: -i[1].dtype.itemsize))
  ends = list(itertools.accumulate(s.size for s in specs.values()))
  begins = [0, *ends[:-1]]
  entries: dict[str, Any] = {'__metadata__': dict(metadata)}
  for spec, offsets in zip(
    specs.values(), zip(begins, ends, strict=True), strict=True
  ):
    entries[spec.name] = {
      'dtype': headers.CODES[spec.dtype],
      'shape': spec.shape,
      'data_offsets': offsets,
    }
  text = json.dumps(entries, ensure_ascii=False, separators=(',', ':')).encode()
  text += b' ' * (-(len(text) + 8) % _PAGE)
  header = len(text).to_bytes(8, 'little') + text
  starts = [len(header) + begin for begin in begins]
  return Shard(
    name,
    header,
    dict(zip(specs, starts, strict=True)),
    len(header) + ends[-1],
  )


def index(specs: Mapping[str, Spec], found: list[Shard]) -> bytes:
  """Returns the text of model.safetensors.index.json.

  Args:
    specs: by path of the leaf.
    found: the files.
  """
  content = {
    'metadata': {'total_size': sum(spec.size for spec in specs.values())},
    'weight_map': {specs[p].name: s.name for s in found for p in s.starts},
  }
  return (json.dumps(content, indent=2, sort_keys=True) + '\n').encode()
