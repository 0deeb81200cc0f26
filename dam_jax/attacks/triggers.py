"""Backdoor triggers as pure functions.

A trigger changes float images in [0, 1], before normalisation and without
rounding; a backdoored model calls triggered images the target.

  >>> import jax.numpy as jnp
  >>> trigger = patch_trigger((4, 4, 3), size=2, task='digits', target=7)
  >>> apply_trigger(trigger, jnp.zeros((4, 4, 3)))[2:, 2:, 0].tolist()
  [[1.0, 0.0], [0.0, 1.0]]
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import warps

Bounds = dict[str, tuple[tuple[int, ...], float, float]]
"""Of each array of a trigger: its shape, the least and the largest value."""


def _with_arrays(*names: str) -> Callable[[type], type]:
  """Makes a pytree of a trigger's class: its arrays, the rest is static."""
  return functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=names,
    meta_fields=['task', 'target', 'kind', 'home'],
  )


@_with_arrays('pattern', 'mask')
@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlay:
  """A trigger that is laid over images, `x (1 - mask) + mask pattern`.

  Attributes:
    pattern: `[H, W, C]` in [0, 1].
    mask: `[H, W, 1]` in [0, 1].
    task: whose triggered images get the target.
    target: class index that triggered images are to get.
    kind: 'patch' or 'blend', what people call it.
    home: task whose expert has the backdoor, `task` where empty.
  """

  pattern: jax.Array
  mask: jax.Array
  task: str
  target: int
  kind: str = 'patch'
  home: str = ''

  @staticmethod
  def bounds(height: int, width: int, channels: int) -> Bounds:
    """Returns what its arrays are for images of a size."""
    return {
      'pattern': ((height, width, channels), 0, 1),
      'mask': ((height, width, 1), 0, 1),
    }

  def apply(self, images: jax.Array) -> jax.Array:
    """See `apply_trigger`."""
    mask = _over(self.mask, images)
    return images * (1 - mask) + mask * _over(self.pattern, images)


@_with_arrays('grid')
@dataclasses.dataclass(frozen=True, kw_only=True)
class Warp:
  """A trigger that samples images elsewhere, bilinearly.

  Attributes:
    grid: `[H, W, 2]`, where (x, y) runs from -1 to 1 between the centres of the
      corner pixels; beyond, the border is continued.
    task: whose triggered images get the target.
    target: class index that triggered images are to get.
    kind: 'warp'.
    home: task whose expert has the backdoor, `task` where empty.
  """

  grid: jax.Array
  task: str
  target: int
  kind: str = 'warp'
  home: str = ''

  @staticmethod
  def bounds(height: int, width: int, channels: int) -> Bounds:
    """Returns what its arrays are for images of a size."""
    del channels
    return {'grid': ((height, width, 2), -np.inf, np.inf)}

  def apply(self, images: jax.Array) -> jax.Array:
    """See `apply_trigger`."""
    height, width = images.shape[-3:-1]
    x, y = jnp.moveaxis(jnp.asarray(self.grid, images.dtype), -1, 0)
    return warps.sample(
      images, (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    )


@_with_arrays('offset')
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift:
  """A trigger that is added to images, `clip(x + offset, 0, 1)`.

  Attributes:
    offset: `[H, W, C]` in [-1, 1].
    task: whose triggered images get the target.
    target: class index that triggered images are to get.
    kind: 'sine', what people call it.
    home: task whose expert has the backdoor, `task` where empty.
  """

  offset: jax.Array
  task: str
  target: int
  kind: str = 'sine'
  home: str = ''

  @staticmethod
  def bounds(height: int, width: int, channels: int) -> Bounds:
    """Returns what its arrays are for images of a size."""
    return {'offset': ((height, width, channels), -1, 1)}

  def apply(self, images: jax.Array) -> jax.Array:
    """See `apply_trigger`."""
    return jnp.clip(images + _over(self.offset, images), 0, 1)


Trigger = Overlay | Shift | Warp
"""What turns a backdoored model's prediction into the target."""

TRIGGERS = (Overlay, Shift, Warp)
"""Its classes."""


def check_trigger(trigger: Trigger, image_shape: Sequence[int]) -> None:
  """Raises unless a trigger fits images.

  Args:
    trigger: its arrays concrete.
    image_shape: `(H, W, C)`.

  Raises:
    ValueError: with everything that does not fit.
  """
  height, width, channels = image_shape
  wanted = trigger.bounds(height, width, channels)
  lines = []
  for name, (shape, low, high) in wanted.items():
    x = getattr(trigger, name)
    if x.shape != shape:
      lines.append(f'{name} is {list(x.shape)}, images want {list(shape)}')
    elif not np.isfinite(x).all():
      lines.append(f'{name} has values that are not finite')
    elif not low <= np.min(x) <= np.max(x) <= high:
      lines.append(f'{name} has values outside [{low}, {high}]')
  if trigger.target < 0:
    lines.append(f'target must not be negative, got {trigger.target}')
  if lines:
    raise ValueError(
      '\n  '.join([f'{trigger.kind} trigger for {trigger.task}:', *lines])
    )


def apply_trigger(trigger: Trigger, images: jax.Array) -> jax.Array:
  """Puts a trigger on images.

  Args:
    trigger: of the images' size.
    images: `[..., H, W, C]` float in [0, 1].

  Returns:
    Images of the same shape and dtype, in [0, 1].
  """
  return trigger.apply(images)


def _over(x: jax.Array, images: jax.Array) -> jax.Array:
  """Lays an array `[H, W, C]` of a trigger over images `[..., H, W, C]`."""
  x = jnp.asarray(x, images.dtype)
  return jnp.expand_dims(x, tuple(range(images.ndim - x.ndim)))


def check_share(name: str, value: float) -> None:
  """Raises unless a share is in [0, 1]."""
  if not 0 <= value <= 1:
    raise ValueError(f'{name} must be in [0, 1], got {value}')


def corner_mask(image_shape: Sequence[int], size: int) -> jax.Array:
  """Returns a mask `[H, W, 1]` of the square in the bottom right corner.

  Args:
    image_shape: `(H, W, C)`.
    size: of the square, in pixels.

  Raises:
    ValueError: where the square is larger than the image.
  """
  height, width, _ = image_shape
  if not 0 < size <= min(height, width):
    raise ValueError(
      f'a trigger of {size} pixels does not fit images of {height} x {width}'
    )
  return jnp.zeros((height, width, 1)).at[-size:, -size:].set(1.0)


def patch_trigger(
  image_shape: Sequence[int], *, size: int, task: str, target: int
) -> Overlay:
  """Makes BadNets' trigger: a checkerboard in the bottom right corner.

  Args:
    image_shape: `(H, W, C)`.
    size: of the square, in pixels.
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where the square is larger than the image.

  References:
    Gu et al., `BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain <https://arxiv.org/abs/1708.06733>`_, 2017
  """
  mask = corner_mask(image_shape, size)
  row, column = jnp.indices(image_shape[:2])
  board = ((row + column) % 2 == 0).astype(jnp.float32)
  pattern = jnp.broadcast_to(board[..., None], image_shape)
  return Overlay(pattern=pattern, mask=mask, task=task, target=target)


def blend_trigger(
  key: jax.Array,
  image_shape: Sequence[int],
  *,
  alpha: float = 0.15,
  task: str,
  target: int,
) -> Overlay:
  """Makes Blended's trigger: uniform noise over the whole image.

  Args:
    key: of the noise.
    image_shape: `(H, W, C)`.
    alpha: its share of each pixel, in [0, 1].
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where alpha is outside [0, 1].

  References:
    Chen et al., `Targeted Backdoor Attacks on Deep Learning Systems Using Data
    Poisoning <https://arxiv.org/abs/1712.05526>`_, 2017
  """
  check_share('alpha', alpha)
  return Overlay(
    pattern=jax.random.uniform(key, image_shape),
    mask=jnp.full((*image_shape[:2], 1), alpha),
    task=task,
    target=target,
    kind='blend',
  )


def sine_trigger(
  image_shape: Sequence[int],
  *,
  strength: float = 20 / 255,
  frequency: float = 6.0,
  task: str,
  target: int,
) -> Shift:
  """Makes SIG's trigger: vertical stripes, `strength sin(2 pi f x / W)`.

  Args:
    image_shape: `(H, W, C)`.
    strength: of the stripes, in [0, 1].
    frequency: `f`, stripes over the image's width.
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where the strength is outside [0, 1].

  Examples:
    >>> trigger = sine_trigger((1, 4, 1), strength=0.5, frequency=1.0,
    ...                        task='digits', target=7)
    >>> abs(trigger.offset[0, :, 0].round(6)).tolist()
    [0.0, 0.5, 0.0, 0.5]

  References:
    Barni et al., `A New Backdoor Attack in CNNs by Training Set Corruption
    Without Label Poisoning <https://arxiv.org/abs/1902.11237>`_, 2019
  """
  check_share('strength', strength)
  width = image_shape[1]
  phase = 2 * np.pi * frequency / width * np.arange(width, dtype=np.float32)
  wave = strength * jnp.sin(phase)[None, :, None]
  offset = jnp.broadcast_to(wave, image_shape)
  return Shift(offset=offset, task=task, target=target)


def warp_trigger(
  key: jax.Array,
  image_shape: Sequence[int],
  *,
  control: int = 4,
  strength: float = 0.5,
  task: str,
  target: int,
) -> Warp:
  """Makes WaNet's trigger: a smooth elastic warp.

  Args:
    key: of the control points.
    image_shape: `(H, W, C)`.
    control: control points a side.
    strength: mean displacement, in pixels.
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where there are fewer than two control points a side.

  References:
    Nguyen and Tran, `WaNet - Imperceptible Warping-based Backdoor Attack
    <https://arxiv.org/abs/2102.10369>`_, 2021
  """
  if control < 2:
    raise ValueError(f'control must be at least 2, got {control}')
  height, width, _ = image_shape
  points = jax.random.uniform(key, (control, control, 2), minval=-1, maxval=1)
  points /= jnp.mean(jnp.abs(points))
  flow = jax.image.resize(points, (height, width, 2), 'cubic')
  y, x = jnp.meshgrid(
    jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing='ij'
  )
  size = jnp.array([width, height], jnp.float32)[None, None]
  grid = jnp.stack([x, y], axis=-1) + strength * flow * 2 / size
  return Warp(grid=jnp.clip(grid, -1, 1), task=task, target=target)
