"""What the runners of the peers share: jobs in, merged tensors out.

A runner is `python -m benchmarks.peer_<name> FOLDER <name>` in the peer's own
environment, which needs neither JAX nor dam_jax. It reads the jobs in
`FOLDER/<name>.jobs.json`, has the peer merge the safetensors files of each and
writes `FOLDER/merged/<out>.safetensors`, and what it ran to
`FOLDER/<name>.versions.json`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
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


def _read(path: Path) -> State:
  # Copied: a tensor of a file is a map of it.
  return {name: x.clone() for name, x in load_file(path).items()}


def save(state: State, path: str | Path) -> None:
  """Writes what a peer merged."""
  save_file({n: x.detach().contiguous() for n, x in state.items()}, path)


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
    num: of experts, the first ones; None: all that there are.
  """

  folder: Path
  method: str
  options: dict[str, Any]
  inputs: str
  out: str
  num: int | None = None

  @property
  def paths(self) -> list[Path]:
    """The experts' files, in their order."""
    found = self.folder.glob('expert_*.safetensors')
    numbered = sorted(found, key=lambda path: int(path.stem.split('_')[1]))
    return numbered[: self.num]

  @functools.cached_property
  def base(self) -> State:
    return _read(self.folder / 'base.safetensors')

  @functools.cached_property
  def experts(self) -> list[State]:
    return [_read(path) for path in self.paths]

  def each(self, name: str) -> list[State]:
    """Returns what a file `[K, ...]` has for each expert."""
    stacked = load_file(self.folder / f'{name}.safetensors')
    num = len(self.experts)
    return [{n: x[k] for n, x in stacked.items()} for k in range(num)]


@contextlib.contextmanager
def given_draws(draws: Sequence[torch.Tensor]) -> Iterator[None]:
  """Puts given draws in place of torch's: kept is what exceeds 1 - p.

  Args:
    draws: uniform, one a call, in the order of the calls.

  Raises:
    RuntimeError: where some of them, but not all, were drawn.
  """
  queue = list(draws)

  def rand_like(tensor: torch.Tensor) -> torch.Tensor:
    return queue.pop(0).reshape(tensor.shape)

  def bernoulli(probability: torch.Tensor) -> torch.Tensor:
    kept = rand_like(probability) > 1 - probability
    return kept.to(probability.dtype)

  with mock.patch.multiple(torch, rand_like=rand_like, bernoulli=bernoulli):
    yield
  if 0 < len(queue) < len(draws):
    raise RuntimeError(f'{len(queue)} of {len(draws)} draws are left')


def run(merge: Callable[[Job], State], packages: Sequence[str]) -> None:
  """Runs every job of the folder that the command names."""
  folder, name = Path(sys.argv[1]), sys.argv[2]
  (folder / 'merged').mkdir(exist_ok=True)
  for fields in json.loads((folder / f'{name}.jobs.json').read_text()):
    job = Job(**fields | {'folder': folder / fields['folder']})
    save(merge(job), folder / 'merged' / f'{job.out}.safetensors')
  versions = {p: importlib.metadata.version(p) for p in (*packages, 'torch')}
  versions['python'] = platform.python_version()
  (folder / f'{name}.versions.json').write_text(json.dumps(versions))
