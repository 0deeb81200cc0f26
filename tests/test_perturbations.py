"""The adversaries: what they do to images, what they cost, where they stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax import losses
from dam_jax import perturbations
from dam_jax.typing import Batch
from dam_jax.warps import warp

T, B, SHAPE = 2, 3, (4, 5, 3)


def preprocess(images):
  return (images - 0.5) / 0.25


def make_images():
  rng = np.random.default_rng(0)
  return rng.uniform(size=(T, B, *SHAPE)).astype(np.float32)


def make_delta():
  rng = np.random.default_rng(1)
  return rng.normal(size=(T, *SHAPE)).astype(np.float32)


def test_additive_starts_at_nothing():
  adversary = perturbations.additive(SHAPE, preprocess_fn=preprocess)
  params = adversary.init(jax.random.key(0), T)
  assert params.shape == (1, T, *SHAPE)
  assert not params.any()
  images = jnp.asarray(make_images())
  np.testing.assert_allclose(
    adversary.perturb(params[0], images, True), preprocess(images), rtol=1e-6
  )
  assert adversary.price(params + 9) == 0


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('normalized', [False, True])
def test_additive_clips_in_the_space_it_adds_in(normalized, clip):
  adversary = perturbations.additive(
    SHAPE, preprocess_fn=preprocess, normalized=normalized
  )
  images, delta = make_images(), make_delta()
  if normalized:
    want = preprocess(images) + delta[:, None]
    want = np.clip(want, 0, 1) if clip else want
  else:
    want = preprocess(np.clip(images + delta[:, None], 0, 1))
  got = adversary.perturb(jnp.asarray(delta), jnp.asarray(images), clip)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_additive_projects_into_its_ball():
  delta = make_delta()
  free = perturbations.additive(SHAPE, preprocess_fn=preprocess)
  np.testing.assert_array_equal(free.project(jnp.asarray(delta)), delta)
  ball = perturbations.additive(SHAPE, preprocess_fn=preprocess, radius=0.5)
  inside = ball.project(jnp.asarray(delta))
  np.testing.assert_array_equal(inside, np.clip(delta, -0.5, 0.5))
  np.testing.assert_array_equal(ball.project(inside), inside)


def test_soft_patch_starts_faint_and_each_restart_apart():
  adversary = perturbations.soft_patch(
    SHAPE, preprocess_fn=preprocess, area=4.0, init_logit=-3.0, restarts=3
  )
  patch = jax.jit(adversary.init, static_argnums=1)(jax.random.key(0), T)
  assert patch.mask_logits.shape == (3, T, 4, 5, 1)
  assert patch.pattern_logits.shape == (3, T, 4, 5, 3)
  assert jnp.abs(patch.mask_logits.mean() + 3) < 0.05
  assert patch.opacity().max() < 0.1
  for logits in patch:
    assert len(np.unique(np.asarray(logits))) == logits.size
  assert adversary.restarts == 3


def test_soft_patch_blends_in_pixels():
  adversary = perturbations.soft_patch(SHAPE, preprocess_fn=preprocess, area=4)
  images, pattern = make_images(), make_delta()
  opacity = np.zeros((T, 4, 5, 1), np.float32)
  opacity[:, 0], opacity[:, 1], opacity[:, 2:] = -99.0, 99.0, 0.3
  patch = perturbations.SoftPatch(jnp.asarray(opacity), jnp.asarray(pattern))
  got = adversary.perturb(patch, jnp.asarray(images), True)
  a, b = (1 / (1 + np.exp(-x.astype(np.float64))) for x in (opacity, pattern))
  want = (1 - a[:, None]) * images + a[:, None] * b[:, None]
  np.testing.assert_allclose(got, preprocess(want), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got[:, :, 0], preprocess(images[:, :, 0]))


def test_soft_patch_is_free_up_to_its_area():
  adversary = perturbations.soft_patch(
    SHAPE, preprocess_fn=preprocess, area=4.0, price=3.0
  )

  def patch(*covered):
    """One patch a task, that covers so many of 20 pixels."""
    rows = [np.where(np.arange(20) < n, 99.0, -99.0) for n in covered]
    logits = np.stack(rows).reshape(len(covered), 4, 5, 1)
    return perturbations.SoftPatch(
      jnp.asarray(logits, jnp.float32), jnp.zeros((len(covered), *SHAPE))
    )

  assert adversary.price(patch(4, 0)) == 0
  assert adversary.price(patch(8, 3)) == pytest.approx(3.0)
  assert adversary.price(patch(6, 12)) == pytest.approx(3.0 * (0.5 + 2.0))


def _climb(adversary, steps):
  """Ascends the cross-entropy of a linear model; returns loss and params."""
  images = jnp.asarray(make_images())
  weights = jnp.asarray(
    np.random.default_rng(2).normal(size=(60, 3)) / 8, jnp.float32
  )

  def logits_fn(pixels):
    return pixels.reshape(T, B, -1) @ weights

  labels = jnp.argmax(logits_fn(preprocess(images)), axis=-1)

  def gain_fn(pixels, images, references, classes):
    del images, references, classes
    logits = logits_fn(pixels)
    gain = jnp.mean(losses.cross_entropy(logits, labels), axis=-1)
    return gain, jnp.mean(jnp.argmax(logits, axis=-1) != labels, axis=-1)

  def loss_fn(params):
    pixels = adversary.perturb(params, images, False)
    return jnp.mean(gain_fn(pixels, images, None, None)[0])

  @jax.jit
  def run(key):
    start = adversary.init(key, T)
    states = jax.vmap(adversary.tx.init)(start)
    draws = Batch(jnp.stack([images] * steps))
    turns = jnp.array([0])
    end, _, _ = adversary.ascend(start, states, turns, draws, gain_fn)
    start, end = jax.tree.map(lambda x: x[0], (start, end))
    return loss_fn(start), loss_fn(end), end

  return run(jax.random.key(0))


def test_ascent_of_additive_raises_the_loss_inside_its_ball():
  adversary = perturbations.additive(
    SHAPE, preprocess_fn=preprocess, radius=0.05, tx=optax.adam(0.01)
  )
  start, end, params = _climb(adversary, 30)
  assert end > start + 0.3
  assert jnp.abs(params).max() == jnp.float32(0.05)


def test_ascent_of_a_patch_raises_the_loss_and_heeds_its_price():
  covered = []
  for price in (0.0, 5.0):
    adversary = perturbations.soft_patch(
      SHAPE, preprocess_fn=preprocess, area=2.0, price=price
    )
    start, end, patch = _climb(adversary, 40)
    assert end > start + 0.3
    covered.append(patch.opacity().sum(axis=(1, 2, 3)))
  assert (covered[0] > 6).all()
  assert (covered[1] < 3).all()


def some_patches(**options):
  adversary = perturbations.soft_patch(
    SHAPE, preprocess_fn=preprocess, area=4.0, init_logit=0.0, **options
  )
  return adversary, adversary.init(jax.random.key(0), T)


def test_images_are_dealt_to_the_restarts():
  adversary, params = some_patches(restarts=2)
  images = jnp.asarray(make_images())
  for count, hands in ((0, [0, 1, 0]), (1, [1, 0, 1])):
    got, _ = adversary.deal(params, images, jnp.int32(count))
    for i, hand in enumerate(hands):
      own = jax.tree.map(lambda x, hand=hand: x[hand], params)
      want = adversary.perturb(own, images, True)[:, i]
      np.testing.assert_allclose(got[:, i], want, rtol=1e-6)


def test_images_are_dealt_to_seeds_too_which_never_move():
  _, given = some_patches(restarts=3)
  patches = jax.tree.map(lambda x: x[1:2], given)
  seeds = perturbations.Seeds(patches, jnp.zeros((1, T), jnp.int32))
  adversary, free = some_patches(restarts=1, seeds=seeds)
  start = adversary.start(jax.random.key(0), T)
  for x, own, seed in zip(start, free, patches, strict=True):
    np.testing.assert_array_equal(x, jnp.concatenate([own, seed]))
  moved = jax.tree.map(lambda x: x + 1, start)
  images = jnp.asarray(make_images())
  got, shunned = adversary.deal(moved, images, jnp.int32(0))
  assert shunned is None
  for i, (own, at) in enumerate(((moved, 0), (moved, 1), (patches, 0))):
    own = jax.tree.map(lambda x, at=at: x[at], own)
    want = adversary.perturb(own, images, True)[:, i]
    np.testing.assert_allclose(got[:, i], want, rtol=1e-6)


def test_images_are_dealt_to_warps_too():
  _, patches = some_patches(restarts=1)
  points = jax.random.normal(jax.random.key(1), (2, T, 3, 3, 2))
  shunned = jnp.array([[4, -1], [0, 2], [-1, 3]], jnp.int32)
  seeds = perturbations.Seeds(
    patches, jnp.zeros((1, T), jnp.int32), points, shunned
  )
  adversary, _ = some_patches(restarts=1, seeds=seeds)
  moved = jax.tree.map(lambda x: x + 1, adversary.start(jax.random.key(0), T))
  assert len(moved.mask_logits) == adversary.moving == 2
  images = jnp.asarray(make_images())
  got, shunned = zip(
    *(adversary.deal(moved, images, jnp.int32(i)) for i in range(2)),
    strict=True,
  )
  want = [[-1, -1, 4, 0, -1, -1], [-1, -1, -1, 2, 3, -1]]
  assert jnp.concatenate(shunned, axis=1).tolist() == want
  for n, pixels in enumerate(jnp.concatenate(got, axis=1).swapaxes(0, 1)):
    hand, image = n % 5, images[:, n % B]
    if hand < 3:
      own = jax.tree.map(lambda x, y, h=hand: [*x, *y][h], moved, patches)
      want = adversary.perturb(own, image[:, None], True)[:, 0]
    else:
      want = preprocess(jax.vmap(warp)(image, points[hand - 3]))
    np.testing.assert_allclose(pixels, want, rtol=1e-5, atol=1e-5)


def test_copies_of_seeds_take_turns_and_lead_to_their_classes():
  patches = jax.tree.map(jnp.zeros_like, some_patches(restarts=2)[1])
  classes = jnp.array([[0, 1], [2, 0]], jnp.int32)
  adversary, _ = some_patches(
    restarts=1, seeds=perturbations.Seeds(patches, classes)
  )
  params = adversary.start(jax.random.key(0), T)
  states = jax.vmap(adversary.tx.init)(params)
  draws = Batch(jnp.asarray(make_images())[None])

  def gain_fn(pixels, images, references, classes):
    del images, references
    zero = 0 * jnp.mean(pixels, axis=(1, 2, 3, 4))
    return zero - classes.astype(zero.dtype), zero

  for count, want in enumerate([[-1, -1], [0, 1], [2, 0], [-1, -1]]):
    turns = adversary.turns(jnp.int32(count), warm=False)
    assert turns.tolist() == [count % 3]
    *_, found = adversary.ascend(params, states, turns, draws, gain_fn)
    assert found['loss'].tolist() == want
  assert adversary.turns(jnp.int32(2), warm=True).tolist() == [0]


def test_restarts_ascend_on_their_own():
  adversary, params = some_patches(restarts=3)
  states = jax.vmap(adversary.tx.init)(params)
  images = jnp.asarray(make_images())
  draws = Batch(jnp.stack([images, images[:, ::-1]]))

  def gain_fn(pixels, images, references, classes):
    assert references is None
    del classes
    gain = jnp.mean(jnp.square(pixels - images), axis=(1, 2, 3, 4))
    return gain, gain > 1

  def go(*turns):
    return adversary.ascend(params, states, jnp.array(turns), draws, gain_fn)

  both, _, found = go(0, 2)
  assert found['loss'].shape == found['fooled'].shape == (T,)
  singles = [go(turn) for turn in range(3)]
  for turn, (single, *_) in enumerate(singles):
    for old, x, y in zip(params, both, single, strict=True):
      want = old if turn == 1 else y
      np.testing.assert_allclose(x[turn], want[turn], rtol=1e-5, atol=1e-5)
      assert (y[turn] != old[turn]).any()
      rest = jnp.array([i for i in range(3) if i != turn])
      np.testing.assert_array_equal(y[rest], old[rest])
  mean = (singles[0][2]['loss'] + singles[2][2]['loss']) / 2
  np.testing.assert_allclose(found['loss'], mean, rtol=1e-5)


@pytest.mark.parametrize(
  ('make', 'options', 'message'),
  [
    (perturbations.additive, {'radius': 0.0}, 'radius.*got 0.0'),
    (perturbations.additive, {'ascents': 0}, 'positive, got 0 and 1'),
    (perturbations.additive, {'image_shape': (4, 5)}, r'got \(4, 5\)'),
    (perturbations.soft_patch, {'area': 0.0}, 'area.*4 x 5 pixels, got 0.0'),
    (perturbations.soft_patch, {'area': 21.0}, 'area.*got 21.0'),
    (perturbations.soft_patch, {'restarts': 0}, 'positive, got 4 and 0'),
    (perturbations.soft_patch, {'image_shape': (0, 5, 3)}, r'got \(0, 5, 3\)'),
    (
      perturbations.soft_patch,
      {
        'seeds': perturbations.Seeds(
          perturbations.SoftPatch(jnp.zeros((2, 5, 1)), jnp.zeros(3)),
          jnp.zeros((2, 1), jnp.int32),
        )
      },
      r'seeds must be .* got \[\(2, 5, 1\), \(3,\), \(2, 1\)\]',
    ),
    (
      perturbations.soft_patch,
      {
        'seeds': perturbations.Seeds(
          perturbations.SoftPatch(
            jnp.zeros((2, 1, *SHAPE[:2], 1)), jnp.zeros((2, 1, *SHAPE))
          ),
          jnp.zeros((2, 1), jnp.int32),
          jnp.zeros((4, 3, 4, 4, 2)),
        )
      },
      r'warps must be \[W, 1, G, G, 2\], got \[4, 3, 4, 4, 2\]',
    ),
    (
      perturbations.soft_patch,
      {
        'seeds': perturbations.Seeds(
          perturbations.SoftPatch(
            jnp.zeros((2, 1, *SHAPE[:2], 1)), jnp.zeros((2, 1, *SHAPE))
          ),
          jnp.zeros((2, 1), jnp.int32),
          jnp.zeros((4, 1, 4, 4, 2)),
          jnp.zeros((2, 1), jnp.int32),
        )
      },
      r'shunned classes must be \[6, 1\], .* got \[2, 1\]',
    ),
  ],
)
def test_bad_adversaries_are_named(make, options, message):
  options = {'image_shape': SHAPE, 'preprocess_fn': preprocess, **options}
  if make is perturbations.soft_patch:
    options.setdefault('area', 4.0)
  with pytest.raises(ValueError, match=message):
    make(options.pop('image_shape'), **options)
