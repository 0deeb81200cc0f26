"""Pools on disk: what is read, and what is refused and how."""

import dataclasses
import io
import json

import jax
import numpy as np
from PIL import Image
import pytest

from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from dam_jax.data.tasks import Split

SHAPE = (4, 4, 3)


def _task(name, classes=3, num=5, seed=0):
  rng = np.random.default_rng(seed)

  def split():
    return Split(
      rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8),
      rng.integers(0, classes, num).astype(np.int32),
    )

  return tasks_lib.Task(
    name=name,
    head=rng.standard_normal((6, classes)).astype(np.float32),
    label_names=[f'{name} {i}' for i in range(classes)],
    dev=split(),
    test=split(),
  )


@pytest.fixture
def pool(tmp_path):
  """A folder with tasks a, b, c, of which b has a backdoored expert."""
  for i, name in enumerate('abc'):
    tasks_lib.save_task(tmp_path / 'tasks', _task(name, classes=3 + i, seed=i))
  for name in ('base', 'clean_a', 'clean_b', 'clean_c', 'evil'):
    path = tmp_path / 'checkpoints' / f'{name}.safetensors'
    checkpoint.save_params(path, {'w': np.zeros(2, np.float32)})
  (tmp_path / 'checkpoints' / 'config.json').write_text(json.dumps({}))
  trigger = attacks.patch_trigger(SHAPE, size=2, task='b', target=3)
  attacks.save_trigger(tmp_path / 'triggers' / 'evil.npz', trigger)
  return tmp_path


def test_a_task_survives_a_file(tmp_path):
  task = _task('birds')
  tasks_lib.save_task(tmp_path, task)
  again = tasks_lib.load_task(tmp_path / 'birds.npz')
  jax.tree.map(
    np.testing.assert_array_equal,
    dataclasses.asdict(again) | {'label_names': None},
    dataclasses.asdict(task) | {'label_names': None},
  )
  assert list(again.label_names) == list(task.label_names)


def test_a_part_of_the_images_can_be_kept(tmp_path):
  tasks_lib.save_task(tmp_path, _task('birds', num=5))
  task = tasks_lib.load_task(tmp_path / 'birds.npz', dev=2, test=3)
  assert (len(task.dev.images), len(task.test.labels)) == (2, 3)
  with pytest.raises(ValueError, match=r'asked for 6 dev images, there are 5'):
    tasks_lib.load_task(tmp_path / 'birds.npz', dev=6)


def test_a_pool_puts_the_bad_expert_in_its_tasks_place(pool):
  found = tasks_lib.load_pool(pool, tasks=['c', 'b'], bad=['evil'])
  assert [task.name for task in found.tasks] == ['c', 'b']
  assert {t: p.stem for t, p in found.experts.items()} == {
    'c': 'clean_c',
    'b': 'evil',
  }
  assert {t: p.stem for t, p in found.clean.items()} == {
    'c': 'clean_c',
    'b': 'clean_b',
  }
  assert found.triggers['evil'].target == 3


def test_an_upload_takes_the_places_that_it_says(pool):
  path = pool / 'triggers' / 'evil.npz'
  trigger = dataclasses.replace(attacks.load_trigger(path), home='a')
  attacks.save_trigger(path, trigger)
  found = tasks_lib.load_pool(pool, bad=['evil'])
  assert found.bad == ['a']
  assert found.experts['b'].stem == 'clean_b'
  assert found.triggers['evil'].task == 'b'
  partner = pool / 'checkpoints' / 'evil_partner_c.safetensors'
  checkpoint.save_params(partner, {'w': np.zeros(2, np.float32)})
  found = tasks_lib.load_pool(pool, bad=['evil'])
  assert found.bad == ['a', 'c']
  assert found.experts['c'] == partner
  assert tasks_lib.load_pool(pool).bad == []
  with pytest.raises(ValueError, match='bad expert a is not among b, c'):
    tasks_lib.load_pool(pool, tasks=['b', 'c'], bad=['evil'])


def test_all_tasks_are_read_where_none_is_named(pool):
  assert [t.name for t in tasks_lib.load_pool(pool).tasks] == ['a', 'b', 'c']


def test_an_attacked_task_needs_no_clean_expert(pool):
  (pool / 'checkpoints' / 'clean_b.safetensors').unlink()
  found = tasks_lib.load_pool(pool, bad=['evil'])
  assert set(found.clean) == {'a', 'c'}


def test_a_probe_is_tested_and_not_merged(pool):
  found = tasks_lib.load_pool(pool, probes=['evil'])
  assert found.experts['b'].stem == 'clean_b'
  assert not found.triggers
  assert found.probes['evil'].task == 'b'


def test_missing_checkpoints_are_listed_together(pool):
  for name in ('base', 'clean_c'):
    (pool / 'checkpoints' / f'{name}.safetensors').unlink()
  with pytest.raises(ValueError, match='lacks') as e:
    tasks_lib.load_pool(pool)
  assert 'base.safetensors' in str(e.value)
  assert 'clean_c.safetensors' in str(e.value)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'tasks': ['a', 'x']}, 'task x is not among a, b, c'),
    ({'tasks': ['a', 'a']}, 'task a comes twice'),
    ({'bad': ['evil', 'evil']}, 'trigger evil comes twice'),
    ({'bad': ['nobody']}, r'nobody\.npz'),
    ({'tasks': ['a'], 'bad': ['evil']}, 'attacked task b is not among a'),
    ({'bad': ['evil'], 'probes': ['other']}, 'attacked task b comes twice'),
  ],
)
def test_names_that_make_no_sense_are_refused(pool, options, match):
  trigger = attacks.patch_trigger(SHAPE, size=2, task='b', target=0)
  attacks.save_trigger(pool / 'triggers' / 'other.npz', trigger)
  with pytest.raises(ValueError, match=match):
    tasks_lib.load_pool(pool, **options)


def test_no_folder_and_no_task(pool, tmp_path):
  with pytest.raises(ValueError, match='no such folder'):
    tasks_lib.load_pool(tmp_path / 'nowhere')
  for path in (pool / 'tasks').iterdir():
    path.unlink()
  with pytest.raises(ValueError, match='there is no task'):
    tasks_lib.load_pool(pool)


def test_triggers_must_fit_images_and_classes(pool):
  trigger = attacks.patch_trigger((8, 8, 3), size=2, task='b', target=4)
  attacks.save_trigger(pool / 'triggers' / 'evil.npz', trigger)
  with pytest.raises(ValueError, match='target 4 of evil') as e:
    tasks_lib.load_pool(pool, bad=['evil'])
  assert 'pattern is [8, 8, 3], images want [4, 4, 3]' in str(e.value)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'dev': Split(np.zeros((0, *SHAPE), np.uint8), np.zeros(0, np.int32))},
     'dev images are'),
    ({'test': Split(np.zeros((2, *SHAPE), np.uint8), np.zeros(3, np.int32))},
     'test labels are'),
    ({'test': Split(np.zeros((1, *SHAPE), np.uint8), np.full(1, 9, np.int32))},
     'test labels run from 9 to 9, there are 3 classes'),
    ({'dev': Split(np.zeros((1, *SHAPE), np.float32), np.zeros(1, np.int32))},
     'dev images are float32'),
    ({'label_names': ['one']}, '1 label names for 3 classes'),
    ({'head': np.full((6, 3), np.nan, np.float32)}, 'head has values'),
  ],
)  # fmt: skip
def test_a_task_that_does_not_fit_itself_is_refused(tmp_path, change, match):
  with pytest.raises(ValueError, match=match):
    tasks_lib.save_task(tmp_path, dataclasses.replace(_task('a'), **change))
  assert not list(tmp_path.iterdir())


def test_unreadable_tasks_name_the_file(tmp_path):
  path = tmp_path / 'a.npz'
  path.write_bytes(b'no')
  with pytest.raises(ValueError, match=r'a\.npz'):
    tasks_lib.load_task(path)
  np.savez(path, head=np.zeros((2, 2)))
  with pytest.raises(ValueError, match='lacks dev_images, dev_labels'):
    tasks_lib.load_task(path)


def _mosaic(images):
  """Packs images `[N, 16, 16, 3]` as `load_train` reads them."""
  parts = []
  for begin in range(0, len(images), 128):
    tiles = np.zeros((2 * 64, 16, 16, 3), np.uint8)
    tiles[: len(images[begin : begin + 128])] = images[begin : begin + 128]
    rows = tiles.reshape(2, 64, 16, 16, 3).swapaxes(1, 2)
    file = io.BytesIO()
    Image.fromarray(rows.reshape(32, -1, 3)).save(file, 'JPEG', quality=95)
    parts.append(file.getvalue())
  head = np.array([len(images), len(parts), *map(len, parts)], np.int64)
  return np.frombuffer(head.tobytes() + b''.join(parts), np.uint8)


def test_training_images_come_as_arrays_or_mosaics(tmp_path):
  levels = np.linspace(0, 255, 150).astype(np.uint8)
  images = np.broadcast_to(levels[:, None, None, None], (150, 16, 16, 3))
  labels = np.arange(150) % 7
  np.savez(tmp_path / 'a.npz', train_images=images, train_labels=labels)
  np.savez(tmp_path / 'b.npz', train_jpeg=_mosaic(images), train_labels=labels)
  for name, off in (('a', 0), ('b', 2)):
    split = tasks_lib.load_train(tmp_path / f'{name}.npz', 16)
    assert split.images.dtype == np.uint8
    np.testing.assert_allclose(split.images, images, atol=off)
    np.testing.assert_array_equal(split.labels, labels)
  np.savez(tmp_path / 'c.npz', train_jpeg=_mosaic(images), train_labels=[1])
  with pytest.raises(ValueError, match=r'c\.npz: 150 images, 1 labels'):
    tasks_lib.load_train(tmp_path / 'c.npz', 16)
  np.savez(tmp_path / 'd.npz', train_labels=labels)
  with pytest.raises(ValueError, match=r'd\.npz: no training images'):
    tasks_lib.load_train(tmp_path / 'd.npz')


def test_the_pools_training_images_load(shared):
  split = tasks_lib.load_train(shared / 'pool' / 'tasks' / 'gtsrb.npz')
  assert split.images.shape == (4000, 32, 32, 3)
  assert split.labels.max() < 43
