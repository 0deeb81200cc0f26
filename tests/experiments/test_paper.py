"""From data sets and a CLIP to the paper's table, in small."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import paper_vit_b32
from configs import paper_vit_l14
from configs import prepare as prepare_config
from dam_jax.data import builders
from dam_jax.data import builtin
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import hub
from dam_jax.models import text
from dam_jax.models import zero_shot
from experiments import finetune
from experiments import methods
from experiments import paper
from experiments import prepare
from experiments import tiny_clip
from experiments import uploads

NAMES = ['digits', 'pets']


@pytest.fixture
def console():
  return Console(file=io.StringIO(), width=160)


def _noise(num, shape):
  images = np.random.default_rng(num).integers(0, 256, (num, *shape), np.uint8)
  return tasks_lib.Split(images, np.arange(num, dtype=np.int32) % 2)


def _built_in(name, *, seed):
  """Two classes of noise in place of the images that packages bring."""
  del seed
  shape, names = (28, 28, 3), ('digit 0', 'digit 1')
  task = tasks_lib.Task(
    name=name,
    head=builtin.head(names, 4),
    label_names=names,
    dev=_noise(11, shape),
    test=_noise(24, shape),
  )
  return builtin.Source(task, _noise(9, shape), _noise(40, shape))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A tiny CLIP, a set that is made with it, and one of other sizes."""
  folder = tmp_path_factory.mktemp('source')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(builtin, 'load', _built_in)
    tiny_clip.make(
      folder,
      ['digits'],
      console=Console(file=io.StringIO()),
      width=8,
      layers=1,
      patch_size=14,
      steps=2,
      batch=2,
    )
  arrays = {'label_names': np.array(['cat', 'dog'])}
  for split, num in (('train', 40), ('test', 12)):
    for field, x in _noise(num, (30, 20, 3))._asdict().items():
      arrays[f'{split}_{field}'] = x
  np.savez(folder / 'pets.npz', **arrays)
  builders.prepare_npz(folder / 'pets.npz', folder / 'data')
  return folder


def _prepare(c, source):
  c.sets = 'arrays/digits,arrays/pets'
  c.clip = str(source / 'clip')
  c.data_dir = str(source / 'data')
  c.train, c.dev, c.test = 24, 8, 20
  return c


def _config(source):
  c = paper_vit_b32.get_config('runlocal')
  _prepare(c.prepare, source)
  for part in (c.finetune, c.attack):
    part.steps, part.batch, part.warmup = 2, 4, 1
  c.attack.attack = 'badnets'
  c.attacked, c.targets, c.bad = 'pets', '1', '1'
  c.merge.methods = 'average,task_arithmetic'
  c.merge.test_batch, c.merge.transfer_test = 20, 0
  return c


@pytest.fixture(scope='module')
def done(source, tmp_path_factory):
  """A finished experiment: its workdir and table."""
  workdir = tmp_path_factory.mktemp('paper')
  quiet = Console(file=io.StringIO(), width=160)
  return workdir, paper.run(_config(source), workdir, quiet)


def test_the_table_sums_up_the_merges(done):
  workdir, table = done
  assert json.loads((workdir / 'table.json').read_text()) == table
  report = json.loads((workdir / 'merge_1' / 'report.json').read_text())
  for name in ('average', 'task_arithmetic', 'clean_merge', 'single'):
    rows = {
      row['metric']: row['value']
      for row in report['rows']
      if row['method'] == name and row['task'] == 'mean'
    }
    assert table['1'][name]['acc']['value'] == rows['acc']
    assert table['1'][name]['asr']['value'] == rows['asr']
  assert report['record']['experts'] == {
    'digits': 'clean_digits',
    'pets': 'badnets_pets',
  }
  text_of_table = (workdir / 'table.md').read_text()
  acc = 100 * table['1']['average']['acc']['value']
  assert f'| average | {acc:.1f} (' in text_of_table


def test_the_pool_is_of_the_clip_and_the_sets(done, source):
  workdir, _ = done
  model = hub.load(source / 'clip')
  jax.tree.map(
    np.testing.assert_array_equal,
    uploads.load_model(uploads.path(workdir / 'pool', 'base')),
    model.params['vision'],
  )
  pool = tasks_lib.load_pool(workdir / 'pool', bad=['badnets_pets'])
  assert [task.name for task in pool.tasks] == NAMES
  pets = pool.tasks[1]
  want = zero_shot.zero_shot_head(
    text.TextTower(model.config.text),
    model.params['text'],
    tokenizer=model.tokenizer(),
    names=['cat', 'dog'],
    templates=['a photo of a {}.'],
  )
  np.testing.assert_allclose(pets.head, want, atol=1e-6)
  train = tasks_lib.load_train(workdir / 'pool' / 'tasks' / 'pets.npz')
  shapes = [x.images.shape for x in (train, pets.dev, pets.test)]
  assert shapes == [(n, 28, 28, 3) for n in (24, 8, 12)]
  assert not {x.tobytes() for x in train.images} & {
    x.tobytes() for x in pets.dev.images
  }


def test_it_goes_on_where_it_was(done, source, console, monkeypatch):
  workdir, table = done
  files = [
    path
    for folder in ('checkpoints', 'tasks', 'triggers', 'heads')
    for path in (workdir / 'pool' / folder).iterdir()
    if path.name != 'config.json'
  ]
  before = [path.stat().st_mtime_ns for path in files]
  config = _config(source)
  config.bad = '1,0'
  monkeypatch.setattr(finetune, 'run', None)  # not to be called
  more = paper.run(config, workdir, console)
  assert more['1'] == table['1']
  assert 'asr' not in more['0']['average']
  assert [path.stat().st_mtime_ns for path in files] == before
  config.attack.steps = 3
  config.targets = '0'
  with pytest.raises(ValueError, match='attack differs') as e:
    paper.run(config, workdir, console)
  assert 'target of pets' in str(e.value)
  config = _config(source)
  config.prepare.dev = 9
  with pytest.raises(ValueError, match=r'prepare\.json differs'):
    paper.run(config, workdir, console)


@pytest.mark.parametrize('lost', ['record.json', 'the model alone'])
def test_an_interrupted_expert_is_made_again(done, source, console, lost):
  workdir, table = done
  path = uploads.path(workdir / 'pool', 'clean_pets')
  held = path.read_bytes()
  path.unlink()
  (workdir / 'experts' / 'clean_pets' / lost).unlink(missing_ok=True)
  assert paper.run(_config(source), workdir, console) == table
  assert path.read_bytes() == held


@pytest.mark.parametrize('module', [paper_vit_b32, paper_vit_l14])
@pytest.mark.parametrize('arg', ['', 'runlocal'])
def test_the_configs_make_sense(module, arg):
  config = module.get_config(arg)
  paper.check_config(config)
  named = methods.parse(config.merge.methods, num_experts=6)
  methods.resolve(
    named, config.merge.options, steps=config.merge.steps, batch=16, images=64
  )


def test_all_that_is_wrong_is_said_before_any_work(source, tmp_path, console):
  config = _config(source)
  config.attacked, config.targets = 'pets,birds', '1'
  config.bad = '3,x'
  config.finetune.compute = 'float8'
  config.attack.warmup = -1
  with pytest.raises(ValueError, match='task birds is not') as e:
    paper.run(config, tmp_path / 'out', console)
  for words in ('2 tasks are', "'x' is no", 'bad 3', 'float8', 'warmup must'):
    assert words in str(e.value)
  assert not (tmp_path / 'out').exists()


def test_sets_that_are_missing_are_listed(source, tmp_path, console):
  config = _prepare(prepare_config.get_config(), source)
  config.sets = 'arrays/birds,gtsrb,arrays/pets,arrays/bees'
  with pytest.raises(ValueError, match='arrays/birds wants') as e:
    prepare.run(config, tmp_path, console)
  assert 'arrays/bees wants' in str(e.value)
  assert 'German Traffic Sign' in str(e.value)
  config.clip, config.sets = '', 'arrays/digits,mnist,arrays/digits,nothing'
  config.dev = 0
  with pytest.raises(ValueError, match='mnist is not built in') as e:
    prepare.run(config, tmp_path, console)
  for words in ('digits comes twice', "no data set 'nothing'", 'dev must be'):
    assert words in str(e.value)
