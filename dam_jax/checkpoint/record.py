"""Records of merges: what a merged model is made of."""

from collections.abc import Mapping
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from typing import Any

from etils import epath


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
