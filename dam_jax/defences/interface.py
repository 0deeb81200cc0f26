"""One form for all defences, which says what each is allowed to see.

A `Defence` maps models to one model: `defence(params, apply_fn, data)`. What it
may look at is a type: `NoData`, `Unlabelled` or `Labelled` images, all of them
clean. A defence that gets another type than it reads raises, so that no
comparison gives one of them more than it says.

  >>> import jax.numpy as jnp
  >>> wag = Defence(NoData, lambda params, apply_fn, data: params)
  >>> images, labels = jnp.zeros((1, 2, 4, 4, 3)), jnp.zeros((1, 2), int)
  >>> wag({}, None, Labelled(images, labels))
  Traceback (most recent call last):
  ...
  ValueError: this defence reads NoData, got Labelled
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dam_jax.typing import LogitsFn


class NoData(NamedTuple):
  """Nothing but the weights."""


class Unlabelled(NamedTuple):
  """Clean images of all tasks.

  Attributes:
    images: `[T, N, H, W, C]` float in [0, 1].
  """

  images: jax.Array


class Labelled(NamedTuple):
  """Clean images of all tasks, and their classes.

  Attributes:
    images: `[T, N, H, W, C]` float in [0, 1].
    labels: `[T, N]` class indices.
  """

  images: jax.Array
  labels: jax.Array

  def draw(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Draws images `[T, batch, H, W, C]` and labels `[T, batch]`.

    Args:
      key: of the draw, which is with replacement, for each task its own.
      batch: images a task.
    """
    tasks, num = self.labels.shape
    at = jax.random.randint(key, (tasks, batch), 0, num)
    rows = jnp.arange(tasks)[:, None]
    return self.images[rows, at], self.labels[rows, at]


Data = NoData | Unlabelled | Labelled
"""What a defence may be given."""


@dataclasses.dataclass(frozen=True)
class Defence:
  """A repair of a merged model, or a merge that defends itself.

  Attributes:
    reads: the type of its data.
    repair: `(params, apply_fn, data) -> params`. `apply_fn` is a `LogitsFn` of
      images in [0, 1]: it maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    experts: whether it maps uploads, leaves `[K, ...]`, to a merged model, in
      place of one merged model to another.
  """

  reads: type[NoData] | type[Unlabelled] | type[Labelled]
  repair: Callable[[Any, LogitsFn, Any], Any]
  experts: bool = False

  def __call__(self, params: Any, apply_fn: Any, data: Data) -> Any:
    """Returns the defended model.

    Args:
      params: a merged model, or uploads, leaves `[K, ...]`.
      apply_fn: maps `(params, images)` to logits.
      data: what the defence reads.

    Raises:
      ValueError: where that is of another type, or holds no image.
    """
    if not isinstance(data, self.reads):
      raise ValueError(
        f'this defence reads {self.reads.__name__}, got {type(data).__name__}'
      )
    if isinstance(data, (Unlabelled, Labelled)):
      images = data.images
      if images.ndim != 5 or not images.size:
        raise ValueError(
          f'images must be [T, N, H, W, C], got {list(images.shape)}'
        )
      if isinstance(data, Labelled) and data.labels.shape != images.shape[:2]:
        raise ValueError(
          f'labels must be {list(images.shape[:2])}, got '
          f'{list(data.labels.shape)}'
        )
    return self.repair(params, apply_fn, data)
