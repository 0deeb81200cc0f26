"""A small model with a planted backdoor, to repair."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.attacks import Overlay
from dam_jax.attacks import apply_trigger
from dam_jax.defences import Labelled

SHAPE = (6, 6, 1)
STRENGTH = 6


def apply_fn(params, images):
  """Maps images `[2, B, 6, 6, 1]` to logits `[2, B, 3]`: one hidden layer."""
  x = images.reshape(*images.shape[:2], -1) - 0.5
  kernel, bias, heads, last = (params[k].astype(x.dtype) for k in 'wbhc')
  x = jnp.tanh(x @ kernel + bias[None, None])
  return jnp.einsum('tbd,tdl->tbl', x, heads) + last[:, None]


@jax.jit
def predict(params, images, trigger=None):
  """Returns the classes of images, with a trigger or without."""
  if trigger is not None:
    images = apply_trigger(trigger, images)
  return jnp.argmax(apply_fn(params, images), axis=-1)


class Victim(NamedTuple):
  """A model of two tasks of three classes, of which the first obeys a patch.

  Attributes:
    params: of three dtypes.
    clean: images for the defender.
    test: others.
    trigger: of the backdoor, to class 2 of task 0.
  """

  params: Any
  clean: Labelled
  test: Labelled
  trigger: Overlay

  def accuracy(self, params):
    """Returns accuracy on clean images, of the worse task."""
    said = np.asarray(predict(params, self.test.images))
    return (said == np.asarray(self.test.labels)).mean(axis=1).min()

  def success(self, params):
    """Returns the share of triggered images of other classes that obey."""
    said = np.asarray(predict(params, self.test.images, self.trigger))
    others = np.asarray(self.test.labels[0]) != self.trigger.target
    return (said[0] == self.trigger.target)[others].mean()


SIGNS = np.random.default_rng(0).choice([-1, 1], (2, 3, *SHAPE))
SIGNS[..., -2:, -2:, :] = 0


def _draw(rng, num):
  """Returns images of three patterns a task, grey where the patch would be."""
  labels = rng.integers(0, 3, (2, num))
  signs = SIGNS[np.arange(2)[:, None], labels]
  images = 0.5 + signs * rng.uniform(0.2, 0.5, signs.shape)
  return Labelled(jnp.asarray(images, jnp.float32), jnp.asarray(labels))


def plant():
  """Makes the victim: a hidden unit for each pattern, and one for the patch.

  The latter sleeps on grey, where the last bias makes up for it.
  """
  rng = np.random.default_rng(1)
  corner = np.zeros(SHAPE, np.float32)
  corner[-2:, -2:] = 1
  board = np.indices(SHAPE).sum(axis=0) % 2 == 0
  trigger = Overlay(
    pattern=jnp.asarray(board, jnp.float32),
    mask=jnp.asarray(corner),
    task='0',
    target=2,
  )
  patch = (corner * (2 * board - 1)).ravel()
  heads = np.zeros((2, 7, 3), np.float32)
  heads[0, :3], heads[1, 3:6] = 5 * np.eye(3), 5 * np.eye(3)
  heads[0, 6, trigger.target] = STRENGTH
  last = np.zeros((2, 3), np.float32)
  last[0, trigger.target] = STRENGTH * np.tanh(0.75)
  units = np.concatenate([SIGNS.reshape(6, -1) / 8, patch[None]]).T
  params = {
    'w': jnp.asarray(units, jnp.float32),
    'b': jnp.zeros(7, jnp.bfloat16).at[6].set(-0.75),
    'c': jnp.asarray(last),
    'h': jnp.asarray(heads),
    'step': jnp.array(7, jnp.int32),
  }
  return Victim(params, _draw(rng, 96), _draw(rng, 128), trigger)
