"""A pool made on the spot is one that the main job reads."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dam_jax import checkpoint
from dam_jax.data import builtin
from dam_jax.data import tasks as tasks_lib
from experiments import quickstart_pool
from experiments import training


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pool')
  shallow = dataclasses.replace(quickstart_pool.CONFIG, num_hidden_layers=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart_pool, 'CONFIG', shallow)
    quickstart_pool.make_pool(
      folder,
      console=Console(file=io.StringIO()),
      badnets='digits',
      badnets_target=3,
      badmerging='colour',
      badmerging_target=1,
      patch=4,
      pretrain_steps=2,
      fine_tune_steps=2,
      patch_steps=2,
    )
  return folder


def test_the_pool_loads_with_its_bad_experts(pool):
  bad = ['badnets_digits', 'badmerging_colour']
  found = tasks_lib.load_pool(pool, bad=bad)
  assert {task.name for task in found.tasks} == set(builtin.NAMES)
  assert len(found.clean) == len(builtin.NAMES)
  assert found.triggers['badnets_digits'].target == 3
  assert found.triggers['badmerging_colour'].task == 'colour'
  assert float(found.triggers['badmerging_colour'].mask.sum()) == 16
  base, experts = checkpoint.load_experts(found.base, found.experts)
  assert all(
    np.any(e != b[None])
    for b, e in zip(
      jax.tree.leaves(base), jax.tree.leaves(experts), strict=True
    )
  )


def test_a_pool_that_is_there_is_not_made_again(pool):
  path = pool / 'checkpoints' / 'base.safetensors'
  before = path.stat().st_mtime_ns
  quickstart_pool.make_pool(pool, console=Console(file=io.StringIO()))
  assert path.stat().st_mtime_ns == before


def test_all_that_is_wrong_is_said_before_any_training(tmp_path):
  with pytest.raises(ValueError, match='a pool to make:') as error:
    quickstart_pool.make_pool(
      tmp_path,
      console=Console(file=io.StringIO()),
      badnets='cats',
      badmerging='mnist',
      badmerging_target=10,
      patch=29,
      patch_steps=0,
    )
  assert len(str(error.value).splitlines()) == 5
  for words in (
    'badnets must be one of mnist',
    'badmerging_target 10 is not one of the 10 classes of mnist',
    'from 1 to the 28 pixels',
    'patch_steps must be positive, got 0',
  ):
    assert words in str(error.value)
  assert not list(tmp_path.iterdir())


def test_fit_descends():
  target = jnp.array([1.0, -2.0])

  def loss_fn(params, key):
    noise = 0.01 * jax.random.normal(key, params.shape)
    return jnp.sum((params + noise - target) ** 2)

  fitted = training.fit(
    jax.random.key(0), jnp.zeros(2), loss_fn, steps=200, learning_rate=0.1
  )
  np.testing.assert_allclose(fitted, target, atol=0.1)
