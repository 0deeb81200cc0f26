"""Records of merges: what a merged model is made of."""

from collections.abc import Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from typing import Any

from etils import epath

import dam_jax
from dam_jax.checkpoint import models


def file_hash(path: epath.PathLike) -> str:
  """Returns a file's SHA-256 in hexadecimal.

  Args:
    path: of the file.
  """
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def file_hashes(paths: Mapping[str, epath.PathLike]) -> dict[str, str]:
  """Returns the SHA-256 of several files, which are read side by side.

  A core hashes about a gigabyte a second. Nothing is remembered from call to
  call: by its size and the time of its last change, a file that was put in
  place of another would be taken for it.

  Args:
    paths: by any name.

  Returns:
    In hexadecimal, by name, in the same order.

  Examples:
    >>> import tempfile
    >>> path = epath.Path(tempfile.mkdtemp()) / 'a'
    >>> path.touch()
    >>> file_hashes({'empty': path})['empty'][:8]
    'e3b0c442'
  """
  with futures.ThreadPoolExecutor() as executor:
    return dict(
      zip(paths, executor.map(file_hash, paths.values()), strict=True)
    )


def model_hashes(model: models.Model) -> dict[str, str]:
  """Returns the SHA-256 of every file of a model.

  Args:
    model: as `open_model` returns it.

  Returns:
    In hexadecimal, by the file's name in the model's folder.
  """

  def name(path):
    within = model.folder and path.is_relative_to(model.folder)
    return str(path.relative_to(model.folder)) if within else path.name

  return file_hashes({name(path): path for path in model.files})


def combined_hash(hashes: Mapping[str, str]) -> str:
  """Returns one SHA-256 for a model of one or several files.

  Args:
    hashes: of its files by name.

  Returns:
    That of the only file; of several that of the lines `<hash>  <name>`, sorted
    by name, as `sha256sum` prints them.

  Examples:
    >>> combined_hash({'model.safetensors': 'a1'})
    'a1'
  """
  if len(hashes) == 1:
    return next(iter(hashes.values()))
  lines = ''.join(f'{hashes[name]}  {name}\n' for name in sorted(hashes))
  return hashlib.sha256(lines.encode()).hexdigest()


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
    references: of the method, in Markdown.
    rules: pairs of a pattern of paths and what was done with these leaves.
    files: SHA-256 of each file by its name, of each model by its name.
    dtype: of the floating-point leaves as written; None is each leaf's own.
    command: that makes the model again.
    license: what the base's card says of it, as `read_license` returns it.
    security: report of the tests for backdoors, JSON values; None is none.
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
  references: Sequence[str] = dataclasses.field(default_factory=list)
  rules: Sequence[Sequence[str]] = dataclasses.field(default_factory=list)
  files: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )
  dtype: str | None = None
  command: str | None = None
  license: Mapping[str, str] = dataclasses.field(default_factory=dict)
  security: Mapping[str, Any] | None = None

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
  # This one may be a checkout that was never installed.
  found = {'dam_jax': dam_jax.__version__}
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found
