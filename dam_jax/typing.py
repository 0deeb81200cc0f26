"""Types that dam_jax's functions share: aliases and Protocols only.

Symbols used in shapes throughout: `K` experts, `T` tasks, `B` images a task,
`H, W, C` an image's height, width and channels, `L` classes, `P` parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import chex
import jax

Params = chex.ArrayTree
"""A model's parameters: any pytree of arrays."""

Deltas = chex.ArrayTree
"""Task vectors: a pytree like `Params`, with leaves `[K, *param_shape]`."""

Metrics = Mapping[str, jax.Array]
"""What a step measured, by name; the part before a slash is the phase."""


class Batch(NamedTuple):
  """Unlabelled images for one step.

  Attributes:
    images: `[S, T, B, H, W, C]` float in [0, 1]; one draw for each of the
      step's `S` phases. Merges that perturb nothing take whatever else the
      logits function reads, `[S, T, B, ...]`, such as words.
    references: `[S, T, B, L]` class probabilities that each task's own expert
      gives to these images (one-hot labels, for the one option that says so),
      or None where the method does not use them.
  """

  images: jax.Array
  references: jax.Array | None = None


class Source(Protocol):
  """A model whose leaves are read one at a time."""

  @property
  def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf by path."""
    ...

  @property
  def read(self) -> Callable[[str], Any]:
    """Maps a path to that leaf; called from several threads at once."""
    ...


class LogitsFn(Protocol):
  """One forward pass of one model for the images of all tasks."""

  def __call__(self, params: Any, images: jax.Array) -> jax.Array:
    """Maps images `[T, B, H, W, C]` to logits `[T, B, L]`.

    Classes that a task does not have get `dam_jax.losses.MASKED_LOGIT`.
    """
    ...


class TaskLogitsFn(Protocol):
  """One forward pass of one model for the images of one task."""

  def __call__(self, params: Any, task: Any, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` of the task with that index to `[B, L]`."""
    ...


class InputsFn(Protocol):
  """One forward pass of one model, for what its linear layers read."""

  def __call__(
    self, params: Any, task: Any, images: jax.Array
  ) -> Mapping[str, jax.Array]:
    """Maps images `[B, H, W, C]` of the task with that index to inputs.

    They are `[N, in]` by the path of the layer's kernel `[in, out]`, as in
    `layers_0/mlp/fc1/kernel`; a row is an image, or a token of one.
    """
    ...


class PreprocessFn(Protocol):
  """Maps images in [0, 1] to what the model reads, elementwise."""

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps `[..., H, W, C]` to the same shape."""
    ...
