"""Files: safetensors in and out, records of merges, and states of runs.

Headers are compared before any weight is read, weights are read once, straight
into the stacked tree, and nothing is ever unpickled. What is written goes to a
temporary name first and is then moved into place.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dam_jax import tree
from dam_jax.typing import Params

_DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': jnp.dtype('bfloat16'),
  'I64': np.dtype('int64'),
  'I32': np.dtype('int32'),
  'BOOL': np.dtype('bool'),
}


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
class _Header:
  """A safetensors file's contents, unread.

  Attributes:
    path: of the file.
    tensors: by leaf path, shape in the leaf's layout and dtype.
    metadata: of the file.
  """

  path: str
  tensors: dict[str, jax.ShapeDtypeStruct]
  metadata: dict[str, str]


@contextlib.contextmanager
def _opened(path: epath.PathLike):
  try:
    with safetensors.safe_open(os.fspath(path), framework='numpy') as file:
      yield file
  except FileNotFoundError as e:
    raise ValueError(f'{path}: no such file') from e
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{path}: not a readable safetensors file: {e}') from e


def _header(path: epath.PathLike, name_map: NameMap) -> _Header:
  tensors, unknown = {}, []
  with _opened(path) as file:
    for name in file.keys():  # noqa: SIM118 - not a mapping
      if name in name_map.ignored:
        continue
      leaf = name_map.to_path(name)
      if leaf is None:
        unknown.append(name)
        continue
      info = file.get_slice(name)
      shape, dtype = tuple(info.get_shape()), info.get_dtype()
      if dtype not in _DTYPES:
        raise ValueError(f'{path}: {name} is {dtype}, which is not supported')
      axes = name_map.axes(leaf)
      if axes is not None and len(axes) != len(shape):
        unknown.append(f'{name} (of shape {list(shape)})')
        continue
      shape = tuple(shape[a] for a in axes) if axes is not None else shape
      tensors[leaf] = jax.ShapeDtypeStruct(shape, _DTYPES[dtype])
    metadata = file.metadata() or {}
  if unknown:
    raise ValueError(
      '\n  '.join([f'{path}: unexpected tensors:', *sorted(unknown)])
    )
  return _Header(os.fspath(path), tensors, metadata)


def _nest(leaves: Mapping[str, Any]) -> Params:
  nested: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split('/')
    at = nested
    for parent in parents:
      at = at.setdefault(parent, {})
    at[last] = leaf
  return nested


def _read(
  header: _Header,
  name_map: NameMap,
  into: Mapping[str, np.ndarray],
) -> list[str]:
  """Fills arrays with a file's tensors; returns what is not finite."""
  bad = []
  with _opened(header.path) as file:
    for path, out in into.items():
      tensor = file.get_tensor(name_map.to_name(path))
      axes = name_map.axes(path)
      out[...] = tensor if axes is None else tensor.transpose(axes)
      floating = jnp.issubdtype(out.dtype, jnp.floating)
      if floating and not np.isfinite(out).all():
        count = int(out.size - np.isfinite(out).sum())
        bad.append(f'{header.path}: {path}: {count} of {out.size} not finite')
  return bad


def _empty(header: _Header, lead: tuple[int, ...], dtype: Any):
  def make(struct):
    floating = jnp.issubdtype(struct.dtype, jnp.floating)
    return np.empty((*lead, *struct.shape), dtype if floating else struct.dtype)

  return {path: make(s) for path, s in header.tensors.items()}


def _raise_if(lines: Sequence[str], head: str) -> None:
  if lines:
    raise ValueError('\n  '.join([head, *lines]))


def load_abstract(path: epath.PathLike, *, name_map: NameMap = PATHS) -> Params:
  """Reads the names, shapes and dtypes of a safetensors file.

  Args:
    path: of the file.
    name_map: names and layouts.

  Returns:
    A pytree of `jax.ShapeDtypeStruct`s, in the file's dtypes.

  Raises:
    ValueError: where the file cannot be read or has an unknown tensor.
  """
  return _nest(_header(path, name_map).tensors)


def load_params(
  path: epath.PathLike,
  *,
  name_map: NameMap = PATHS,
  like: Params | None = None,
  dtype: Any = np.float32,
) -> Params:
  """Reads a model from a safetensors file.

  Args:
    path: of the file.
    name_map: names and layouts, such as `dam_jax.models.convert.clip_vision`.
    like: a pytree, abstract or not, whose names and shapes it must have.
    dtype: of the floating-point leaves, whatever the file's.

  Returns:
    A nested dict of NumPy arrays.

  Raises:
    ValueError: where the file cannot be read, differs from `like` (all
      differences), or has values that are not finite (all tensors).
  """
  header = _header(path, name_map)
  if like is not None:
    lines = tree.differences(like, _nest(header.tensors), dtypes=False)
    _raise_if(lines, f'{path} does not fit the model:')
  arrays = _empty(header, (), dtype)
  _raise_if(_read(header, name_map, arrays), 'weights:')
  return _nest(arrays)


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
  base_header = _header(base, name_map)
  headers = {name: _header(path, name_map) for name, path in experts.items()}
  wanted = _nest(base_header.tensors)
  if like is not None:
    lines = tree.differences(like, wanted, dtypes=False)
    _raise_if(lines, f'{base} does not fit the model:')
  tree.check_compatible(
    wanted, {name: _nest(h.tensors) for name, h in headers.items()}
  )
  arrays = _empty(base_header, (), dtype)
  stacked = _empty(base_header, (len(headers),), dtype)
  bad = _read(base_header, name_map, arrays)
  for k, header in enumerate(headers.values()):
    bad += _read(header, name_map, {p: x[k] for p, x in stacked.items()})
  _raise_if(bad, 'weights:')
  return _nest(arrays), _nest(stacked)


def load_metadata(path: epath.PathLike) -> dict[str, str]:
  """Reads the metadata of a safetensors file."""
  with _opened(path) as file:
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
  _raise_if(unnamed, 'leaves that have no name in the file:')
  tensors, overflow = {}, []
  for leaf, value in leaves.items():
    array = np.asarray(value)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
      with np.errstate(over='ignore'):
        cast = array.astype(dtype)
      if np.isfinite(array).all() and not np.isfinite(cast).all():
        overflow.append(leaf)
      array = cast
    axes = name_map.axes(leaf)
    if axes is not None:
      array = array.transpose(np.argsort(axes))
    tensors[name_map.to_name(leaf)] = np.asarray(array, order='C')
  _raise_if(overflow, f'leaves that {dtype} cannot hold:')
  with replacing(path) as temporary:
    save_file(tensors, temporary, metadata=dict(metadata or {'format': 'pt'}))


def file_hash(path: epath.PathLike) -> str:
  """Returns a file's SHA-256 in hexadecimal.

  Args:
    path: of the file.
  """
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRecord:
  """What a merged model is made of, to be kept beside it.

  Attributes:
    method: its name.
    hyperparameters: of the method, JSON values.
    seed: of its randomness.
    base: name of the base and its file's SHA-256.
    experts: names of the experts and their files' SHA-256, in order.
    versions: of the packages that computed it.
    created: time in UTC, ISO 8601.
    extra: anything else, JSON values.
  """

  method: str
  hyperparameters: Mapping[str, Any]
  seed: int
  base: Mapping[str, str]
  experts: Mapping[str, str]
  versions: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: versions()
  )
  created: str = dataclasses.field(
    default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(
      timespec='seconds'
    )
  )
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> str:
    """Returns the record as JSON."""
    return json.dumps(dataclasses.asdict(self), indent=2)

  @classmethod
  def from_json(cls, text: str) -> 'MergeRecord':
    """Reads what `to_json` wrote."""
    return cls(**json.loads(text))

  def metadata(self) -> dict[str, str]:
    """Returns the record as a safetensors file's metadata."""
    return {'format': 'pt', 'merge_record': self.to_json()}


def versions() -> dict[str, str]:
  """Returns the versions of this package and of those that it computes with."""
  packages = ('dam_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
  found = {}
  for name in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )


def _key_data(state: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if _is_key(x) else x, state
  )


def save_state(path: epath.PathLike, state: Any) -> None:
  """Writes the state of a run with Orbax, at once or not at all.

  Args:
    path: of a folder, replaced where it exists.
    state: a pytree of arrays; typed PRNG keys are kept as their data.
  """
  from orbax.checkpoint import v1 as ocp  # slow to import, rarely needed

  ocp.save(epath.Path(path).resolve(), _key_data(state), overwrite=True)


def restore_state(path: epath.PathLike, like: Any) -> Any:
  """Reads what `save_state` wrote.

  Args:
    path: of the folder.
    like: a state of the same structure, whose arrays or `ShapeDtypeStruct`s
      say shapes, dtypes and shardings; typed PRNG keys must be arrays.

  Returns:
    The state.

  Raises:
    ValueError: where there is no such folder.
  """
  from orbax.checkpoint import v1 as ocp

  path = epath.Path(path).resolve()
  if not path.exists():
    raise ValueError(f'{path}: no such state')
  data = ocp.load(path, _key_data(like))
  return jax.tree.map(
    lambda old, new: (
      jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
      if _is_key(old)
      else new
    ),
    like,
    data,
  )
