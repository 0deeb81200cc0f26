"""What CLIP does to images before its tower, on the host or on the device.

RGB, the short side resized to `size` by PIL's bicubic filter, the centre cut
out, [0, 1], normalised: level by level what `CLIPImageProcessor` of
transformers does with PIL. `on_device` has the same levels from uint8 images
of one shape, so that small images travel as they are.

`jax.image.resize` does not do here: PIL rounds to a level, and cuts off, what
lies between the passes over columns and rows, which on edges is tens of levels
away, and where a sum falls between two levels only PIL's own integers tell
which one it takes.
"""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dam_jax.models import clip

_BITS = 22  # of PIL's fixed-point weights of 8-bit images
_LOW = 11  # of these that are multiplied apart


def _sizes(shape: tuple[int, ...], size: int) -> tuple[int, int]:
  """Height and width once the short side is `size`."""
  height, width = shape
  short = min(height, width)
  return size * height // short, size * width // short


def to_rgb(image: Image.Image) -> np.ndarray:
  """Decodes an image of any kind that PIL reads.

  Args:
    image: one with transparency is laid on white, as transformers do.

  Returns:
    `[H, W, 3]` uint8.
  """
  if 'A' in image.getbands() or image.info.get('transparency') is not None:
    white = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return np.asarray(image.convert('RGB'))


def resize_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes the short side and cuts out the centre, on the host.

  Args:
    image: `[H, W, 3]` uint8.
    size: of the square that stays, in pixels.

  Returns:
    `[size, size, 3]` uint8.

  Raises:
    ValueError: where the image or size is not such.

  Examples:
    >>> resize_crop(np.zeros((40, 30, 3), np.uint8), 24).shape
    (24, 24, 3)
  """
  _check(image.shape, image.dtype, size, 3)
  height, width = _sizes(image.shape[:2], size)
  if image.shape[:2] != (height, width):
    picture = Image.fromarray(image)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    image = np.asarray(picture)
  top, left = (height - size) // 2, (width - size) // 2
  return image[top : top + size, left : left + size]


def normalize(
  images: np.ndarray,
  *,
  mean: Sequence[float] = clip.MEAN,
  std: Sequence[float] = clip.STD,
) -> np.ndarray:
  """Maps levels to what CLIP's tower reads.

  Args:
    images: `[..., 3]` uint8.
    mean: of each channel in [0, 1], to subtract.
    std: of each, to divide by.

  Returns:
    The same shape, float32.

  Examples:
    >>> levels = np.array([0, 255], np.uint8)[:, None].repeat(3, axis=1)
    >>> normalize(levels, mean=(0.5,) * 3, std=(0.5,) * 3)[:, 0].tolist()
    [-1.0, 1.0]
  """
  scaled = images.astype(np.float32) / 255
  return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def to_tower(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes, crops and normalises: all that CLIP does to an image.

  Args:
    image: `[H, W, 3]` uint8.
    size: that the tower reads, in pixels.

  Returns:
    `[size, size, 3]` float32.

  Examples:
    >>> to_tower(np.zeros((40, 30, 3), np.uint8), 24).dtype
    dtype('float32')
  """
  return normalize(resize_crop(image, size))


def on_device(images: jax.Array, size: int) -> jax.Array:
  """`resize_crop` of a batch, level by level, in JAX.

  The filter is two products with small matrices, over columns and then over
  rows, of whole numbers that float32 holds exactly; meant for images of up to
  some hundred pixels.

  Args:
    images: `[B, H, W, 3]` uint8.
    size: of the squares, in pixels; static under `jax.jit`.

  Returns:
    `[B, size, size, 3]` float32 in [0, 1], as mergers read images;
    `dam_jax.models.clip.normalize` does the rest.

  Raises:
    ValueError: where the images or size are not such, or images would shrink
      to less than a tenth or so.

  Examples:
    >>> on_device(jnp.full((2, 8, 8, 3), 255, jnp.uint8), 16).shape
    (2, 16, 16, 3)
  """
  _check(images.shape, images.dtype, size, 4)
  height, width = _sizes(images.shape[1:3], size)
  levels = images.astype(jnp.float32)
  levels = _along(levels, _middle(images.shape[2], width, size), 2)
  levels = _along(levels, _middle(images.shape[1], height, size), 1)
  return levels / 255


def _middle(num_in: int, num_out: int, size: int) -> np.ndarray | slice:
  """Weights of the `size` middle ones of `num_out`, or where these lie."""
  start = (num_out - size) // 2
  middle = slice(start, start + size)
  return middle if num_in == num_out else _weights(num_in, num_out)[:, middle]


def _along(levels: jax.Array, weights: np.ndarray | slice, axis: int):
  """Filters levels along an axis, or cuts out of it."""
  if isinstance(weights, slice):
    return levels[:, weights] if axis == 1 else levels[:, :, weights]
  spec = 'bhwc,suh->sbuwc' if axis == 1 else 'bhwc,svw->sbhvc'
  high, low = jnp.einsum(
    *(spec, levels, weights), precision=jax.lax.Precision.HIGHEST
  ).astype(jnp.int32)
  total = (high << _LOW) + low + (1 << (_BITS - 1))
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)


@functools.cache
def _weights(num_in: int, num_out: int) -> np.ndarray:
  """PIL's bicubic filter in parts whose products with levels are exact.

  Returns:
    `[2, num_out, num_in]` float32, whole numbers: multiples of `2**-11` and of
    `2**-22`. A product of either with levels stays below `2**24`, up to which
    float32 holds all integers.
  """
  scale = num_in / num_out
  stretch = max(scale, 1.0)  # wider where it shrinks
  weights = np.zeros((num_out, num_in), np.int64)
  for row, out in enumerate(weights):
    centre = (row + 0.5) * scale
    first = max(int(centre - 2 * stretch + 0.5), 0)
    last = min(int(centre + 2 * stretch + 0.5), num_in)
    taps = [_bicubic((i - centre + 0.5) / stretch) for i in range(first, last)]
    total = sum(taps)
    for i, tap in enumerate(taps, first):
      fixed = tap / total * (1 << _BITS)
      out[i] = int(fixed + math.copysign(0.5, fixed))
  high = (weights + (1 << (_LOW - 1))) >> _LOW
  parts = np.stack([high, weights - (high << _LOW)])
  largest = 255 * np.abs(parts).sum(axis=-1).max()
  if largest >= 1 << 24:
    raise ValueError(
      f'a side of {num_in} pixels is too long to become {num_out} on the '
      'device: resize on the host'
    )
  parts = parts.astype(np.float32)
  parts.flags.writeable = False
  return parts


def _bicubic(x: float) -> float:
  """Keys's cubic with a = -0.5."""
  x = abs(x)
  if x < 1:
    return (1.5 * x - 2.5) * x * x + 1
  if x < 2:
    return -0.5 * (((x - 5) * x + 8) * x - 4)
  return 0.0


def _check(shape: tuple[int, ...], dtype, size: int, ndim: int) -> None:
  """Raises unless images are uint8 in RGB and the size is positive."""
  lines = []
  if len(shape) != ndim or dtype != np.uint8 or shape[-1:] != (3,):
    want = 'uint8[H, W, 3]' if ndim == 3 else 'uint8[B, H, W, 3]'
    lines.append(f'got {np.dtype(dtype).name}{list(shape)}, want {want}')
  elif min(shape[-3:-1]) < 1:
    lines.append(f'images of {shape[-3]} x {shape[-2]} pixels')
  if size < 1:
    lines.append(f'size must be positive, got {size}')
  if lines:
    raise ValueError('\n  '.join(['images to resize:', *lines]))
