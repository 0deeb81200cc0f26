"""Files in and out, for `benchmarks.worker`: each kind, and plain copies.

Every kind holds the same arrays: those of a tower with the names and shapes of
CLIP's. A copy moves as many bytes as the kind's files have.
"""

from collections.abc import Callable, Mapping
import contextlib
import ctypes
import functools
import mmap
import os
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import merge_runs
from benchmarks.worker import Job
from benchmarks.worker import measure
import dam_jax as dj
from dam_jax import checkpoint

_BLOCK = 1 << 24
SOURCE = 'source.bin'


class Kind(NamedTuple):
  """A way to keep arrays in files.

  Attributes:
    hold: makes of arrays by path what is saved.
    save: writes it into a folder.
    restore: reads it: arrays by path, all of their bytes in memory.
    flushes: whether what it writes is on the disk when it returns.
  """

  hold: Callable[[Mapping[str, np.ndarray]], Any]
  save: Callable[[Path, Any], None]
  restore: Callable[[Path, Any], Mapping[str, Any]]
  flushes: bool


def _save_params(folder: Path, arrays: Any) -> None:
  checkpoint.save_params(folder / 'model.safetensors', arrays)


def _load_params(folder: Path, arrays: Any) -> Mapping[str, Any]:
  del arrays
  return dj.tree.flatten(checkpoint.load_params(folder / 'model.safetensors'))


def _write_leaves(folder: Path, arrays: Any) -> None:
  leaves = {
    p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays.items()
  }
  path = folder / 'model.safetensors'
  with checkpoint.ModelWriter(path, leaves, overwrite=True) as writer:
    for leaf, x in arrays.items():
      writer.put(leaf, x)


def _read_leaves(folder: Path, arrays: Any) -> Mapping[str, Any]:
  del arrays
  model = checkpoint.open_model(folder / 'model.safetensors')
  # A leaf is a view of the file, which is read when it is copied.
  return {leaf: np.array(model.read(leaf)) for leaf in model.leaves}


def _save_orbax(folder: Path, model: Any) -> None:
  checkpoint.save_orbax(folder / 'model', model, overwrite=True)


def _load_orbax(folder: Path, model: Any) -> Mapping[str, Any]:
  del model
  return dj.tree.flatten(checkpoint.load_params(folder / 'model'))


def _state(arrays: Mapping[str, np.ndarray]) -> Any:
  params = {p: jnp.array(x) for p, x in arrays.items()}
  return {'params': params, 'key': jax.random.key(0)}


def _save_state(folder: Path, state: Any) -> None:
  with checkpoint.Saves(folder / 'states') as saves:
    newest = saves.steps[-1] if saves.steps else 0
    saves.save(newest + 1, state, {'loss': np.zeros(10)})


def _load_state(folder: Path, state: Any) -> Mapping[str, Any]:
  with checkpoint.Saves(folder / 'states') as saves:
    save = saves.restore(state)
  if save is None:
    raise ValueError(f'{folder}: no save')
  return jax.block_until_ready(save.state)['params']


KINDS = {
  'state': Kind(_state, _save_state, _load_state, flushes=True),
  'safetensors': Kind(dict, _save_params, _load_params, flushes=False),
  'leaves': Kind(dict, _write_leaves, _read_leaves, flushes=True),
  'orbax': Kind(checkpoint.open_model, _save_orbax, _load_orbax, flushes=True),
}
"""`Saves`, as learned merges keep their states; `save_params` and
`load_params`; `ModelWriter` and `open_model`, leaf by leaf, as `dam-jax merge`
does; `save_orbax`, and `load_params` of that."""


def files(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file())


def size(folder: Path) -> int:
  """Returns bytes of all files of a folder."""
  return sum(path.stat().st_size for path in files(folder))


def drop_pages(folder: Path) -> None:
  """Asks the system to forget what it holds of files; no right is needed."""
  for path in files(folder):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)  # what is not on the disk cannot be forgotten
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)


def share_held(folder: Path) -> float:
  """Returns the share of files' pages that are in the system's memory."""
  held = pages = 0
  for path in files(folder):
    if not path.stat().st_size:
      continue
    mapped = np.memmap(path, np.uint8, mode='r')
    found = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    ctypes.CDLL(None, use_errno=True).mincore(
      ctypes.c_void_p(mapped.ctypes.data),
      ctypes.c_size_t(mapped.size),
      ctypes.c_void_p(found.ctypes.data),
    )
    held, pages = held + int((found & 1).sum()), pages + found.size
  return held / max(1, pages)


def copy(source: Path, target: Path | None, flush: bool) -> None:
  """Copies a file, or reads it where there is no target."""
  block = bytearray(_BLOCK)
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(source.open('rb', buffering=0))
    out = target and stack.enter_context(target.open('wb', buffering=0))
    while count := file.readinto(block):
      if out:
        out.write(memoryview(block)[:count])
    if out and flush:
      os.fsync(out.fileno())


def _plain(
  folder: Path, drop: bool, target: str, flush: bool, result: Any
) -> dict[str, float]:
  """Returns seconds of copying the source, or of reading it."""
  del result
  if drop:
    drop_pages(folder)
  job = Job(
    prepare=lambda: None,
    run=lambda _: copy(
      folder / SOURCE, folder / target if target else None, flush
    ),
    about={},
  )
  return measure(job, None)[0]


def _held(folder: Path, result: Any) -> float:
  """Returns what is left in memory where pages are dropped."""
  del result
  drop_pages(folder)
  return share_held(folder)


def _arrays(width: int, layers: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    name.replace('.', '/'): rng.standard_normal(shape, np.float32)
    for name, shape in merge_runs.tower_shapes(width, layers).items()
  }


def _same(arrays: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> bool:
  return arrays.keys() == found.keys() and all(
    np.array_equal(x, np.asarray(found[leaf])) for leaf, x in arrays.items()
  )


def load(
  *,
  folder: str,
  kind: str,
  direction: str,
  drop: bool,
  width: int,
  layers: int,
) -> Job:
  """Writes what is to be read, and says how many bytes there are.

  Args:
    folder: to write into.
    kind: one of `KINDS`.
    direction: 'save' or 'restore'.
    drop: whether the system is to forget the pages of what is read.
    width: of the tower.
    layers: of it.

  Returns:
    A job that runs the kind, with requests 'copy' and 'read' that return
    seconds of copying and reading as many bytes of a file, and 'same', whether
    what was read is what was written.
  """
  at = Path(folder) / f'{kind}_{direction}'
  shutil.rmtree(at, ignore_errors=True)
  at.mkdir(parents=True)
  chosen, arrays = KINDS[kind], _arrays(width, layers)
  held = chosen.hold(arrays)
  chosen.save(at, held)
  same = _same(arrays, chosen.restore(at, held))
  total, plain = size(at), Path(folder) / 'plain'
  plain.mkdir(exist_ok=True)
  (plain / SOURCE).write_bytes(os.urandom(total))

  def prepare():
    if drop:
      drop_pages(at)

  def run(_):
    if direction == 'save':
      return chosen.save(at, held)
    return chosen.restore(at, held)

  flush = chosen.flushes and direction == 'save'
  return Job(
    prepare=prepare,
    run=run,
    about={
      'bytes': total,
      'same': same,
      'flushed': flush,
      'versions': checkpoint.versions(),
    },
    requests={
      'copy': functools.partial(_plain, plain, drop, 'target.bin', flush),
      'read': functools.partial(_plain, plain, drop, '', False),
      'held': functools.partial(_held, at),
    },
  )
