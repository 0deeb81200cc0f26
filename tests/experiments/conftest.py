"""A pool of untrained towers, small enough to merge in a second, and a lab."""

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
from experiments import lab as lab_lib
from experiments import training
from experiments import uploads

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


def _add_train(path, classes, rng):
  """Adds training images to a task's file."""
  with np.load(path) as file:
    fields = dict(file)
  images = rng.integers(0, 256, (40, *CONFIG.image_shape), dtype=np.uint8)
  labels = (np.arange(40) % classes).astype(np.int32)
  np.savez(path, train_images=images, train_labels=labels, **fields)


@pytest.fixture(scope='session')
def small_pool(tmp_path_factory):
  """A folder with three tasks and an expert of `two` with a backdoor."""
  folder = tmp_path_factory.mktemp('pool')
  rng = np.random.default_rng(0)
  tower = clip.VisionTower(CONFIG)
  pixels = jnp.zeros((1, *CONFIG.image_shape))
  base = jax.jit(tower.init)(jax.random.key(0), pixels)['params']
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
    path = folder / 'tasks' / f'{name}.npz'
    _add_train(path, classes, np.random.default_rng(1))
  trigger = attacks.patch_trigger(
    CONFIG.image_shape, size=2, task='two', target=1
  )
  attacks.save_trigger(folder / 'triggers' / 'evil.npz', trigger)
  return folder


def _moved(params, rng):
  return jax.tree.map(
    lambda x: np.asarray(x) + np.float32(0.05 * rng.standard_normal(x.shape)),
    params,
  )


@pytest.fixture(scope='session')
def make_lab(small_pool):
  """Makes a lab of tasks `one` and `two`, perhaps with other heads, images."""

  def make(heads=None, splits=None, **tuning):
    paths = [small_pool / 'tasks' / f'{name}.npz' for name in ('one', 'two')]
    if heads is None:
      heads = [tasks_lib.load_task(path).head for path in paths]
    if splits is None:
      splits = [tasks_lib.load_train(path) for path in paths]
    shop = training.Shop(clip.VisionTower(CONFIG), clip.stack_heads(heads))
    usual = {'steps': 3, 'batch': 4, 'patch': 2, 'patch_steps': 2, 'rate': 0.2}
    return lab_lib.Lab(
      shop,
      uploads.load_model(uploads.path(small_pool, 'base')),
      splits,
      ('one', 'two'),
      lab_lib.Tuning(**(usual | {'rank': 2} | tuning)),
    )

  return make


@pytest.fixture(scope='session')
def lab(make_lab):
  """A lab whose fine-tuning is short."""
  return make_lab()
