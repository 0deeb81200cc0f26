"""Random crops and mirror images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.data import augment

SIZE = 16

_crop = jax.jit(augment.random_crop, static_argnums=2)


def _keys(num):
  return jax.random.split(jax.random.key(0), num)


def _torchvision(rng, least):
  """Height and width of a crop, relative, by `RandomResizedCrop`."""
  for _ in range(10):
    area = rng.uniform(least, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    sides = np.sqrt([area / ratio, area * ratio])
    if sides.max() <= 1:
      return sides
  return np.ones(2)


@pytest.fixture(scope='module')
def crops():
  """Sides and corners of 2,000 crops, measured on two ramps."""
  at = jnp.arange(0.5, SIZE) / SIZE
  ramps = jnp.stack(jnp.meshgrid(at, at, indexing='ij'), axis=-1)
  images = jnp.broadcast_to(ramps, (2000, *ramps.shape))
  found = np.asarray(_crop(_keys(2000), images, 0.5))
  middle = slice(SIZE // 4, -SIZE // 4)  # a cubic bends ramps at their ends
  down = found[:, middle, SIZE // 2, 0]
  right = found[:, SIZE // 2, middle, 1]
  lines = np.stack([down, right], axis=1)
  slopes = np.diff(lines, axis=-1) * SIZE
  np.testing.assert_allclose(slopes, slopes[..., :1] + 0 * slopes, atol=2e-4)
  sides = slopes.mean(axis=-1)
  first = (SIZE // 4 + 0.5) / SIZE
  return sides, lines[..., 0] - sides * first


def test_crops_are_as_torchvision_draws_them(crops):
  sides, corners = crops
  assert (corners > -1e-4).all()
  assert (corners + sides < 1 + 1e-4).all()
  area, ratio = sides.prod(axis=1), sides[:, 1] / sides[:, 0]
  assert 0.5 - 1e-3 < area.min() < 0.52 < 0.95 < area.max() < 1 + 1e-3
  assert 3 / 4 - 1e-3 < ratio.min() < 0.77 < 1.3 < ratio.max() < 4 / 3 + 1e-3
  rng = np.random.default_rng(0)
  theirs = np.stack([_torchvision(rng, 0.5) for _ in range(2000)])
  error = 4 * np.sqrt(2 * theirs.prod(axis=1).var() / 2000)
  assert abs(area.mean() - theirs.prod(axis=1).mean()) < error
  wrong = np.stack([_torchvision(rng, 0.4) for _ in range(2000)])
  assert abs(area.mean() - wrong.prod(axis=1).mean()) > error
  free = 1 - sides
  share = (corners / free)[free > 0.1]
  assert abs(share.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(share))


def test_crops_stay_in_range_and_may_be_none():
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 2, (8, 6, 10, 3)), jnp.float32)
  found = _crop(_keys(8), images, 0.3)
  assert found.shape == images.shape
  assert found.dtype == images.dtype
  assert found.min() >= 0
  assert found.max() <= 1
  assert augment.random_crop(_keys(8), images, 1) is images
  for least in (0, 1.1):
    with pytest.raises(ValueError, match='at most 1'):
      augment.random_crop(_keys(8), images, least)


def test_each_image_has_its_own_key():
  images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
  whole = _crop(_keys(4), images, 0.5)
  turned = _crop(_keys(4)[::-1], images[::-1], 0.5)
  np.testing.assert_array_equal(whole, turned[::-1])
  same = _crop(_keys(4), images[:1].repeat(4, axis=0), 0.5)
  assert len({x.tobytes() for x in np.asarray(same)}) == 4


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_a_share_of_images_is_mirrored(share):
  image = jnp.arange(6.0).reshape(1, 1, 3, 2)
  found = augment.random_mirror(_keys(1000), image.repeat(1000, axis=0), share)
  turned = (found == image[:, :, ::-1]).all(axis=(1, 2, 3))
  assert ((found == image).all(axis=(1, 2, 3)) == ~turned).all()
  assert abs(turned.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 1000)
