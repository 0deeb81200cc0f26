"""Losses against plain NumPy, and with classes that a task lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import losses

T, B, L = 2, 6, 4


def make_logits(seed):
  rng = np.random.default_rng(seed)
  return (3 * rng.normal(size=(T, B, L))).astype(np.float32)


def softmax(x):
  e = np.exp(np.asarray(x, np.float64))
  return e / e.sum(axis=-1, keepdims=True)


LABELS = jnp.asarray(np.random.default_rng(7).integers(0, L, (T, B)))
SOFT = jnp.asarray(softmax(make_logits(8)), jnp.float32)


def test_entropy():
  x = make_logits(0)
  p = softmax(x)
  want = -(p * np.log(p + 1e-8)).sum(axis=-1)
  np.testing.assert_allclose(losses.entropy(jnp.asarray(x)), want, rtol=1e-4)


def test_cross_entropy_to_classes_and_to_probabilities():
  x = jnp.asarray(make_logits(0))
  log_p = np.log(softmax(x))
  want = -np.take_along_axis(log_p, np.asarray(LABELS)[..., None], -1)[..., 0]
  np.testing.assert_allclose(losses.cross_entropy(x, LABELS), want, rtol=1e-4)
  want = -(np.asarray(SOFT) * log_p).sum(axis=-1)
  np.testing.assert_allclose(losses.cross_entropy(x, SOFT), want, rtol=1e-4)


def test_shun_asks_only_images_that_are_not_of_the_class():
  logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  labels = np.array([[0, 1, 2], [3, 3, 0]])
  classes = np.array([[1, 1, 1], [3, -1, 2]])
  share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  each = [-np.log1p(-0.999 * share[0, i, 1]) for i in (0, 2)]
  want = [sum(each) / 3, -np.log1p(-0.999 * share[1, 2, 2]) / 3]
  got = losses.shun(*map(jnp.asarray, (logits, labels, classes)))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  certain = jnp.full((1, 1, 2), -1e4).at[..., 0].set(0.0)
  zero = jnp.zeros((1, 1), jnp.int32)
  for dtype in (jnp.float32, jnp.bfloat16):
    loss, grad = jax.value_and_grad(
      lambda x: losses.shun(x, zero + 1, zero).sum()
    )(certain.astype(dtype))
    assert np.isfinite([float(loss), *map(float, grad.ravel())]).all()


def test_jensen_shannon():
  x, y = make_logits(0), make_logits(1)
  p, q = softmax(x), softmax(y)
  mean = (p + q) / 2
  want = (p * np.log(p / mean) + q * np.log(q / mean)).sum(axis=-1) / 2
  x, y = jnp.asarray(x), jnp.asarray(y)
  got = losses.jensen_shannon(x, y)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(losses.jensen_shannon(y, x), got, atol=1e-6)
  apart = losses.jensen_shannon(jnp.array([99.0, 0.0]), jnp.array([0.0, 99.0]))
  assert apart == pytest.approx(np.log(2), abs=1e-5)


def test_shared_adversarial():
  x = jnp.asarray(make_logits(0))
  wrong = np.take_along_axis(softmax(x), np.asarray(LABELS)[..., None], -1)
  wrong = wrong[..., 0]
  want = -0.5 * (
    np.log(1e-6 + np.minimum(1 - wrong, 0.999))
    + np.log(1 + 1e-6 - np.maximum(wrong, 0.001))
  )
  got = losses.shared_adversarial(x, LABELS)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_shared_adversarial_rests_once_the_class_is_unlearned():
  grad = jax.grad(lambda x: losses.shared_adversarial(x, jnp.array(0)))
  assert not grad(jnp.array([-9.0, 0.0, 0.0])).any()
  assert grad(jnp.array([-1.0, 0.0, 0.0]))[0] > 0.1


def test_unshared_divergence_leaves_out_mistakes_that_are_shared():
  sure = 9 * jnp.eye(3)
  logits, other = sure[jnp.array([[1, 1, 0]])], sure[jnp.array([[1, 2, 0]])]
  zeros = jnp.zeros((1, 3), jnp.int32)
  got = losses.unshared_divergence(logits, other, zeros, zeros)
  want = losses.jensen_shannon(logits[:, 1], other[:, 1]) / 3
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # Both predict class 1 on the first image; without this mistake it counts.
  apart = losses.unshared_divergence(sure[zeros + 1], sure[zeros], zeros, zeros)
  np.testing.assert_allclose(apart, 3 * want, rtol=1e-6)


def test_unlearn_shared_takes_what_fools_the_reference_only():
  logits = jnp.asarray(make_logits(0)[:1, :4])
  clean = 9 * jax.nn.one_hot(jnp.array([[0, 1, 3, 3]]), L)
  # Fools both, agrees with the model's own clean prediction, does not fool.
  reference_clean = jnp.array([[0, 0, 2, 3]])
  reference_wrong = jnp.array([[1, 1, 2, 0]])
  each = losses.shared_adversarial(logits, reference_wrong)[0]
  np.testing.assert_allclose(
    losses.unlearn_shared(logits, clean, reference_clean, reference_wrong),
    [(each[0] + each[3]) / 4],
    rtol=1e-6,
  )


LOSSES = {
  'entropy': losses.entropy,
  'cross_entropy': lambda x: losses.cross_entropy(x, LABELS),
  'cross_entropy_soft': lambda x: losses.cross_entropy(
    x, jnp.pad(SOFT, ((0, 0), (0, 0), (0, x.shape[-1] - L)))
  ),
  'jensen_shannon': lambda x: losses.jensen_shannon(x, x[:, ::-1]),
  'shared_adversarial': lambda x: losses.shared_adversarial(x, LABELS),
}


@pytest.mark.parametrize('loss_fn', LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize('scale', [1.0, 100.0])
def test_missing_classes_change_nothing(loss_fn, scale):
  @jax.jit
  def value_and_grad(x):
    each, pullback = jax.vjp(loss_fn, x)
    return each, pullback(jnp.ones_like(each))[0]

  x = jnp.asarray(make_logits(0)) * scale
  pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, 3)))
  each, grad = value_and_grad(x)
  assert jnp.isfinite(each).all()
  assert jnp.isfinite(grad).all()
  padded = pad(x, constant_values=losses.MASKED_LOGIT)
  padded_each, padded_grad = value_and_grad(padded)
  np.testing.assert_allclose(padded_each, each, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(padded_grad, pad(grad), rtol=1e-4, atol=1e-6)
