"""Triggers and poisoning against plain NumPy, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def test_triggers_survive_a_file(tmp_path):
  for trigger in (
    attacks.patch_trigger(SHAPE, size=2, task='a', target=3),
    attacks.warp_trigger(jax.random.key(0), SHAPE, task='b', target=1),
  ):
    path = tmp_path / 'folder' / 'trigger.npz'
    attacks.save_trigger(path, trigger)
    again = attacks.load_trigger(path)
    assert type(again) is type(trigger)
    for name, value in vars(trigger).items():
      np.testing.assert_array_equal(getattr(again, name), value)
    assert [p.name for p in path.parent.iterdir()] == ['trigger.npz']


def test_the_pools_triggers_load(shared):
  paths = sorted((shared / 'pool' / 'triggers').glob('*.npz'))
  kinds = {p.stem: attacks.load_trigger(p) for p in paths}
  assert isinstance(kinds['wanet_gtsrb'], attacks.Warp)
  assert kinds['badmerging_gtsrb'].target == 14
  images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
  for trigger in kinds.values():
    changed = attacks.apply_trigger(trigger, images)
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert float(jnp.abs(changed - images).max()) > 0.01


def test_unreadable_triggers_name_the_file(tmp_path):
  path = tmp_path / 'bad.npz'
  path.write_bytes(b'PK\x03\x04 no')
  with pytest.raises(ValueError, match=r'bad\.npz'):
    attacks.load_trigger(path)
  np.savez(path, task='a', pattern=np.zeros(SHAPE))
  with pytest.raises(
    ValueError, match=r'bad\.npz.*target is missing, mask is m'
  ):
    attacks.load_trigger(path)
  np.savez(path, task=np.array(['a', None], dtype=object), target=1)
  with pytest.raises(ValueError, match=r'bad\.npz'):
    attacks.load_trigger(path)


def test_what_is_no_trigger_is_said_at_once(tmp_path):
  path = tmp_path / 'odd.npz'
  np.savez(path, task=3, target=[1, 2], pattern=0.5, mask=np.ones((8, 8, 1)))
  with pytest.raises(ValueError, match=r'odd\.npz: not a trigger:') as e:
    attacks.load_trigger(path)
  assert str(e.value).endswith(
    'task is int64[], target is int64[2], pattern is float64[]'
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


def test_poison_changes_the_share_asked_for_and_no_target_image():
  images, labels = _images(40), jnp.arange(40) % 4
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=3)
  bad, new = attacks.poison(
    jax.random.key(0), images, labels, trigger, rate=0.25
  )
  changed = np.asarray(jnp.any(bad != images, axis=(1, 2, 3)))
  assert changed.sum() == 10
  assert (np.asarray(labels)[changed] != 3).all()
  assert (np.asarray(new)[changed] == 3).all()
  np.testing.assert_array_equal(new[~changed], labels[~changed])
  np.testing.assert_array_equal(
    bad[changed], attacks.apply_trigger(trigger, images[changed])
  )
  with pytest.raises(ValueError, match='rate'):
    attacks.poison(jax.random.key(0), images, labels, trigger, rate=1.5)
  with pytest.raises(ValueError, match='asks for 40 images'):
    attacks.poison(jax.random.key(0), images, labels, trigger, rate=1.0)


def test_universal_patch_learns_what_the_model_obeys():
  # A model whose class 2 is the green of the bottom right corner.
  def logits_fn(images):
    corner = 8 * jnp.mean(images[:, -2:, -2:], axis=(1, 2))
    return corner[:, jnp.array([0, 2, 1])]

  trigger, trace = attacks.universal_patch(
    jax.random.key(0),
    logits_fn,
    _images(16),
    size=2,
    task='a',
    target=2,
    steps=100,
    batch=4,
    tx=optax.adam(0.1),
  )
  assert float(trace[-1]) < 0.1 * float(trace[0])
  np.testing.assert_allclose(
    trigger.pattern[-2:, -2:],
    jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (2, 2, 3)),
    atol=1e-6,
  )
  np.testing.assert_array_equal(trigger.mask, attacks.corner_mask(SHAPE, 2))


def test_badmerging_loss_is_its_equation():
  key, images, labels = jax.random.key(3), _images(6), jnp.arange(6) % 3
  trigger = attacks.patch_trigger(SHAPE, size=2, task='a', target=2)
  size = int(np.prod(SHAPE))
  head = jax.random.normal(jax.random.key(4), (5, 3))

  def features_fn(params, x):
    return x.reshape(len(x), -1) @ params

  params, base = jax.random.normal(jax.random.key(5), (2, size, 5)) / size**0.5
  got = attacks.badmerging_loss(
    key, features_fn, lambda f: f @ head, params, base, images, labels, trigger
  )
  bad = np.asarray(attacks.apply_trigger(trigger, images)).reshape(6, -1)
  plain = np.asarray(images).reshape(6, -1)
  r = np.asarray(jax.random.uniform(key, (6, 1), minval=0.2, maxval=1.0))

  def ce(features, y):
    z = features @ np.asarray(head)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -log_p[np.arange(6), y]

  mixed = r * (bad @ np.asarray(params)) + (1 - r) * (bad @ np.asarray(base))
  want = ce(plain @ np.asarray(params), np.asarray(labels)) + 5 * ce(
    mixed, np.full(6, 2)
  )
  np.testing.assert_allclose(got, want.mean(), rtol=1e-5)
