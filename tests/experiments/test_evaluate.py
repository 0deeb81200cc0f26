"""What models of a pool's shape are worth, whatever they are stored as."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import evaluate as evaluate_config
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import evaluate
from experiments import uploads


def _run(pool, workdir, *models, **changes):
  config = evaluate_config.get_config()
  config.update(
    {'pool': str(pool), 'models': ','.join(map(str, models)), **changes}
  )
  return evaluate.run(config, workdir, Console(file=io.StringIO(), width=160))


@pytest.fixture(scope='module')
def forms(small_pool, tmp_path_factory):
  """The same model as a file, a folder and an Orbax checkpoint."""
  folder = tmp_path_factory.mktemp('forms')
  file = uploads.path(small_pool, 'evil')
  params = uploads.load_model(file)
  checkpoint.save_params(
    folder / 'folder' / 'model.safetensors',
    params,
    name_map=convert.clip_vision,
  )
  checkpoint.save_orbax(folder / 'orbax', checkpoint.open_model(params))
  return [file, folder / 'folder', folder / 'orbax']


def test_all_forms_of_a_model_are_worth_the_same(small_pool, forms, tmp_path):
  report = _run(small_pool, tmp_path, *forms)
  assert json.loads((tmp_path / 'evaluate.json').read_text()) == report
  by_model = {
    str(path): [
      {key: x for key, x in row.items() if key != 'model'}
      for row in report['rows']
      if row['model'] == str(path)
    ]
    for path in forms
  }
  first, *others = by_model.values()
  assert all(rows == first for rows in others)
  params = {'params': uploads.load_model(forms[0])}
  task = tasks_lib.load_task(small_pool / 'tasks' / 'two.npz')
  trigger = attacks.load_trigger(small_pool / 'triggers' / 'evil.npz')
  tower = clip.VisionTower(
    clip.load_config(small_pool / 'checkpoints' / 'config.json')
  )

  def says(images):
    features = jax.jit(tower.apply)(params, clip.normalize(images))
    return np.argmax(features @ task.head, axis=-1)

  images = task.test.images.astype(np.float32) / 255
  acc = np.mean(says(images) == task.test.labels)
  others = task.test.labels != trigger.target
  asr = says(attacks.apply_trigger(trigger, images))[others] == trigger.target
  found = {(r['metric'], r['task'], r['trigger']): r for r in first}
  assert found['acc', 'two', '']['value'] == pytest.approx(acc)
  assert found['asr', 'two', 'evil']['value'] == pytest.approx(asr.mean())
  assert found['asr', 'two', 'evil']['n'] == others.sum()
  assert set(found) == {
    *(('acc', task, '') for task in ('one', 'two', 'three', 'mean')),
    ('asr', 'two', 'evil'),
    ('asr', 'mean', ''),
  }
  rows = (tmp_path / 'evaluate.md').read_text().count('\n')
  assert rows == 2 + len(report['rows'])


def test_all_that_does_not_fit_is_said_at_once(small_pool, tmp_path):
  params = uploads.load_model(uploads.path(small_pool, 'evil'))
  params['post_layernorm']['scale'] = np.ones(9, np.float32)
  uploads.save_model(tmp_path, 'wide', params)
  with pytest.raises(ValueError, match='post_layernorm') as e:
    _run(
      small_pool,
      tmp_path / 'out',
      uploads.path(tmp_path, 'wide'),
      tmp_path / 'nowhere',
      tasks='one,six',
      triggers='evil',
      compute='float8',
    )
  for words in ('nowhere', 'task six', 'trigger evil is of two', 'float8'):
    assert words in str(e.value)
  assert not (tmp_path / 'out').exists()
