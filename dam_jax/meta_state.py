"""What a learned merge carries from step to step, and what it reads."""

from typing import Any, NamedTuple

import jax

from dam_jax import tree
from dam_jax.typing import Batch


class MetaState(NamedTuple):
  """State of a learned merge.

  Attributes:
    key: of the masks' samples; never changes.
    count: [] steps taken.
    finite: [] whether every loss and gradient so far was finite; where one was
      not, the state stays as it was before that step, but for masks that an
      earlier update of that step moved.
    coefficients: `[K]` or `[K, leaves]`, in the order of `Layout.names`.
    inner_state: of the coefficients' inner optimiser.
    joint_state: of the one that learns them together with the masks.
    coefficient_state: of the one that learns them after the masks.
    leak: like the coefficients, the gradient that the last step of the masks
      left in them; zero where nothing reads it.
    masks: logits `[P]` or `[K, P]` by name.
    mask_states: their optimisers', by name.
    adversary: leaves `[restarts, T, ...]`, or None.
    adversary_state: of its optimiser, leaves `[restarts, ...]`.
  """

  key: jax.Array
  count: jax.Array
  finite: jax.Array
  coefficients: jax.Array
  inner_state: Any
  joint_state: Any
  coefficient_state: Any
  leak: jax.Array
  masks: dict[str, jax.Array]
  mask_states: dict[str, Any]
  adversary: Any
  adversary_state: Any


class Model(NamedTuple):
  """Base `[P]` and experts `[K, P]`, raveled."""

  base: tree.Raveled
  experts: tree.Raveled

  @property
  def deltas(self) -> jax.Array:
    """Task vectors `[K, P]`, made where they are read.

    What crosses a `lax.cond` is held in memory.
    """
    return self.experts.vector - self.base.vector[None]


def model_of(base: Any, experts: Any) -> Model:
  """Ravels a base and its experts, unless they are.

  Args:
    base: parameters.
    experts: stacked `[K, ...]`.

  Raises:
    ValueError: where they do not fit each other.
  """
  if not any(isinstance(x, tree.Raveled) for x in (base, experts)):
    tree.check_stacked(base, experts)
  flat, stacked = tree.ravel(base), tree.ravel(experts, leading=1)
  if flat.layout != stacked.layout:
    raise ValueError('base and experts were raveled from different pytrees')
  return Model(flat, stacked)


class Draws:
  """Hands out a batch's draws of images in order, at trace time."""

  def __init__(self, batch: Batch):
    self._batch, self._next = batch, 0

  @property
  def num_tasks(self) -> int:
    """Number of tasks."""
    return self._batch.images.shape[1]

  def rest(self) -> 'Draws':
    """Returns what hands out the rest, for what is traced more than once."""
    other = Draws(self._batch)
    other._next = self._next
    return other

  def many(self, num: int) -> Batch:
    """Returns the next draws, `[num, T, B, ...]`."""
    at = slice(self._next, self._next + num)
    self._next += num
    return jax.tree.map(lambda x: x[at], self._batch)

  def one(self) -> tuple[jax.Array, jax.Array | None]:
    """Returns the next draw's images and references, `[T, B, ...]`."""
    return tuple(jax.tree.map(lambda x: x[0], self.many(1)))
