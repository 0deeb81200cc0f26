"""CLIP's preprocessing against PIL and arrays of transformers."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dam_jax.data import preprocess
from dam_jax.models import clip

# `pixel_values` of transformers 5.24's CLIPImageProcessorPil with size and
# crop of 24, channels last, and the PNG files they were made of.
GOLDEN = Path(__file__).with_name('clip_processor.npz')
KINDS = ('rgb_tall', 'rgb_wide', 'grey', 'alpha', 'palette', 'as_it_is')


def _noise(shape, *, edges=False):
  x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  return np.where(x > 127, 255, 0).astype(np.uint8) if edges else x


@pytest.mark.parametrize('kind', KINDS)
def test_host_gives_what_transformers_give(kind):
  with np.load(GOLDEN) as file:
    png, want = file[f'{kind}_png'], file[kind]
  with Image.open(io.BytesIO(png.tobytes())) as image:
    got = preprocess.to_rgb(image)
  got = preprocess.to_tower(got, 24)
  assert got.dtype == np.float32
  # A level is 1 / 255 / std, some 0.015.
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize('edges', [False, True])
@pytest.mark.parametrize(
  ('height', 'width', 'size'),
  [
    (28, 28, 40),
    (64, 64, 56),  # halves between levels
    (32, 32, 32),
    (45, 31, 20),
    (20, 90, 33),
    (32, 40, 32),  # one pass only
    (40, 32, 16),
  ],
)
def test_device_gives_the_levels_of_pil(height, width, size, edges):
  images = _noise((2, height, width, 3), edges=edges)
  want = np.stack([preprocess.resize_crop(x, size) for x in images])
  got = jax.jit(preprocess.on_device, static_argnums=1)(images, size)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(np.round(np.asarray(got) * 255), want)
  np.testing.assert_allclose(got, want / 255, atol=1e-6)


def test_jax_resize_is_not_pil():
  # The reason for `preprocess.on_device`.
  image = _noise((28, 28, 3), edges=True)
  want = preprocess.resize_crop(image, 40).astype(np.float32)
  got = jax.image.resize(jnp.asarray(image, jnp.float32), want.shape, 'cubic')
  assert np.abs(np.clip(np.asarray(got), 0, 255) - want).max() > 10


def test_normalize_is_that_of_the_tower():
  images = _noise((3, 4, 4, 3))
  want = clip.normalize(jnp.asarray(images, jnp.float32) / 255)
  np.testing.assert_allclose(preprocess.normalize(images), want, atol=1e-6)


def test_products_of_the_filter_are_exact():
  for num_in, num_out in ((28, 224), (500, 224), (1000, 60)):
    parts = preprocess._weights(num_in, num_out).astype(np.int64)
    # PIL's weights sum to one within half a unit each.
    total = (parts[0] * 2**11 + parts[1]).sum(axis=-1)
    assert np.abs(total - 2**22).max() <= num_in / 2
    assert 255 * np.abs(parts).sum(axis=-1).max() < 2**24
  with pytest.raises(ValueError, match='3000 pixels is too long to become 20'):
    preprocess.on_device(jnp.zeros((1, 3000, 3000, 3), jnp.uint8), 20)


@pytest.mark.parametrize(
  ('image', 'size', 'match'),
  [
    (np.zeros((4, 4, 3), np.float32), 4, 'float32'),
    (np.zeros((4, 4), np.uint8), 4, 'uint8'),
    (np.zeros((4, 4, 1), np.uint8), 0, r'(?s)want uint8.*size must be'),
    (np.zeros((0, 4, 3), np.uint8), 4, '0 x 4'),
  ],
)
def test_other_images_are_refused(image, size, match):
  with pytest.raises(ValueError, match=match):
    preprocess.resize_crop(image, size)
  with pytest.raises(ValueError, match=match):
    preprocess.on_device(jnp.asarray(image)[None], size)
