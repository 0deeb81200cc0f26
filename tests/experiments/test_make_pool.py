"""Pools of many attacks: made, gone on with, and read by the main job."""

import io
import json

import jax
import optax
import pytest
from rich.console import Console

from configs import nano_pool as nano_pool_config
from configs import pretrain as pretrain_config
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import convert
from experiments import make_pool
from experiments import pretrain
from experiments import training
from experiments import uploads


def _config(pool, **changes):
  config = nano_pool_config.get_config('runlocal')
  config.update(
    {
      'tasks_folder': str(pool / 'tasks'),
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
      'attacks': 'badnets,badmerging,badmerging_off_task,merge_backdoor',
      **changes,
    }
  )
  return config


def _run(config, workdir):
  return make_pool.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def made(small_pool, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pool')
  return workdir, _run(_config(small_pool), workdir)


def test_what_is_made_is_a_pool(made):
  workdir, report = made
  bad = list(report['uploads'])
  assert bad == [
    'badnets_two_0',
    'badmerging_two_0',
    'badmerging_off_task_two_0',
    'merge_backdoor_two_0',
  ]
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


@pytest.mark.parametrize(
  ('name', 'homes'),
  [
    ('badmerging_two_0', ['two']),
    ('badmerging_off_task_two_0', ['one']),
    ('merge_backdoor_two_0', ['two', 'one']),
  ],
)
def test_an_upload_is_merged_with_its_partner(made, small_pool, name, homes):
  workdir, report = made
  row, pool = report['uploads'][name], tasks_lib.load_pool(workdir, bad=[name])
  assert [row['home'], *row['partners']] == homes
  assert sorted(pool.bad) == sorted(homes)
  base, experts = checkpoint.load_experts(
    pool.base, pool.experts, name_map=convert.clip_vision
  )
  merged = dj.merge(dj.task_arithmetic(0.3), base, experts).params
  shop = make_pool.Pool(_config(small_pool), workdir).shop
  tester = uploads.Tester(shop, pool.tasks, 0)
  at = ('one', 'two').index
  assert row['acc_merged'] == tester.acc(merged, at(row['home'])).value
  trigger = pool.triggers[name]
  assert row['asr_merged'] == tester.asr(merged, 1, trigger).value
  for task, partner in row['partners'].items():
    model = uploads.load_model(pool.experts[task])
    assert partner['acc'] == tester.acc(model, at(task)).value
    assert partner['asr'] == tester.asr(model, 1, trigger).value


def test_a_model_that_is_there_is_not_made_again(made, small_pool):
  workdir, report = made
  base = workdir / 'checkpoints' / 'base.safetensors'
  before = base.stat().st_mtime_ns
  lost = workdir / 'checkpoints' / 'badnets_two_0.safetensors'
  held = lost.read_bytes()
  lost.unlink()
  assert _run(_config(small_pool), workdir) == report
  assert lost.read_bytes() == held
  assert base.stat().st_mtime_ns == before
  fewer = _run(_config(small_pool, attacks='badnets', scale=0.5), workdir)
  assert list(fewer['uploads']) == ['badnets_two_0']
  with pytest.raises(ValueError, match='differs from the config'):
    _run(_config(small_pool, seed=1), workdir)


def test_the_base_alone_is_that_of_the_pool(made, small_pool, tmp_path):
  whole = _config(small_pool)
  config = pretrain_config.get_config('runlocal')
  config.update({key: whole[key] for key in config})
  quiet = Console(file=io.StringIO(), width=120)
  report = pretrain.run(config, tmp_path, quiet)
  files = [uploads.path(folder, 'base') for folder in (tmp_path, made[0])]
  assert files[0].read_bytes() == files[1].read_bytes()
  assert {n: acc['value'] for n, acc in report.items()} == made[1]['base']
  assert tasks_lib.task_names(tmp_path) == ['one', 'two']
  config.pretrain_share = 1.5
  with pytest.raises(ValueError, match='pretrain_share must be less than 1'):
    pretrain.run(config, tmp_path, quiet)


def test_all_that_is_wrong_is_said_at_once(small_pool, tmp_path):
  config = _config(
    small_pool, attacked='three', attacks='magic', width=9, batch=0
  )
  with pytest.raises(ValueError, match='attacked task three') as e:
    _run(config, tmp_path / 'pool')
  for words in ('attack magic is not', 'batch must be', 'width 9 over 2'):
    assert words in str(e.value)
  config = _config(small_pool, tasks='two', attacks='all')
  with pytest.raises(ValueError, match='merge_backdoor needs two tasks'):
    _run(config, tmp_path / 'pool')
  assert not (tmp_path / 'pool').exists()


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
