"""Random crops and mirror images, on the device.

Crops are those of torchvision's `RandomResizedCrop` with its bicubic filter,
with which CLIPs are fine-tuned for task arithmetic (`least=0.9`) and which
Inception took from 8 % of an image on; but they need not begin at a pixel.

References:
  Szegedy et al., `Going Deeper with Convolutions
  <https://arxiv.org/abs/1409.4842>`_, 2014
  Ilharco et al., `Editing Models with Task Arithmetic
  <https://arxiv.org/abs/2212.04089>`_, 2023
"""

import jax
from jax import lax
import jax.numpy as jnp

_RATIO = 4 / 3  # of a crop's sides, at most
_TRIES = 10  # until a crop fits, as torchvision has it


def random_crop(keys: jax.Array, images: jax.Array, least: float) -> jax.Array:
  """Cuts out a part of each image and resizes it to the size of the whole.

  The area is uniform between `least` and all of the image, the logarithm of
  width over height between that of 3 / 4 and 4 / 3, relative to the image's.

  Args:
    keys: `[N]`, typed.
    images: `[N, H, W, C]` in [0, 1].
    least: share of the area that stays, above 0, at most 1; static.

  Returns:
    `[N, H, W, C]` in [0, 1]; the same images where `least` is 1.

  Raises:
    ValueError: where `least` is not such.

  Examples:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> random_crop(keys, jnp.ones((2, 8, 8, 3)), 0.5).shape
    (2, 8, 8, 3)
  """
  if not 0 < least <= 1:
    raise ValueError(f'least must be above 0 and at most 1, got {least}')
  if least == 1:
    return images
  return jax.vmap(lambda key, image: _crop(key, image, least))(keys, images)


def random_mirror(
  keys: jax.Array, images: jax.Array, share: jax.typing.ArrayLike = 0.5
) -> jax.Array:
  """Swaps left and right in some of the images.

  Args:
    keys: `[N]`, typed.
    images: `[N, H, W, C]`.
    share: of the images, `[]`.

  Returns:
    `[N, H, W, C]`.

  Examples:
    >>> image = jnp.arange(2.0).reshape(1, 1, 2, 1)
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> random_mirror(keys, image, 1.0).ravel()
    Array([1., 0.], dtype=float32)
  """
  turn = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)
  return jnp.where(turn[:, None, None, None], images[:, :, ::-1], images)


def _crop(key: jax.Array, image: jax.Array, least: float) -> jax.Array:
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  area = jax.random.uniform(area_key, (_TRIES,), minval=least)
  stretch = jnp.log(jnp.float32(_RATIO))
  ratio = jnp.exp(
    jax.random.uniform(ratio_key, (_TRIES,), minval=-stretch, maxval=stretch)
  )
  sides = jnp.sqrt(jnp.stack([area / ratio, area * ratio]))  # height, width
  fits = jnp.all(sides <= 1, axis=0)
  # The whole image where none fits, which torchvision has, too.
  sides = jnp.where(jnp.any(fits), sides[:, jnp.argmax(fits)], 1.0)
  size = jnp.array(image.shape[:2], jnp.float32)
  corner = jax.random.uniform(place_key, (2,)) * (1 - sides)
  resized = jax.image.scale_and_translate(
    image,
    image.shape,
    (0, 1),
    1 / sides,
    -corner * size / sides,
    'cubic',
  )
  return lax.clamp(jnp.float32(0), resized, jnp.float32(1))
