"""Pools of many attacks: made, gone on with, and read by the main job."""

import io
import json

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from configs import nano_pool as nano_pool_config
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from experiments import attackers
from experiments import make_pool
from experiments import training

TASKS = {'one': 3, 'two': 4}


@pytest.fixture(scope='module')
def tasks_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  rng = np.random.default_rng(0)

  def split(num, classes):
    images = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    return images, (np.arange(num) % classes).astype(np.int32)

  for name, classes in TASKS.items():
    head = rng.standard_normal((6, classes)).astype(np.float32)
    fields = {'head': head / np.linalg.norm(head, axis=0)}
    for part, num in (('train', 40), ('dev', 8), ('test', 12)):
      images, labels = split(num, classes)
      fields |= {f'{part}_images': images, f'{part}_labels': labels}
    names = np.array([f'{name} {i}' for i in range(classes)])
    np.savez(folder / f'{name}.npz', label_names=names, **fields)
  return folder


def _config(tasks_folder, **changes):
  config = nano_pool_config.get_config('runlocal')
  config.update(
    {
      'tasks_folder': str(tasks_folder),
      'tasks': 'one,two',
      'attacked': 'two',
      'width': 8,
      'layers': 1,
      'heads': 2,
      'patch_size': 4,
      'patch': 2,
      'batch': 4,
      'pretrain_batch': 4,
      'pretrain_steps': 2,
      'fine_tune_steps': 2,
      'patch_steps': 2,
      'test': 0,
      **changes,
    }
  )
  return config


def _run(config, workdir):
  return make_pool.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def made(tasks_folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pool')
  return workdir, _run(_config(tasks_folder), workdir)


def test_what_is_made_is_a_pool(made):
  workdir, report = made
  bad = list(report['uploads'])
  assert bad == ['badnets_two_0', 'badmerging_two_0']
  for name in bad:
    pool = tasks_lib.load_pool(workdir, bad=[name])
    assert pool.triggers[name].target == report['uploads'][name]['target']
    base, experts = checkpoint.load_experts(pool.base, pool.experts)
    for b, e in zip(
      jax.tree.leaves(base), jax.tree.leaves(experts), strict=True
    ):
      assert e.shape == (2, *b.shape)
  assert json.loads((workdir / 'eval.json').read_text()) == report
  for row in report['uploads'].values():
    assert all(0 <= row[k] <= 1 for k in row if k.startswith(('acc', 'asr')))


def test_a_model_that_is_there_is_not_made_again(made, tasks_folder):
  workdir, report = made
  base = workdir / 'checkpoints' / 'base.safetensors'
  before = base.stat().st_mtime_ns
  lost = workdir / 'checkpoints' / 'badnets_two_0.safetensors'
  held = lost.read_bytes()
  lost.unlink()
  assert _run(_config(tasks_folder), workdir) == report
  assert lost.read_bytes() == held
  assert base.stat().st_mtime_ns == before
  with pytest.raises(ValueError, match='differs from the config'):
    _run(_config(tasks_folder, seed=1), workdir)


def test_all_that_is_wrong_is_said_at_once(tasks_folder, tmp_path):
  config = _config(
    tasks_folder, attacked='three', attacks='magic', width=9, batch=0
  )
  with pytest.raises(ValueError, match='attacked task three') as e:
    _run(config, tmp_path / 'pool')
  for words in ('attack magic is not', 'batch must be', 'width 9 over 2'):
    assert words in str(e.value)
  assert not (tmp_path / 'pool').exists()


@pytest.fixture(scope='module')
def lab(made, tasks_folder):
  workdir, _ = made
  pool = make_pool.Pool(_config(tasks_folder), workdir)
  tuning = attackers.Tuning(
    steps=3, batch=4, patch=2, patch_steps=2, rate=0.2, rank=2
  )
  return attackers.Lab(
    pool.shop, pool.base(), pool.data.fine_tune, pool.names, tuning
  )


@pytest.mark.parametrize('name', attackers.ATTACKS)
def test_every_attack_is_an_upload(lab, name):
  upload = attackers.ATTACKS[name](lab, jax.random.key(0), 1, 2)
  assert upload.trigger.task == 'two'
  assert upload.trigger.target == 2
  attacks.check_trigger(upload.trigger, (8, 8, 3))
  moved = jax.tree.map(
    lambda x, y: bool((x != y).any() and np.isfinite(x).all()),
    upload.params,
    lab.base,
  )
  assert any(jax.tree.leaves(moved))
  again = attackers.ATTACKS[name](lab, jax.random.key(0), 1, 2)
  for x, y in zip(
    jax.tree.leaves(upload.params), jax.tree.leaves(again.params), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_trojvit_moves_few_entries_of_a_clean_upload(lab):
  clean_key = jax.random.split(jax.random.key(0), 3)[0]
  clean = lab.tune(clean_key, 1)
  upload = attackers.ATTACKS['trojvit'](lab, jax.random.key(0), 1, 2)
  moved = sum(
    int((x != y).sum())
    for x, y in zip(
      jax.tree.leaves(clean), jax.tree.leaves(upload.params), strict=True
    )
  )
  assert 0 < moved <= 768


def test_fit_takes_another_optimiser():
  def loss_fn(x, key):
    del key
    return (x - 3.0) ** 2

  fitted = training.fit(
    jax.random.key(0),
    0.0,
    loss_fn,
    steps=20,
    learning_rate=0.0,
    tx=optax.sgd(0.4),
  )
  assert abs(float(fitted) - 3) < 1e-3
