"""Orbax checkpoints: states of runs, and models."""

from collections.abc import Callable, Mapping
import math
import pathlib
import threading
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import tree

# Files that Orbax leaves in a checkpoint's folder, its older versions too.
_MARKS = (
  'orbax.checkpoint',
  '_CHECKPOINT_METADATA',
  '_METADATA',
  'manifest.ocdbt',
)

# Bytes of leaves that are restored together, for a call takes a tenth of a
# second whatever it reads.
_AT_ONCE = 1 << 25


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )


def key_data(state: Any) -> Any:
  """Returns a state whose typed PRNG keys are their data."""
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

  ocp.save(epath.Path(path).resolve(), key_data(state), overwrite=True)


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
  return wrap_keys(like, ocp.load(path, key_data(like)))


def wrap_keys(like: Any, data: Any) -> Any:
  """Makes keys of what `key_data` made data.

  Args:
    like: a state whose typed PRNG keys are arrays.
    data: of the same structure.

  Returns:
    The state.
  """
  return jax.tree.map(
    lambda old, new: (
      jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
      if _is_key(old)
      else new
    ),
    like,
    data,
  )


def is_state(folder: pathlib.Path) -> bool:
  """Says whether a folder looks like an Orbax checkpoint."""
  return any((folder / name).exists() for name in _MARKS)


def open_state(
  folder: pathlib.Path,
) -> tuple[Mapping[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
  """Reads what an Orbax checkpoint holds, and how to read a leaf of it.

  Args:
    folder: of the checkpoint.

  Returns:
    Shapes and dtypes by path, and a function that restores one leaf, on the
    host and in memory of its own. Small ones that follow it are restored with
    it, and are there when they are asked for.

  Raises:
    ValueError: where leaves are not arrays (all of them).
  """
  from orbax.checkpoint import v1 as ocp

  path = epath.Path(folder).resolve()
  abstract = ocp.metadata(path).metadata
  found = tree.flatten(abstract)
  other = [p for p, x in found.items() if not hasattr(x, 'shape')]
  if other:
    raise ValueError('\n  '.join([f'{folder}: not arrays:', *other]))
  leaves = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in found.items()}
  treedef = jax.tree.structure(abstract)
  groups = _groups(leaves)
  held: dict[str, np.ndarray] = {}
  lock = threading.Lock()

  def want(leaf):
    # Of no memory; an array of NumPy's asks for one of NumPy's.
    struct = leaves[leaf]
    return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)

  def read(leaf):
    with lock:
      if leaf not in held:
        held.clear()
        group = groups[leaf]
        placed = [want(p) if p in group else ocp.PLACEHOLDER for p in leaves]
        state = ocp.load(path, jax.tree.unflatten(treedef, placed))
        found = tree.flatten(state)
        held.update({p: found[p] for p in group})
      array = held.pop(leaf)
    array.flags.writeable = False
    return array

  return leaves, read


def _groups(
  leaves: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, tuple[str, ...]]:
  """Returns for each leaf those that are restored with it, in order."""
  found: list[list[str]] = []
  total = math.inf
  for path, x in leaves.items():
    size = math.prod(x.shape) * x.dtype.itemsize
    if total + size > _AT_ONCE:
      found.append([])
      total = 0
    found[-1].append(path)
    total += size
  return {path: tuple(group) for group in found for path in group}
