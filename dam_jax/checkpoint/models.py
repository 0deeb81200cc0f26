"""Models on disk, read leaf by leaf.

A `Model` says what its files hold and reads one leaf when asked for it: of
safetensors a view of the memory-mapped file, which costs no memory of its own
and may be used by several threads.

  >>> model = open_model({'w': np.ones((2, 3), np.float32)})
  >>> model.leaves
  {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
  >>> model.read('w').sum()
  np.float32(6.0)
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import mmap
import operator
import os
import pathlib
import re
from typing import Any

from etils import epath
import jax
import numpy as np

from dam_jax import tree
from dam_jax.checkpoint import headers
from dam_jax.checkpoint import state
from dam_jax.typing import Params

_FILE = 'model.safetensors'
_INDEX = '.safetensors.index.json'
# That Orbax may hold at a time.
_ORBAX_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A model whose leaves are read when they are asked for.

  Attributes:
    leaves: shape and the file's dtype of every leaf by its path, in the order
      of the files' bytes.
    read: maps a path to that leaf, read-only, in the file's dtype; several
      threads may call it. A file must not be cut short while it is read.
    files: that hold the weights, and the index of shards.
    folder: of a Hugging Face or an Orbax checkpoint.
    metadata: of the file; of shards, what all agree on.
    config: what config.json in the folder holds.
  """

  leaves: Mapping[str, jax.ShapeDtypeStruct]
  read: Callable[[str], np.ndarray]
  files: tuple[pathlib.Path, ...] = ()
  folder: pathlib.Path | None = None
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] | None = None


def open_model(
  source: epath.PathLike | Params | Model,
  *,
  name_map: headers.NameMap = headers.PATHS,
) -> Model:
  """Opens a model and reads no weight.

  Args:
    source: path of a safetensors file; of a Hugging Face folder that holds
      model.safetensors or shards and their index; of such an index; or of an
      Orbax checkpoint, of which a leaf is restored each time it is read, in
      memory of its own. Or a pytree of arrays, or a model, which is returned.
    name_map: names and layouts of safetensors.

  Returns:
    The model.

  Raises:
    ValueError: where there is no such model, a file is cut short or a pickle,
      the index and its shards differ, or a tensor has an unknown name or an
      unsupported dtype; with all that is wrong.
  """
  if isinstance(source, Model):
    return source
  if not isinstance(source, str | os.PathLike):
    return _of_pytree(source)
  path = pathlib.Path(source)
  if path.name.endswith(_INDEX):
    return _of_shards(path, name_map)
  if path.is_dir():
    return _of_folder(path, name_map)
  return _of_headers([headers.read_header(path)], name_map)


def nest(leaves: Mapping[str, Any]) -> Params:
  """Makes nested dicts of leaves by path.

  Args:
    leaves: by path.

  Returns:
    `{'a': {'b': x}}` for `{'a/b': x}`.

  Raises:
    ValueError: where a leaf's path goes on in another's (all of them).
  """
  nested: dict[str, Any] = {}
  parents = {p[:i] for p in leaves for i, c in enumerate(p) if c == '/'}
  headers.raise_if(sorted(parents & set(leaves)), 'both leaf and parent:')
  for path, leaf in leaves.items():
    *above, last = path.split('/')
    at = nested
    for parent in above:
      at = at.setdefault(parent, {})
    at[last] = leaf
  return nested


def _of_pytree(params: Params) -> Model:
  arrays = tree.flatten(params)
  headers.raise_if(
    [
      f'{path}: {type(x).__name__}'
      for path, x in arrays.items()
      if not isinstance(x, np.ndarray | np.generic | jax.Array)
    ],
    'neither a path nor a pytree of arrays:',
  )

  def read(path):
    array = np.asarray(arrays[path]).view()
    array.flags.writeable = False
    return array

  return Model(
    leaves={
      p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays.items()
    },
    read=read,
  )


def _of_headers(
  found: Sequence[headers.Header],
  name_map: headers.NameMap,
  folder: pathlib.Path | None = None,
) -> Model:
  leaves, views, unknown = {}, {}, []
  for header in found:
    named, lines = headers.to_leaves(header, name_map)
    unknown += lines
    data = _Map(header.path)
    for path, (name, struct) in named.items():
      leaves[path] = struct
      views[path] = functools.partial(
        _view, data, header.tensors[name], name_map.axes(path)
      )
  where = folder or found[0].path
  headers.raise_if(sorted(unknown), f'{where}: unexpected tensors:')
  agreed = functools.reduce(
    operator.and_, (header.metadata.items() for header in found)
  )
  config = folder / 'config.json' if folder else None
  return Model(
    leaves=leaves,
    read=lambda path: views[path](),
    files=tuple(header.path for header in found),
    folder=folder,
    metadata=dict(agreed),
    config=headers.read_json(config) if config and config.exists() else None,
  )


class _Map:
  """A memory-mapped file of which about one tensor stays in memory."""

  def __init__(self, path: pathlib.Path):
    mapped = np.memmap(path, np.uint8, mode='r')
    self._map: Any = mapped.base
    self._bytes = mapped.view(np.ndarray)
    self._last = 0, 0

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns a view, and lets go of what the one before it has read."""
    begin, end = self._last
    self._last = start, stop
    if hasattr(mmap, 'MADV_DONTNEED') and end > begin:
      # Whoever still reads there has it read from the file once more.
      begin -= begin % mmap.PAGESIZE
      self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
    return self._bytes[start:stop]


def _view(
  data: _Map, tensor: headers.Tensor, axes: Sequence[int] | None
) -> np.ndarray:
  array = data.read(tensor.start, tensor.stop).view(tensor.dtype)
  array = array.reshape(tensor.shape)
  return array if axes is None else array.transpose(axes)


def _of_folder(folder: pathlib.Path, name_map: headers.NameMap) -> Model:
  file, index = folder / _FILE, folder / f'model{_INDEX}'
  if file.exists() and index.exists():
    raise ValueError(f'{folder}: holds {_FILE} and an index: name one of them')
  if file.exists():
    return _of_headers([headers.read_header(file)], name_map, folder)
  if index.exists():
    return _of_shards(index, name_map)
  if state.is_state(folder):
    leaves, read = state.open_state(folder)
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return Model(leaves=leaves, read=read, files=tuple(files), folder=folder)
  if (folder / 'adapter_config.json').exists():
    raise ValueError(f'{folder}: a LoRA, not a model: use open_lora')
  for path in sorted(folder.iterdir()):
    if headers.is_pickle(path):
      raise ValueError(headers.pickled(path))
  raise ValueError(
    f'{folder}: no model: want {_FILE}, model{_INDEX} or an Orbax checkpoint'
  )


def _of_shards(index: pathlib.Path, name_map: headers.NameMap) -> Model:
  folder = index.parent
  weight_map = headers.read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{index}: no weight_map')
  # A name, not a path: what an index says must not lead out of the folder.
  headers.raise_if(
    [
      f'{name}: {file!r}'
      for name, file in weight_map.items()
      if not isinstance(file, str)
      or not re.fullmatch(r'[^/\\\0]+\.safetensors', file)
    ],
    f'{index}: not names of safetensors files:',
  )
  stem = re.escape(index.name.removesuffix(_INDEX))
  also = re.compile(rf'{stem}-\d+-of-\d+\.safetensors')
  names = set(weight_map.values())
  lines = [
    f'{path.name}: not in the index'
    for path in sorted(folder.iterdir())
    if also.fullmatch(path.name) and path.name not in names
  ]
  found, where = [], {}
  for name in sorted(names):
    try:
      found.append(headers.read_header(folder / name))
    except ValueError as e:
      lines.append(str(e))
      where |= {
        tensor: name for tensor, file in weight_map.items() if file == name
      }
  for header in found:
    for tensor in header.tensors:
      want, got = weight_map.get(tensor), header.path.name
      if want is None:
        lines.append(f'{tensor}: in {got}, not in the index')
      elif want != got:
        lines.append(f'{tensor}: in {got}, the index says {want}')
      where.setdefault(tensor, got)
  lines += [
    f'{tensor}: in the index for {file}, not there'
    for tensor, file in weight_map.items()
    if tensor not in where
  ]
  headers.raise_if(lines, f'{index}: differs from its shards:')
  model = _of_headers(found, name_map, folder)
  return dataclasses.replace(model, files=(*model.files, index))


def save_orbax(
  path: epath.PathLike, model: Model, *, overwrite: bool = False
) -> None:
  """Writes a model as an Orbax checkpoint, at once or not at all.

  Leaves are given to Orbax as the memory maps that they are, and written in the
  layout of a folder a leaf, which Orbax need not hold in memory. What a model
  computes when it is read is held until all is written. Several processes all
  call this, and each reads and writes its part of every leaf that has an axis
  which their devices divide, in those devices' memory; the first one the rest.

  Args:
    path: of a folder.
    model: what to write: a nested dict by the leaves' paths.
    overwrite: whether to replace what is at `path`.

  Raises:
    ValueError: where `path` exists and is not to be replaced.
  """
  from orbax.checkpoint import v1 as ocp  # slow to import, rarely needed

  path = epath.Path(path).resolve()
  if path.exists() and not overwrite:
    raise ValueError(f'{path} exists: pass overwrite=True to replace it')
  leaves: Any = nest({p: _part(model, p) for p in model.leaves})
  context = ocp.Context()
  context.array.saving.use_ocdbt = False
  context.array.saving.use_zarr3 = False
  context.memory.write_concurrent_bytes = _ORBAX_BYTES
  context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
  with context:
    ocp.save(path, leaves, overwrite=overwrite)


def _part(model: Model, path: str) -> np.ndarray | jax.Array:
  """Returns what this process is to write of a leaf, as Orbax takes it."""
  leaf, num = model.leaves[path], jax.device_count()
  divided = [
    axis for axis, size in enumerate(leaf.shape) if size and not size % num
  ]
  # JAX has no 64 bits unless it is told to.
  held = jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
  if jax.process_count() == 1 or not divided or not held:
    return model.read(path)
  mesh = jax.make_mesh((num,), ('all',))
  spec = jax.P(*[None] * divided[0], 'all')
  return jax.make_array_from_callback(
    leaf.shape,
    jax.sharding.NamedSharding(mesh, spec),
    lambda index: model.read(path)[index],
  )
