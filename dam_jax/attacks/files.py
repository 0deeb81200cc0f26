"""Triggers in npz files, which are never unpickled."""

import os
import pathlib
from typing import Any
import zipfile

from etils import epath
import jax.numpy as jnp
import numpy as np

from dam_jax.attacks.triggers import TRIGGERS
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import check_trigger


def load_trigger(path: epath.PathLike) -> Trigger:
  """Reads a trigger from an npz file.

  Args:
    path: of a file with a `task` (its name), `target` (an integer), and
      `pattern` and `mask`, `offset` or `grid`, perhaps a `kind` and a `home`.

  Returns:
    The trigger.

  Raises:
    ValueError: where the file cannot be read or is no trigger.
  """
  try:
    with np.load(os.fspath(path), allow_pickle=False) as file:
      found = {name: file[name] for name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path}: not a readable trigger: {e}') from e
  names = {make: tuple(make.bounds(0, 0, 0)) for make in TRIGGERS}
  make = max(names, key=lambda make: len({*names[make]} & {*found}))
  arrays = names[make]
  wanted = {'task': (0, 'U'), 'target': (0, 'iu')}
  lines = []
  for name, kind in (wanted | dict.fromkeys(arrays, (3, 'fiu'))).items():
    if name not in found:
      lines.append(f'{name} is missing')
    elif found[name].ndim != kind[0] or found[name].dtype.kind not in kind[1]:
      lines.append(f'{name} is {found[name].dtype}{list(found[name].shape)}')
  if lines:
    raise ValueError(f'{path}: not a trigger: {", ".join(lines)}')
  fields: dict[str, Any] = {'target': int(found['target'])}
  fields |= {name: jnp.asarray(found[name], jnp.float32) for name in arrays}
  fields |= {k: str(found[k]) for k in ('task', 'kind', 'home') if k in found}
  trigger = make(**fields)
  try:
    check_trigger(trigger, found[arrays[0]].shape)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e
  return trigger


def save_trigger(path: epath.PathLike, trigger: Trigger) -> None:
  """Writes a trigger to an npz file, at once or not at all.

  Args:
    path: of the file.
    trigger: what `load_trigger` is to give back.
  """
  arrays: dict[str, Any] = {k: np.asarray(x) for k, x in vars(trigger).items()}
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    np.savez_compressed(file, **arrays)
  temporary.replace(path)
