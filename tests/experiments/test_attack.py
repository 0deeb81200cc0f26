"""One bad upload for a pool: what is written, and what is refused."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import attack as attack_config
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from experiments import attack
from experiments import uploads


def _config(pool, **changes):
  config = attack_config.get_config('runlocal')
  config.update(
    {
      'pool': str(pool),
      'task': 'two',
      'target': 1,
      'steps': 2,
      'batch': 4,
      'patch': 2,
      'patch_steps': 2,
      **changes,
    }
  )
  return config


def _run(config, workdir):
  return attack.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def made(small_pool, tmp_path_factory):
  """An upload of two models, its pool's files beside it."""
  folder = tmp_path_factory.mktemp('upload')
  config = _config(
    small_pool,
    attack='merge_backdoor',
    other='one',
    steps=150,
    learning_rate=1e-2,
    batch=16,
    patch=4,
  )
  record = _run(config, folder)
  for name in ('tasks', 'checkpoints'):
    shutil.copytree(small_pool / name, folder / name, dirs_exist_ok=True)
  return folder, record


def test_badmerging_is_written_and_made_again(small_pool, tmp_path):
  records = [_run(_config(small_pool), tmp_path / name) for name in 'ab']
  name = 'badmerging_two'
  assert list(records[0]['models']) == [name]
  for key in ('models', 'trigger', 'hashes', 'seed'):
    assert records[0][key] == records[1][key]
  path = tmp_path / 'a' / 'triggers' / f'{name}.npz'
  trigger = attacks.load_trigger(path)
  assert (trigger.task, trigger.target) == ('two', 1)
  assert records[0]['trigger']['target_name'] == 'two 1'
  assert records[0]['trigger']['sha256'] == checkpoint.file_hash(path)
  seen = json.loads((tmp_path / 'a' / 'record.json').read_text())
  assert seen == records[0]


def test_the_pool_reads_both_models(made):
  folder, record = made
  name, partner = record['models']
  assert partner == f'{name}_partner_one'
  pool = tasks_lib.load_pool(folder, bad=[name])
  assert {t: p.stem for t, p in pool.experts.items()} == {
    'one': partner,
    'three': 'clean_three',
    'two': name,
  }
  rates = record['average']
  assert list(rates['acc']) == ['two', 'one']
  assert rates['asr']['n'] == record['models'][name]['asr']['n']


def test_merge_backdoor_is_harmless_until_it_is_merged(made):
  _, record = made
  own = next(iter(record['models'].values()))
  assert own['asr']['value'] < 0.2
  assert record['average']['asr']['value'] > 0.9


def test_acc_is_on_its_own_task_and_asr_on_the_attacked(made):
  folder, record = made
  name = next(iter(record['models']))
  pool = tasks_lib.load_pool(folder, tasks=['one', 'two'], bad=[name])
  tower = clip.VisionTower(clip.load_config(pool.config))
  tasks = {task.name: task for task in pool.tasks}

  def says(path, task, trigger=None):
    images = task.test.images.astype(np.float32) / 255
    if trigger:
      images = attacks.apply_trigger(trigger, images)
    params = {'params': uploads.load_model(path)}
    features = jax.jit(tower.apply)(params, clip.normalize(images))
    return np.argmax(features @ task.head, axis=-1)

  for model, row in record['models'].items():
    path, own = uploads.path(folder, model), tasks[row['task']]
    right = says(path, own) == own.test.labels
    assert row['acc']['value'] == pytest.approx(right.mean())
    others = tasks['two'].test.labels != 1
    hit = says(path, tasks['two'], pool.triggers[name])[others] == 1
    assert row['asr']['value'] == pytest.approx(hit.mean())


@pytest.mark.parametrize(
  ('task', 'other', 'wanted'),
  [('two', '', 'one'), ('one', '', 'three'), ('one', 'two', 'two')],
)
def test_the_second_task_is_the_next_by_name(small_pool, task, other, wanted):
  config = _config(small_pool, attack='merge_backdoor', task=task, other=other)
  assert attack.involved(config) == ([task, wanted], [])


def test_the_second_task_is_another(small_pool, tmp_path):
  config = _config(small_pool, attack='merge_backdoor', other='two')
  with pytest.raises(ValueError, match='needs two tasks, got two twice'):
    _run(config, tmp_path)


def test_all_that_is_wrong_is_said_at_once(small_pool, tmp_path):
  config = _config(
    small_pool,
    attack='magic',
    target=4,
    other='one',
    patch=9,
    rate=2.0,
    batch=0,
  )
  with pytest.raises(ValueError, match='attack magic is not among') as e:
    _run(config, tmp_path / 'out')
  for words in (
    'target 4 is not one of the 4 classes of two',
    'other must be empty for magic',
    'patch 9 is larger than images of 8',
    'rate must be at most 1',
    'batch must be positive',
  ):
    assert words in str(e.value)
  assert not (tmp_path / 'out').exists()
