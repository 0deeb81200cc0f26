"""A pool of untrained towers, small enough to merge in a second."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert

CONFIG = clip.VisionConfig(
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  image_size=8,
  patch_size=4,
  projection_dim=6,
)
TASKS = {'one': 3, 'two': 4, 'three': 2}


def _task(name, classes, rng):
  def split(num):
    return tasks_lib.Split(
      rng.integers(0, 256, (num, *CONFIG.image_shape), dtype=np.uint8),
      (np.arange(num) % classes).astype(np.int32),
    )

  head = rng.standard_normal((CONFIG.projection_dim, classes))
  return tasks_lib.Task(
    name=name,
    head=(head / np.linalg.norm(head, axis=0)).astype(np.float32),
    label_names=[f'{name} {i}' for i in range(classes)],
    dev=split(8),
    test=split(12),
  )


@pytest.fixture(scope='session')
def small_pool(tmp_path_factory):
  """A folder with three tasks and an expert of `two` with a backdoor."""
  folder = tmp_path_factory.mktemp('pool')
  rng = np.random.default_rng(0)
  tower = clip.VisionTower(CONFIG)
  pixels = jnp.zeros((1, *CONFIG.image_shape))
  base = tower.init(jax.random.key(0), pixels)['params']
  for name in ('base', *(f'clean_{t}' for t in TASKS), 'evil'):
    params = base if name == 'base' else _moved(base, rng)
    checkpoint.save_params(
      folder / 'checkpoints' / f'{name}.safetensors',
      params,
      name_map=convert.clip_vision,
    )
  config = json.dumps(dataclasses.asdict(CONFIG))
  (folder / 'checkpoints' / 'config.json').write_text(config)
  for name, classes in TASKS.items():
    tasks_lib.save_task(folder / 'tasks', _task(name, classes, rng))
  trigger = attacks.patch_trigger(
    CONFIG.image_shape, size=2, task='two', target=1
  )
  attacks.save_trigger(folder / 'triggers' / 'evil.npz', trigger)
  return folder


def _moved(params, rng):
  return jax.tree.map(
    lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params
  )
