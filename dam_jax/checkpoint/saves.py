"""States of a run on disk, the newest of which its next start goes on from."""

from collections.abc import Mapping
import contextlib
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from dam_jax import tree
from dam_jax.checkpoint import state as state_lib


class Save(NamedTuple):
  """What one save holds.

  Attributes:
    step: how many steps were taken.
    state: of the merger.
    metrics: of all those steps, by name, `[steps, ...]`.
  """

  step: int
  state: Any
  metrics: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which saves stay when there is a newer one.

  Attributes:
    last: how many of the newest.
    every: those of steps that it divides, too; None keeps no others.
  """

  last: int = 1
  every: int | None = None

  def __post_init__(self):
    if self.last < 1 or (self.every is not None and self.every < 1):
      raise ValueError(
        'keep at least the last save, and every one of a positive number of '
        f'steps or None, got last={self.last} and every={self.every}'
      )


class Saves:
  """A folder of saves, each written in the background, whole or not at all.

  All processes of a run call the same methods in the same order; each writes
  and reads its own part. Use it as a context, or `close` it: what is under way
  is then finished.

  Attributes:
    folder: that holds a folder a save, named by its step.

  Examples:
    >>> import tempfile
    >>> state = {'count': jnp.array(7)}
    >>> folder = tempfile.mkdtemp()
    >>> with Saves(folder) as saves:
    ...   saves.save(7, state, {'loss': np.ones(7)})
    >>> with Saves(folder) as saves:
    ...   saves.restore(state).step
    7
  """

  def __init__(self, folder: epath.PathLike, *, keep: Keep = Keep()):
    """Opens a folder; half-written saves in it are removed.

    Args:
      folder: made where it is missing.
      keep: which saves stay.

    Raises:
      OSError: where it cannot be written to.
    """
    from orbax.checkpoint import v1 as ocp  # slow to import, rarely needed

    self.folder = epath.Path(folder).resolve()
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(keep.last)]
    if keep.every is not None:
      kept.append(policies.EveryNSteps(keep.every))
    policy: Any = policies.AnyPreservationPolicy(kept)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._checkpointer = ocp.training.Checkpointer(
      self.folder,
      preservation_policy=policy,
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> 'Saves':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  @property
  def steps(self) -> list[int]:
    """Steps of all saves that are whole, in order."""
    return [found.step for found in self._checkpointer.checkpoints]

  def save(
    self, step: int, state: Any, metrics: Mapping[str, np.ndarray]
  ) -> None:
    """Begins a save, and returns once the state may be donated.

    Args:
      step: how many steps were taken.
      state: a pytree of arrays.
      metrics: of all those steps.

    Raises:
      OSError: where this save or the one before cannot be written.
    """
    with self._writing():
      held = {
        'state': state_lib.key_data(state),
        'metrics_so_far': dict(metrics),
      }
      self._checkpointer.save_checkpointables_async(step, held, force=True)

  def wait(self) -> None:
    """Returns once all saves are on disk.

    Raises:
      OSError: where one cannot be written.
    """
    with self._writing():
      self._checkpointer.wait()

  def close(self) -> None:
    """Waits, and gives the folder back."""
    with self._writing():
      self._checkpointer.close()

  @contextlib.contextmanager
  def _writing(self):
    """Says what to do where a save cannot be written."""
    try:
      yield
    except (OSError, RuntimeError, ValueError) as e:
      whole = self.steps
      raise OSError(
        f'{self.folder}: a save cannot be written; free some space or choose '
        f'another folder, then start again. {_newest(whole)}\n{e}'
      ) from e

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the newest save's state, by path.

    Raises:
      ValueError: where there is none, or it cannot be read.
    """
    self.wait()
    if not self.steps:
      raise ValueError(f'{self.folder}: no save')
    return {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for path, x in tree.flatten(self._known(self.steps[-1])['state']).items()
    }

  def _known(self, step: int) -> Mapping[str, Any]:
    """Reads what is known of a save before it is read."""
    with self._reading(step):
      known = self._checkpointer.checkpointables_metadata(step).metadata
      if None in known.values():
        raise ValueError('its metadata cannot be read')
      return known

  def restore(self, like: Any) -> Save | None:
    """Reads the newest save.

    Args:
      like: a state of the same structure, whose arrays or `ShapeDtypeStruct`s
        say shapes, dtypes and shardings: those of this run, whatever the mesh
        of the run that saved was. Typed PRNG keys must be arrays.

    Returns:
      The save, None where there is none.

    Raises:
      ValueError: where it is of another model or merge, with all differences,
        or cannot be read.
    """
    self.wait()
    if not self.steps:
      return None
    step, data = self.steps[-1], state_lib.key_data(like)
    known = self._known(step)
    if lines := tree.differences(data, known['state']):
      other = f'{self.folder / str(step)} is of another model or merge; choose '
      raise ValueError('\n  '.join([f'{other}another folder:', *lines]))
    want = {'state': data, 'metrics_so_far': known['metrics_so_far']}
    with self._reading(step):
      found = self._checkpointer.load_checkpointables(step, want)
    metrics = jax.tree.map(np.asarray, found['metrics_so_far'])
    return Save(step, state_lib.wrap_keys(like, found['state']), metrics)

  @contextlib.contextmanager
  def _reading(self, step: int):
    """Says what to do where a save cannot be read."""
    try:
      yield
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
      raise ValueError(
        f'{self.folder / str(step)} cannot be read: delete it to go on from an '
        f'earlier save, or from the start. {_newest(self.steps[:-1])}\n{e}'
      ) from e


def _newest(steps: list[int]) -> str:
  if not steps:
    return 'There is no other save.'
  return f'The newest other save is of step {steps[-1]}.'
