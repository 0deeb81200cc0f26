"""Triggers against plain NumPy, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import attacks

SHAPE = (8, 8, 3)


def _images(num=5, seed=0):
  return jax.random.uniform(jax.random.key(seed), (num, *SHAPE))


def _overlay(**fields):
  fields = {
    'pattern': jnp.ones(SHAPE),
    'mask': attacks.corner_mask(SHAPE, 2),
    'task': 'a',
    'target': 1,
  } | fields
  return attacks.Overlay(**fields)


def test_patch_covers_the_corner_and_nothing_else():
  trigger = attacks.patch_trigger(SHAPE, size=3, task='a', target=1)
  images = _images()
  got = np.asarray(attacks.apply_trigger(trigger, images))
  want = np.array(images)
  board = (np.indices((8, 8)).sum(0) % 2 == 0).astype(np.float32)
  want[:, -3:, -3:] = board[-3:, -3:, None]
  np.testing.assert_array_equal(got, want)


def test_blend_mixes_by_alpha():
  trigger = attacks.blend_trigger(
    jax.random.key(1), SHAPE, alpha=0.25, task='a', target=0
  )
  images = _images()
  np.testing.assert_allclose(
    attacks.apply_trigger(trigger, images),
    0.75 * np.asarray(images) + 0.25 * np.asarray(trigger.pattern)[None],
    rtol=1e-6,
  )
  assert trigger.kind == 'blend'


def test_triggers_take_any_leading_axes():
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=1)
  images = _images(6)
  flat = attacks.apply_trigger(trigger, images)
  deep = attacks.apply_trigger(trigger, images.reshape(2, 3, *SHAPE))
  np.testing.assert_array_equal(deep.reshape(flat.shape), flat)


def test_warp_by_whole_pixels_moves_the_image():
  y, x = np.meshgrid(
    np.linspace(-1, 1, 8), np.linspace(-1, 1, 8), indexing='ij'
  )
  grid = np.stack([x + 2 / 7, y - 4 / 7], axis=-1)
  trigger = attacks.Warp(grid=jnp.asarray(grid), task='a', target=0)
  images = np.asarray(_images())
  rows, columns = (
    np.clip(np.arange(8) - 2, 0, 7),
    np.clip(np.arange(8) + 1, 0, 7),
  )
  np.testing.assert_allclose(
    attacks.apply_trigger(trigger, jnp.asarray(images)),
    images[:, rows][:, :, columns],
    atol=2e-6,
  )


def test_warp_between_pixels_is_bilinear():
  y, x = np.meshgrid(
    np.linspace(-1, 1, 8), np.linspace(-1, 1, 8), indexing='ij'
  )
  grid = np.stack([x + 1 / 7, y], axis=-1)
  trigger = attacks.Warp(grid=jnp.asarray(grid), task='a', target=0)
  images = np.asarray(_images())
  right = images[:, :, np.clip(np.arange(8) + 1, 0, 7)]
  np.testing.assert_allclose(
    attacks.apply_trigger(trigger, jnp.asarray(images)),
    (images + right) / 2,
    atol=2e-6,
  )


def test_wanet_grid_is_smooth_and_as_strong_as_asked():
  plain = attacks.warp_trigger(
    jax.random.key(0), SHAPE, strength=0.0, task='a', target=0
  )
  images = _images()
  np.testing.assert_allclose(
    attacks.apply_trigger(plain, images), images, atol=2e-6
  )
  strong = attacks.warp_trigger(
    jax.random.key(0), SHAPE, strength=1.0, task='a', target=0
  )
  # Inside the image, where nothing is clipped, about one pixel on average.
  moved = np.abs(np.asarray(strong.grid - plain.grid))[2:-2, 2:-2] * 8 / 2
  assert 0.3 < moved.mean() < 2.5
  with pytest.raises(ValueError, match='control must be at least 2, got 1'):
    attacks.warp_trigger(
      jax.random.key(0), SHAPE, control=1, task='a', target=0
    )


def test_everything_that_does_not_fit_is_said_at_once():
  wrong = _overlay(pattern=2 * jnp.ones(SHAPE), mask=jnp.zeros((4, 4, 1)))
  with pytest.raises(ValueError, match='outside') as e:
    attacks.check_trigger(wrong, SHAPE)
  assert 'mask is [4, 4, 1], images want [8, 8, 1]' in str(e.value)
  with pytest.raises(ValueError, match='not finite'):
    attacks.check_trigger(_overlay(pattern=jnp.full(SHAPE, jnp.nan)), SHAPE)
  with pytest.raises(ValueError, match='target must not be negative'):
    attacks.check_trigger(_overlay(target=-1), SHAPE)
  attacks.check_trigger(_overlay(), SHAPE)


@pytest.mark.parametrize('size', [0, 9])
def test_a_patch_larger_than_the_image_is_refused(size):
  with pytest.raises(ValueError, match=f'trigger of {size} pixels'):
    attacks.patch_trigger(SHAPE, size=size, task='a', target=0)


@pytest.mark.parametrize('alpha', [-0.1, 1.1])
def test_alpha_is_a_share(alpha):
  with pytest.raises(ValueError, match=f'alpha.*{alpha}'):
    attacks.blend_trigger(
      jax.random.key(0), SHAPE, alpha=alpha, task='a', target=0
    )


def test_sine_is_clipped_after_it_is_added():
  trigger = attacks.sine_trigger(
    SHAPE, strength=0.6, frequency=2, task='a', target=1
  )
  images = _images()
  wave = 0.6 * np.sin(2 * np.pi * 2 * np.arange(8) / 8)[None, None, :, None]
  got = attacks.apply_trigger(trigger, images)
  want = np.clip(np.asarray(images) + wave, 0, 1)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert (np.asarray(got) == 0).any()
  assert (np.asarray(got) == 1).any()
  attacks.check_trigger(trigger, SHAPE)
  far = attacks.Shift(offset=2 * jnp.ones(SHAPE), task='a', target=1)
  with pytest.raises(ValueError, match=r'offset has values outside \[-1, 1\]'):
    attacks.check_trigger(far, SHAPE)
  with pytest.raises(ValueError, match=r'strength.*1\.5'):
    attacks.sine_trigger(SHAPE, strength=1.5, task='a', target=1)
