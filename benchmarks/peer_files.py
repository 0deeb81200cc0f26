"""What the runners of the peers share: jobs in, merged tensors out.

A runner is `python -m benchmarks.peer_<name> FOLDER` in the peer's own
environment. It reads `FOLDER/jobs.json`, runs the peer's code on each job's
safetensors files and writes `FOLDER/merged/<job>.safetensors`, and the
versions that it ran to `FOLDER/<name>.json`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
import platform
import sys
from typing import Any
from unittest import mock

from safetensors.torch import load_file
from safetensors.torch import save_file
import torch

State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Job:
  """One merge of a peer.

  Attributes:
    folder: of the model files.
    method: the peer's name of the method.
    options: the peer's options.
    inputs: 'base': the base and its experts; 'experts': these alone; 'first':
      these, the first of them in the base's place.
    out: the name of the merged file.
  """

  folder: Path
  method: str
  options: dict[str, Any]
  inputs: str
  out: str

  @functools.cached_property
  def base(self) -> State:
    return load_file(self.folder / 'base.safetensors')

  @functools.cached_property
  def experts(self) -> list[State]:
    paths = sorted(self.folder.glob('expert_*.safetensors'))
    return [load_file(path) for path in paths]

  def each(self, name: str) -> list[State]:
    """Returns what a file `[K, ...]` has for each expert."""
    stacked = load_file(self.folder / f'{name}.safetensors')
    num = len(self.experts)
    return [{n: x[k] for n, x in stacked.items()} for k in range(num)]


@dataclasses.dataclass
class Draws:
  """Given draws in place of torch's: an entry is kept where it is above 1 - p.

  Attributes:
    queue: uniform draws, one tensor a call, in the order of the calls.
  """

  queue: list[torch.Tensor]

  def _next(self, like: torch.Tensor) -> torch.Tensor:
    return self.queue.pop(0).reshape(like.shape)

  def rand_like(self, tensor: torch.Tensor) -> torch.Tensor:
    return self._next(tensor)

  def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
    kept = self._next(probability) > 1 - probability
    return kept.to(probability.dtype)

  def patch(self) -> Any:
    return mock.patch.multiple(
      torch, rand_like=self.rand_like, bernoulli=self.bernoulli
    )


def run(merge: Callable[[Job], State], packages: Sequence[str]) -> None:
  """Runs every job of the folder that the command names."""
  folder, name = Path(sys.argv[1]), sys.argv[2]
  (folder / 'merged').mkdir(exist_ok=True)
  for fields in json.loads((folder / f'{name}.jobs.json').read_text()):
    job = Job(**fields | {'folder': folder / fields['folder']})
    merged = {n: x.detach().contiguous() for n, x in merge(job).items()}
    save_file(merged, folder / 'merged' / f'{job.out}.safetensors')
  versions = {p: importlib.metadata.version(p) for p in (*packages, 'torch')}
  versions['python'] = platform.python_version()
  (folder / f'{name}.versions.json').write_text(json.dumps(versions))
