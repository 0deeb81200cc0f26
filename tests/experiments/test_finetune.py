"""One clean expert for a pool: what is written, and what is refused."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import finetune as finetune_config
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import bench
from experiments import finetune
from experiments import preemption
from experiments import uploads


def _config(pool, **changes):
  config = finetune_config.get_config('runlocal')
  config.update(
    {'pool': str(pool), 'task': 'two', 'steps': 2, 'batch': 4, **changes}
  )
  return config


def _run(config, workdir):
  return finetune.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def half_pool(small_pool, tmp_path_factory):
  """The pool, with a base of float16."""
  folder = tmp_path_factory.mktemp('half')
  for name in ('tasks', 'checkpoints'):
    (folder / name).mkdir()
  (folder / 'tasks' / 'two.npz').symlink_to(small_pool / 'tasks' / 'two.npz')
  config = (small_pool / 'checkpoints' / 'config.json').read_text()
  (folder / 'checkpoints' / 'config.json').write_text(config)
  checkpoint.save_params(
    uploads.path(folder, 'base'),
    uploads.load_model(uploads.path(small_pool, 'base')),
    name_map=convert.clip_vision,
    dtype=np.float16,
  )
  return folder


@pytest.fixture(scope='module')
def made(half_pool, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('expert')
  return workdir, _run(_config(half_pool), workdir)


def test_the_expert_fits_the_base(made, half_pool):
  workdir, _ = made
  path = uploads.path(workdir, 'clean_two')
  base, experts = checkpoint.load_experts(
    uploads.path(half_pool, 'base'), {'two': path}, name_map=convert.clip_vision
  )
  moved = jax.tree.map(lambda b, e: bool((b != e[0]).any()), base, experts)
  assert any(jax.tree.leaves(moved))
  held = checkpoint.load_abstract(path, name_map=convert.clip_vision)
  dtypes = {x.dtype for x in jax.tree.leaves(held)}
  assert dtypes == {np.dtype(np.float16)}


def test_the_record_is_of_what_was_written(made, half_pool):
  workdir, record = made
  assert json.loads((workdir / 'record.json').read_text()) == record
  path = uploads.path(workdir, 'clean_two')
  task = tasks_lib.load_task(half_pool / 'tasks' / 'two.npz')
  tower = clip.VisionTower(
    clip.load_config(half_pool / 'checkpoints' / 'config.json')
  )
  pixels = clip.normalize(task.test.images.astype(np.float32) / 255)
  params = {'params': uploads.load_model(path)}
  features = jax.jit(tower.apply)(params, pixels)
  right = np.argmax(features @ task.head, axis=-1) == task.test.labels
  found = record['models']['clean_two']
  assert found['acc']['n'] == 12
  assert found['acc']['value'] == pytest.approx(right.mean())
  assert found['sha256'] == checkpoint.file_hash(path)
  assert record['hashes'] == {
    name: checkpoint.file_hash(half_pool / name)
    for name in (
      'checkpoints/config.json',
      'checkpoints/base.safetensors',
      'tasks/two.npz',
    )
  }
  assert record['config']['steps'] == 2
  assert record['versions']['jax'] == jax.__version__


def test_the_seed_says_it_all(made, half_pool, tmp_path):
  _, record = made
  again = _run(_config(half_pool, name='copy'), tmp_path / 'again')
  other = _run(_config(half_pool, seed=1), tmp_path / 'other')
  sha256 = record['models']['clean_two']['sha256']
  assert again['models']['copy']['sha256'] == sha256
  assert other['models']['clean_two']['sha256'] != sha256


def _distance(one, many, start):
  """Returns by leaf how far two models differ, by how far one has moved."""
  one, many, start = map(dj.tree.flatten, (one, many, start))
  return {
    path: np.abs(one[path] - many[path]).max()
    / np.abs(one[path] - start[path]).max()
    for path in one
    # Adam makes steps of the noise that is all that this one's gradient is.
    if not path.endswith('k_proj/bias')
  }


def test_devices_make_no_difference_but_for_rounding(small_pool, tmp_path):
  models = {}
  for mesh in ('', 'data=-1'):
    config = _config(small_pool, mesh=mesh, batch=8)
    _run(config, tmp_path / mesh)
    path = uploads.path(tmp_path / mesh, 'clean_two')
    models[mesh] = uploads.load_model(path)
  base = uploads.load_model(uploads.path(small_pool, 'base'))
  assert max(_distance(*models.values(), base).values()) < 0.05


def test_a_low_rank_update_is_of_that_rank(small_pool, tmp_path):
  config = _config(small_pool, rank=1, compute='bfloat16', warmup=1)
  with jax.numpy_dtype_promotion('standard'):  # Flax needs it for bfloat16
    _run(config, tmp_path)
  tuned = uploads.load_model(uploads.path(tmp_path, 'clean_two'))
  base = uploads.load_model(uploads.path(small_pool, 'base'))
  update = jax.tree.map(np.subtract, tuned, base)
  kernel = update['layers_0']['mlp']['fc1']['kernel']
  values = np.linalg.svd(kernel, compute_uv=False)
  assert values[0] > 100 * values[1]
  assert not update['layers_0']['mlp']['fc1']['bias'].any()


def test_all_that_is_wrong_is_said_at_once(small_pool, made, tmp_path):
  workdir, _ = made
  config = _config(
    small_pool,
    **{'task': 'six', 'steps': 0, 'test': -1, 'name': 'a/b', 'mesh': 'model=8'},
    **{'crop': 1.5, 'accumulate': 3, 'mirrored': 'one,ten'},
  )
  with pytest.raises(ValueError, match='task six is not among one, three') as e:
    _run(config, workdir)
  for words in (
    'steps must be',
    'test must not',
    'folders',
    'record.json is',
    'axis model',
    'crop must be at most 1',
    '4 images do not divide into 3 parts',
    'mirrored task ten is not among one, three, two',
  ):
    assert words in str(e.value)
  with pytest.raises(ValueError, match='base.safetensors is missing') as e:
    _run(_config(tmp_path / 'nowhere'), tmp_path / 'out')
  assert 'config.json is missing' in str(e.value)
  config = _config(small_pool)
  with config.unlocked():
    del config.batch
    config.bach = 3
  with pytest.raises(ValueError, match='batch is missing\n  bach is unknown'):
    _run(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_pool_must_have_training_images(small_pool, tmp_path):
  task = tasks_lib.load_task(small_pool / 'tasks' / 'two.npz')
  tasks_lib.save_task(tmp_path / 'tasks', task)
  with pytest.raises(ValueError, match='two.npz: no training images'):
    _run(_config(tmp_path), tmp_path / 'out')


def test_training_that_diverges_leaves_a_curve_alone(half_pool, tmp_path):
  config = _config(half_pool, learning_rate=1e8)
  with pytest.raises(FloatingPointError, match='lower learning_rate'):
    _run(config, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['curves']
  _run(_config(half_pool), tmp_path)
  assert (tmp_path / 'record.json').exists()


class _Killed(BaseException):
  pass


def _kill_at(monkeypatch, step):
  """Has runs stop before a step, and returns the steps that they come to."""
  seen = []

  @contextlib.contextmanager
  def progress(console, name):
    del console, name

    def advance(part, done, steps):
      seen.append(done)
      if done == step:
        raise _Killed(part, steps)

    yield advance

  monkeypatch.setattr(bench, 'progress', progress)
  return seen


@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(
  small_pool, tmp_path, monkeypatch, rank
):
  config = _config(small_pool, steps=22, max_lost=8, rank=rank, warmup=3)
  whole = _run(config, tmp_path / 'whole')['models']['clean_two']['sha256']
  seen = _kill_at(monkeypatch, 14)
  with pytest.raises(_Killed):
    _run(config, tmp_path / 'part')
  assert (tmp_path / 'part' / 'states').is_dir()
  seen = _kill_at(monkeypatch, None)
  part = _run(config, tmp_path / 'part')['models']['clean_two']['sha256']
  assert seen == [12, 14, 16, 18, 20]
  assert part == whole
  curves = [
    next((tmp_path / name / 'curves').glob('*.csv')).read_text()
    for name in ('whole', 'part')
  ]
  assert curves[0] == curves[1]
  assert len(curves[0].splitlines()) == 23
  assert not (tmp_path / 'part' / 'states').exists()


def test_saves_of_another_run_are_refused(small_pool, tmp_path, monkeypatch):
  config = _config(small_pool, steps=6, max_lost=2)
  _kill_at(monkeypatch, 0)
  with pytest.raises(_Killed):
    _run(config, tmp_path)
  assert not (tmp_path / 'states').exists()
  with monkeypatch.context() as patch:
    patch.setattr(preemption.Watch, 'asked', lambda self: True)
    _kill_at(monkeypatch, None)
    with pytest.raises(preemption.Preempted, match='0-clean: asked to stop'):
      _run(_config(small_pool, steps=12), tmp_path)
  with pytest.raises(ValueError, match='saves of a run with another config'):
    _run(config, tmp_path)
  _run(_config(small_pool, steps=12, max_lost=1), tmp_path)
  assert (tmp_path / 'record.json').exists()


def test_parts_of_a_batch_make_the_same_step(small_pool, tmp_path):
  models = []
  for parts, mesh in ((1, ''), (2, 'data=-1')):
    config = _config(small_pool, batch=16, accumulate=parts, mesh=mesh)
    workdir = tmp_path / f'{parts}{mesh}'
    _run(config, workdir)
    models.append(uploads.load_model(uploads.path(workdir, 'clean_two')))
  base = uploads.load_model(uploads.path(small_pool, 'base'))
  assert max(_distance(*models, base).values()) < 0.05


def test_only_named_tasks_are_mirrored_and_crops_are_off(make_lab):
  one, other, augmented = (
    np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    for params in (
      make_lab(**more).tune(jax.random.key(0), 1)
      for more in (
        {},
        {'mirrored': ['one']},
        {'mirrored': ['two'], 'crop': 0.5},
      )
    )
  )
  # Two programs: a CPU may round what XLA fuses otherwise differently.
  np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
  assert np.abs(one - augmented).max() > 1e-4
