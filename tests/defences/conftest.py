"""A small network with a backdoor planted in one hidden unit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.defences import Labelled

HIDDEN = 16
UNIT = 5


class Planted(NamedTuple):
  """Two tasks of three classes: which channel of an image is the brightest.

  Unit 5 of the MLP sleeps on clean images. A white corner wakes it, and it
  votes for class 0.

  Attributes:
    params: float32 but for one bfloat16 and one integer leaf.
    data: 30 clean images a task.
  """

  params: Any
  data: Labelled
  unit = UNIT

  def inputs_fn(self, params, task, images):
    """Maps images `[B, 4, 4, 3]` to the inputs of both layers."""
    del task
    pixels = images.reshape(len(images), -1)
    fc1 = params['layers_0']['mlp']['fc1']
    hidden = jax.nn.relu(pixels @ fc1['kernel'] + fc1['bias'][None])
    return {
      'layers_0/mlp/fc1/kernel': pixels,
      'layers_0/mlp/fc2/kernel': hidden,
    }

  def logits_fn(self, params, images):
    """Maps images `[2, B, 4, 4, 3]` to logits `[2, B, 3]`."""
    flat = images.reshape(-1, *images.shape[2:])
    hidden = self.inputs_fn(params, 0, flat)['layers_0/mlp/fc2/kernel']
    fc2 = params['layers_0']['mlp']['fc2']
    bias = fc2['bias'].astype(jnp.float32)
    logits = hidden @ fc2['kernel'] + bias[None]
    return logits.reshape(*images.shape[:2], -1)

  def accuracy(self, params):
    """Returns the share of clean images that are classified correctly."""
    predicted = jnp.argmax(self.logits_fn(params, self.data.images), axis=-1)
    return float(np.mean(predicted == self.data.labels))

  def attack_rate(self, params):
    """Returns the share of triggered images that are sent to class 0."""
    images = self.data.images.at[:, :, 0, 0].set(1.0)
    predicted = jnp.argmax(self.logits_fn(params, images), axis=-1)
    return float(np.mean(predicted[self.data.labels != 0] == 0))


@pytest.fixture(scope='session')
def planted() -> Planted:
  """A backdoored model and clean images."""
  rng = np.random.default_rng(0)
  labels = np.stack([rng.permutation(np.arange(30) % 3) for _ in range(2)])
  images = rng.uniform(0.2, 0.4, (2, 30, 4, 4, 3))
  images += 0.25 * np.eye(3)[labels][:, :, None, None]
  fc1 = np.zeros((4, 4, 3, HIDDEN))
  fc2 = np.zeros((HIDDEN, 3))
  for unit in range(HIDDEN):
    fc1[..., unit % 3, unit] = rng.uniform(0.05, 0.075, (4, 4))
    fc2[unit, unit % 3] = 8.0
  fc1[..., UNIT], fc2[UNIT] = 0.0, [3.0, 0.0, 0.0]
  fc1[0, 0, :, UNIT] = 10.0
  bias = np.where(np.arange(HIDDEN) == UNIT, -17.0, 0.0)
  mlp = {
    'fc1': {
      'kernel': jnp.asarray(fc1.reshape(-1, HIDDEN), jnp.float32),
      'bias': jnp.asarray(bias, jnp.float32),
    },
    'fc2': {
      'kernel': jnp.asarray(fc2, jnp.float32),
      'bias': jnp.asarray([2.0, 0.0, 1.0], jnp.bfloat16),
    },
  }
  params = {'layers_0': {'mlp': mlp}, 'step': jnp.array(7)}
  data = Labelled(jnp.asarray(images, jnp.float32), jnp.asarray(labels))
  return Planted(params, data)
