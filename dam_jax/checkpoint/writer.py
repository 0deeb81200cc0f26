"""Models written leaf by leaf, whole or not at all, and resumed.

All shapes are known beforehand, so each leaf has its place in a file before
any is written: leaves may come in any order and from several threads, and a
journal of those that are on disk lets an interrupted run go on.
"""

from collections.abc import Iterable, Mapping
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import threading
import time
from typing import Any, Self

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.checkpoint import beside
from dam_jax.checkpoint import headers
from dam_jax.checkpoint import layout
from dam_jax.checkpoint import tensors
from dam_jax.distributed import Hosts

_DTYPES = (None, 'float32', 'bfloat16', 'float16')
# Entries that are cast and written at a time.
_BLOCK = 1 << 24
# Between flushes: that of a small leaf takes far longer than its write.
_FLUSH_SECONDS = 1.0


class ModelWriter:
  """Writes a model leaf by leaf; it appears whole or not at all.

  Leaves go to a hidden folder beside the target and are flushed to the disk
  once a second. An exception or a kill leaves no target, and the next run with
  the same plan and leaves goes on from there; a kill loses the leaves of a
  second at most. Where a folder is replaced, the old one is set aside first, so
  that for an instant neither is there.

  Attributes:
    done: paths of the leaves that an interrupted run has written; they must
      not be put again.

  Examples:
    >>> import tempfile
    >>> leaves = {'w': jax.ShapeDtypeStruct((2,), jnp.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   with ModelWriter(f'{folder}/a', leaves, dtype='float16') as writer:
    ...     writer.put('w', np.ones(2, np.float32))
    ...   dj.checkpoint.open_model(f'{folder}/a').read('w')
    array([1., 1.], dtype=float16)
  """

  done: frozenset[str] = frozenset()

  def __init__(
    self,
    path: epath.PathLike,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | float = 5e9,
    metadata: Mapping[str, str] | None = None,
    carry: epath.PathLike | None = None,
    vocab_sizes: Mapping[int, int] | None = None,
    name_map: headers.NameMap = headers.PATHS,
    plan: Any = None,
    alias: Mapping[str, str] | None = None,
    overwrite: bool = False,
    hosts: Hosts | None = None,
  ):
    """Checks everything, and writes nothing yet.

    Args:
      path: of a file where it ends in .safetensors, else of a folder, which
        gets model.safetensors, or shards and their index.
      leaves: shape and dtype of all that is written, by path.
      dtype: of the floating-point leaves: 'float32', 'bfloat16' or 'float16';
        None keeps each leaf's.
      max_shard_bytes: of the tensors in a file where `path` is a folder.
      metadata: of each file; None is `{'format': 'pt'}`.
      carry: folder of a model whose config, tokenizer, processor, chat
        templates and licences are copied; config.json then says the dtype
        that is written.
      vocab_sizes: what each vocab_size in config.json becomes.
      name_map: names and layouts.
      plan: what the model is made of, JSON values: an interrupted run with
        the same plan goes on, another starts over; None always does.
      alias: leaves that share another's value, `{path: source}`: written with
        their source where `leaves` has them, and left out where it does not.
      overwrite: whether to replace what is at `path`.
      hosts: processes that write it together on a disk that all share, each
        leaf put by one of them; all of them open and close a writer.

    Raises:
      ValueError: where something of this makes no sense or `path` exists.
    """
    self._target = pathlib.Path(os.path.abspath(path))
    self._lone = self._target.suffix == '.safetensors'
    self._temporary = self._target.with_name(f'.{self._target.name}.partial')
    self._content = self._temporary / 'model'
    self._carry = None if carry is None else pathlib.Path(carry)
    self._leaves, self._name_map = dict(leaves), name_map
    self._alias = {p: s for p, s in (alias or {}).items() if p in leaves}
    self._overwrite, self._hosts = overwrite, hosts
    self._first = hosts is None or hosts.index == 0
    self._vocab_sizes = dict(vocab_sizes or {})
    self._refuse_existing()
    metadata = {'format': 'pt'} if metadata is None else dict(metadata)
    self._check(dtype, max_shard_bytes, metadata)
    self._specs = {p: self._spec(p, dtype) for p in self._leaves}
    self._shards = layout.shards(
      self._specs,
      file=self._target.name if self._lone else None,
      max_bytes=int(max_shard_bytes),
      metadata=metadata,
    )
    self._shard_of = {p: s for s in self._shards for p in s.starts}
    self._head = self._identity(plan)
    self._resumable = plan is not None
    self._lock = threading.Lock()
    self._taken: set[str] = set()  # by this process
    self._unflushed: list[str] = []
    self._flushed = 0.0
    self._overflow: list[str] = []
    self._files: dict[str, bytes] = {}
    self._stack = contextlib.ExitStack()
    self._journal: int | None = None

  def _check(self, dtype, max_shard_bytes, metadata) -> None:
    if dtype not in _DTYPES:
      raise ValueError(f'dtype: want one of {_DTYPES}, got {dtype!r}')
    if max_shard_bytes < 1:
      raise ValueError(f'max_shard_bytes: want at least 1: {max_shard_bytes}')
    if not self._leaves:
      raise ValueError('no leaves: there is nothing to write')
    if self._carry is not None and (self._lone or not self._carry.is_dir()):
      raise ValueError(
        f'carry: want a folder to copy from, into a folder: {self._carry}, '
        f'{self._target}'
      )
    names = {p: self._name_map.to_name(p) for p in self._leaves}
    lines = [f'{p}: has no name' for p, name in names.items() if name is None]
    lines += [
      f'{p}: {x.dtype} is not supported'
      for p, x in self._leaves.items()
      if np.dtype(x.dtype) not in headers.CODES
    ]
    if len(set(names.values())) < len(names):
      lines.append('two leaves have the same name')
    for path, source in self._alias.items():
      if source not in self._leaves or source in self._alias:
        lines.append(f'{path}: its source {source} is not written')
      elif self._laid_out(source) != self._laid_out(path):
        lines.append(f'{path}: its source {source} has another shape')
    lines += [
      f'metadata: {k!r}: {v!r} is no text'
      for k, v in metadata.items()
      if not isinstance(k, str) or not isinstance(v, str)
    ]
    headers.raise_if(lines, f'{self._target} cannot be written:')

  def _laid_out(self, path: str) -> tuple[tuple[int, ...], Any]:
    return tuple(self._leaves[path].shape), self._name_map.axes(path)

  def _spec(self, path: str, dtype: str | None) -> layout.Spec:
    leaf = self._leaves[path]
    shape, axes = self._laid_out(path)
    if axes is not None:
      shape = tuple(shape[a] for a in np.argsort(axes))
    cast = dtype is not None and _floating(leaf.dtype)
    return layout.Spec(
      name=self._name_map.to_name(path) or '',
      shape=shape,
      dtype=jnp.dtype(dtype if cast else leaf.dtype),
    )

  def _identity(self, plan: Any) -> bytes:
    """Returns the journal's first line, which says whose it is."""
    files = {shard.name: shard.size for shard in self._shards}
    specs = {
      p: repr((s, self._shard_of[p].starts[p])) for p, s in self._specs.items()
    }
    places = json.dumps([files, specs, self._alias], sort_keys=True).encode()
    digest = hashlib.sha256(places).hexdigest()
    try:
      head = json.dumps({'plan': plan, 'layout': digest}, sort_keys=True)
    except (TypeError, ValueError) as e:
      raise ValueError(f'plan: want JSON values: {e}') from e
    return head.encode() + b'\n'

  def _refuse_existing(self) -> None:
    target = self._target
    if not target.exists():
      return
    if not self._overwrite:
      raise ValueError(f'{target} exists: pass overwrite=True to replace it')
    if self._lone == target.is_dir():
      kind = 'folder' if self._lone else 'file'
      raise ValueError(f'{target} is a {kind}: it is not replaced')
    known = (target / layout.FILE, target / layout.INDEX)
    if not self._lone and not any(path.exists() for path in known):
      raise ValueError(f'{target} holds no model: it is not replaced')

  def __enter__(self) -> Self:
    with contextlib.ExitStack() as stack:
      if not self._first:
        self._of_all([])  # until the files are there
      self._temporary.mkdir(parents=True, exist_ok=True)
      number = self._hosts.index if self._hosts else 0
      journal = os.open(
        self._temporary / (f'journal_{number}' if number else 'journal'),
        os.O_RDWR | os.O_CREAT | os.O_APPEND,
        0o666,
      )
      stack.callback(os.close, journal)
      try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise ValueError(f'{self._target}: another process writes it') from e
      if self._first:
        self._refuse_existing()
      self._begin(journal)
      if self._first:
        self._of_all([])
      done = self._of_all(self._taken)
      shared = {p for p, s in self._alias.items() if s in done}
      self.done = frozenset(done | shared)
      self._journal, self._flushed = journal, time.monotonic()
      self._stack = stack.pop_all()
    return self

  def _of_all(self, paths: Iterable[str]) -> set[str]:
    """Returns what all processes were given, once they have come here."""
    if self._hosts is None:
      return {*paths}
    sent = self._hosts.exchange(json.dumps([*paths]).encode())
    return {path for each in sent for path in json.loads(each)}

  def _begin(self, journal: int) -> None:
    """Goes on where an interrupted run of this plan stopped, or starts over."""
    files = {self._content / s.name: s.size for s in self._shards}
    whole = all(p.exists() and p.stat().st_size == n for p, n in files.items())
    with open(journal, 'rb', closefd=False) as file:
      head, *lines = file.read().splitlines(keepends=True) or [b'']
    # The last line of a killed run may be cut short.
    lines = [line for line in lines if line.endswith(b'\n')]
    if self._resumable and whole and head == self._head:
      os.ftruncate(journal, len(head) + sum(map(len, lines)))
      self._taken |= {json.loads(line) for line in lines}
      if self._first:
        self._clear_all_but(set(files))
      logging.info('%s: goes on, %d leaves are done', self._target, len(lines))
      return
    os.ftruncate(journal, 0)
    os.fsync(journal)
    if self._first:
      if head:
        logging.warning(
          '%s: starts over: what an interrupted run left has another plan',
          self._target,
        )
      self._make_files(files)
    self._append(journal, self._head)
    _flush(self._temporary)

  def _make_files(self, files: Mapping[pathlib.Path, int]) -> None:
    for other in self._temporary.glob('journal_*'):
      other.unlink()
    _flush(self._temporary)
    self._content.mkdir(exist_ok=True)
    self._clear_all_but(set())
    need, free = sum(files.values()), shutil.disk_usage(self._content).free
    if need > free:
      raise ValueError(
        f'{self._target}: want {need} bytes of disk, {free} free'
      )
    for path, size in files.items():
      path.touch()
      os.truncate(path, size)
    _flush(self._content)

  def _clear_all_but(self, kept: set[pathlib.Path]) -> None:
    for path in set(self._content.iterdir()) - kept:
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()

  def _append(self, journal: int, line: bytes) -> None:
    os.write(journal, line)
    os.fsync(journal)

  def put(self, path: str, array: Any) -> None:
    """Writes a leaf; once a second, and at the end, what was put is flushed.

    Several threads may put leaves at the same time. A leaf that the dtype
    cannot hold is kept in mind, and an error at the end.

    Args:
      path: of the leaf.
      array: of the leaf's shape, in any memory layout; floating-point entries
        are rounded to the dtype that is written, others must have it.

    Raises:
      ValueError: where the leaf is not to be written, or was already, or has
        another shape or dtype.
    """
    array = np.asarray(array)
    with self._lock:
      self._open_journal(path)
      self._check_put(path, array)
      self._taken.add(path)
    places = [path, *(p for p, s in self._alias.items() if s == path)]
    try:
      fits = self._write_leaf(places, array)
    except BaseException:
      self._taken.discard(path)
      raise
    with self._lock:
      if not fits:
        self._overflow.append(path)
        return
      self._open_journal(path)
      self._unflushed.append(path)
      if time.monotonic() - self._flushed < _FLUSH_SECONDS:
        return
    self._flush_leaves()

  def _flush_leaves(self) -> None:
    """Brings leaves to the disk; only then the journal says that they are."""
    with self._lock:
      paths, self._unflushed = self._unflushed, []
      self._flushed = time.monotonic()
    if not paths:
      return
    places = {*paths, *(p for p, s in self._alias.items() if s in paths)}
    for shard in {self._shard_of[p].name for p in places}:
      _flush(self._content / shard)
    lines = ''.join(json.dumps(path) + '\n' for path in paths)
    self._append(self._open_journal(paths[0]), lines.encode())

  def _open_journal(self, path: str) -> int:
    if self._journal is None:
      raise ValueError(f'{path}: the writer is not open, use it with `with`')
    return self._journal

  def _check_put(self, path: str, array: np.ndarray) -> None:
    if path not in self._leaves:
      raise ValueError(f'{path}: no such leaf in this model')
    if path in self._alias:
      raise ValueError(f'{path}: is written with {self._alias[path]}')
    if path in self._taken:
      raise ValueError(f'{path}: was written before')
    want, dtype = self._leaves[path], self._specs[path].dtype
    rounded = _floating(array.dtype) and _floating(dtype)
    fits = array.dtype == dtype or rounded
    if array.shape != tuple(want.shape) or not fits:
      raise ValueError(
        f'{path}: got {array.dtype}{list(array.shape)}, '
        f'want {dtype}{list(want.shape)}'
      )

  def _write_leaf(self, places: list[str], array: np.ndarray) -> bool:
    """Writes a leaf's entries; says whether the dtype could hold them."""
    axes = self._name_map.axes(places[0])
    if axes is not None:
      array = array.transpose(np.argsort(axes))
    flat = np.asarray(array, order='C').reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
      for path in places:
        dtype, shard = self._specs[path].dtype, self._shard_of[path]
        block, fits = tensors.cast(flat[begin : begin + _BLOCK], dtype)
        if not fits:
          return False
        start = shard.starts[path] + begin * dtype.itemsize
        _write(self._content / shard.name, start, block.view(np.uint8))
    return True

  def add_file(self, name: str, content: str | bytes) -> None:
    """Adds a file beside the model, such as README.md.

    Args:
      name: of the file; one that is carried is replaced.
      content: of it.

    Raises:
      ValueError: where the model is a lone file, or the name is a path or
        that of a file with weights.
    """
    taken = {'', '..', layout.INDEX, *(shard.name for shard in self._shards)}
    if self._lone or name in taken or pathlib.PurePath(name).name != name:
      raise ValueError(f'{self._target}: cannot add the file {name!r}')
    self._files[name] = (
      content.encode() if isinstance(content, str) else content
    )

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    with self._stack:
      try:
        self._flush_leaves()
        if kind is None:
          self._check_written()
          if self._first:
            self._finish()
          self._of_all([])
      finally:
        with self._lock:  # a thread that still writes must not be surprised
          self._journal = None

  def _check_written(self) -> None:
    head = f'{self._target} is not written:'
    done = self._of_all(self._taken) | set(self._alias)
    overflow = self._of_all(self._overflow)
    headers.raise_if(
      [f'{p}: missing' for p in self._leaves if p not in done], head
    )
    headers.raise_if(
      [
        f'{p}: {self._specs[p].dtype} cannot hold it'
        for p in self._leaves
        if p in overflow
      ],
      head,
    )

  def _finish(self) -> None:
    for shard in self._shards:
      _write(self._content / shard.name, 0, shard.header)
    files = dict(self._files)
    if self._shards[1:]:
      files[layout.INDEX] = layout.index(self._specs, self._shards)
    if self._carry is not None:
      beside.carry(
        self._carry,
        self._content,
        self._written_dtype(),
        self._vocab_sizes,
      )
    for name, content in files.items():
      (self._content / name).write_bytes(content)
    for path in self._content.iterdir():
      _flush(path)
    _flush(self._content)
    self._refuse_existing()
    self._move()

  def _written_dtype(self) -> str | None:
    dtypes = {s.dtype for s in self._specs.values() if _floating(s.dtype)}
    return dtypes.pop().name if len(dtypes) == 1 else None

  def _move(self) -> None:
    aside = self._target.with_name(f'.{self._target.name}.replaced')
    if self._lone:
      os.replace(self._content / self._target.name, self._target)
    else:
      if self._target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self._target, aside)
      os.rename(self._content, self._target)
    _flush(self._target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(self._temporary)


def _floating(dtype: Any) -> bool:
  return bool(jnp.issubdtype(dtype, jnp.floating))


def _write(path: pathlib.Path, offset: int, data: Any) -> None:
  """Writes bytes at their place in a file."""
  with path.open('r+b', buffering=0) as file:
    view = memoryview(data)
    while view:
      count = os.pwrite(file.fileno(), view, offset)
      view, offset = view[count:], offset + count


def _flush(path: pathlib.Path) -> None:
  """Flushes a file, or a folder's names, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
