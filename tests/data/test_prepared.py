"""Data sets that are prepared and opened again, without TensorFlow."""

import dataclasses
import io
import json
import sys
import time
from unittest import mock

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from dam_jax.data import builders
from dam_jax.data import holdout
from dam_jax.data import prepared
from dam_jax.data import sets
from dam_jax.data import tasks
from dam_jax.data.tasks import Split


@pytest.fixture(autouse=True)
def _no_bars():
  tfds.disable_progress_bar()


def _noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _pool_task(folder, name='shapes'):
  """Writes a task of a pool; returns its file, and its training images."""
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 3, 30).astype(np.int32)
  images = _noise(30, 8, 8, 3)
  task = tasks.Task(
    name=name,
    head=rng.normal(size=(4, 3)).astype(np.float32),
    label_names=('square', 'circle', 'star'),
    dev=Split(images[:6], labels[:6]),
    test=Split(images[6:14], labels[6:14]),
  )
  train = Split(images[14:], labels[14:])
  tasks.save_task(folder, task, train)
  return folder / f'{name}.npz', task, train


def _save(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def _tfds_set(data_dir, about, examples, names=None):
  """Prepares something under a name and version of TFDS's, as TFDS does."""
  name, _, config = about.builder.partition('/')

  class Mock(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(about.version)

    def _info(self):
      label = {'names': names} if names else {'num_classes': 10}
      features = tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=about.image_shape),
          'label': tfds.features.ClassLabel(**label),
          'mask': tfds.features.Image(shape=(None, None, 1)),
          'id': tfds.features.Text(),
        }
      )
      return tfds.core.DatasetInfo(
        builder=self, features=features, disable_shuffling=True
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(), 'test': self.rows()}

    def rows(self):
      for i, (image, label) in enumerate(examples):
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'PNG')
        row = {'image': io.BytesIO(file.getvalue()), 'label': label}
        yield i, {**row, 'mask': io.BytesIO(b'no image'), 'id': str(i)}

    _generate_examples = rows

  Mock.name = name
  builder = Mock(
    data_dir=data_dir,
    config=tfds.core.BuilderConfig(name=config) if config else None,
  )
  builder.download_and_prepare(file_format='array_record')


def _pixels(images):
  return np.stack([x['image'] for x in images])


def _labels(images):
  return [x['label'] for x in images]


def test_a_pool_s_task_comes_back_as_it_was(tmp_path):
  path, task, train = _pool_task(tmp_path / 'pool')
  name = builders.prepare_npz(path, tmp_path / 'data')
  assert name == 'arrays/shapes'
  opened = prepared.open_set(name, tmp_path / 'data')
  assert opened.label_names == task.label_names
  assert opened.sizes == {'dev': 6, 'test': 8, 'train': 16}
  for split, want in (('dev', task.dev), ('test', task.test), ('train', train)):
    images = opened.images(split)
    np.testing.assert_array_equal(_pixels(images), want.images)
    np.testing.assert_array_equal(_labels(images), want.labels)
  assert len(opened.images('train[:25%]')) == 4
  assert 'tensorflow' not in sys.modules

  made, held = holdout.to_task(opened, task.head, size=8, dev=6)
  assert held.dev.tolist() == list(range(6))
  for name in ('dev', 'test'):
    for got, want in zip(getattr(made, name), getattr(task, name), strict=True):
      np.testing.assert_array_equal(got, want)
  tasks.save_task(tmp_path / 'again', made, train)
  again = tasks.load_task(tmp_path / 'again' / 'shapes.npz')
  np.testing.assert_array_equal(again.test.images, task.test.images)
  read = tasks.load_train(tmp_path / 'again' / 'shapes.npz')
  np.testing.assert_array_equal(read.images, train.images)


def test_a_plain_npz_is_one_split(tmp_path):
  path = tmp_path / 'grey.npz'
  images, labels = _noise(4, 6, 5), np.array([0, 2, 1, 0])
  np.savez(path, images=images, labels=labels)
  name = builders.prepare_npz(path, tmp_path, name='other')
  about = dataclasses.replace(
    sets.get(name), train='train[:50%]', test='train[50%:]'
  )
  opened = prepared.open_set(about, tmp_path)
  assert opened.label_names == ('0', '1', '2')
  assert _labels(opened.train) + _labels(opened.test) == [0, 2, 1, 0]
  want = np.repeat(images[2:, ..., None], 3, axis=-1)
  np.testing.assert_array_equal(_pixels(opened.test), want)


def test_jpeg_mosaics_of_a_pool_become_training_images(tmp_path, shared):
  path = shared / 'pool' / 'tasks' / 'mnist.npz'
  splits, names = builders._read_npz(path)
  want = tasks.load_train(path)
  np.testing.assert_array_equal(splits['train'].images, want.images)
  assert {k: len(v.labels) for k, v in splits.items()} == {
    'dev': 640,
    'test': 2000,
    'train': 4000,
  }
  assert len(names) == 10


@pytest.mark.parametrize(
  ('arrays', 'match'),
  [
    ({'x': np.zeros(3)}, 'there are no images'),
    (
      {
        'a_images': np.zeros((2, 4, 4, 3), np.float32),
        'a_labels': np.zeros(2, np.int32),
        'b_images': np.zeros((2, 4, 4, 3), np.uint8),
        'b_labels': np.zeros(3, np.int32),
      },
      r'(?s)a_images are float32.*b_labels are int32\[3\]',
    ),
    (
      {
        'images': np.zeros((2, 4, 4, 3), np.uint8),
        'labels': np.array([0, 2]),
        'label_names': np.array(['a', 'a']),
      },
      '(?s)from 0 to 2, there are 2 classes.*comes twice',
    ),
    (
      {'images': np.zeros((1, 4, 4, 3), np.uint8), 'labels': np.array([None])},
      'no readable npz',
    ),
  ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, match):
  np.savez(tmp_path / 'x.npz', **arrays)
  with pytest.raises(ValueError, match=match):
    builders.prepare_npz(tmp_path / 'x.npz', tmp_path / 'data')
  assert not (tmp_path / 'data').exists()


def test_a_folder_of_splits_and_classes(tmp_path):
  pixels = {}
  for split, num in (('train', 3), ('test', 2)):
    for c in ('dog', 'cat'):
      for i in range(num):
        x = _noise(5 + i, 6, 3, seed=len(pixels))
        suffix = ('png', 'ppm', 'bmp')[i]
        _save(tmp_path / 'pets' / split / c / f'{i}.{suffix}', x)
        pixels[x.tobytes()] = (split, c)
  (tmp_path / 'pets' / 'train' / 'dog' / 'notes.csv').write_text('no image')
  name = builders.prepare_folder(tmp_path / 'pets', tmp_path / 'data')
  opened = prepared.open_set(name, tmp_path / 'data')
  assert opened.label_names == ('cat', 'dog')
  found = {
    x['image'].tobytes(): (split, opened.label_names[x['label']])
    for split in opened.sizes
    for x in opened.images(split)
  }
  assert found == pixels


def test_a_folder_of_classes_keeps_jpeg_files(tmp_path):
  _save(tmp_path / 'f' / 'b' / '0.jpg', _noise(9, 8, 3))
  _save(tmp_path / 'f' / 'a' / '0.png', _noise(9, 8))
  name = builders.prepare_folder(tmp_path / 'f', tmp_path)
  about = dataclasses.replace(sets.get(name), test='train')
  images = {
    x['label']: x['image'] for x in prepared.open_set(about, tmp_path).train
  }
  with Image.open(tmp_path / 'f' / 'b' / '0.jpg') as image:
    np.testing.assert_array_equal(images[1], np.asarray(image))


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no such folder'):
    builders.prepare_folder(tmp_path / 'none', tmp_path)
  (tmp_path / 'f' / 'train' / 'a').mkdir(parents=True)
  with pytest.raises(ValueError, match='no images'):
    builders.prepare_folder(tmp_path / 'f', tmp_path)
  _save(tmp_path / 'f' / 'train' / 'a' / '0.png', _noise(4, 4, 3))
  _save(tmp_path / 'f' / 'test' / 'b' / '0.png', _noise(4, 4, 3))
  with pytest.raises(ValueError, match=r'(?s)test lacks a.*train lacks b'):
    builders.prepare_folder(tmp_path / 'f', tmp_path)


def test_a_broken_image_leaves_nothing(tmp_path):
  _save(tmp_path / 'f' / 'a' / '0.png', _noise(4, 4, 3))
  (tmp_path / 'f' / 'a' / '1.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match=r'1\.png: not an image'):
    builders.prepare_folder(tmp_path / 'f', tmp_path / 'data')
  with pytest.raises(ValueError, match='is not prepared'):
    prepared.open_set('folders/f', tmp_path / 'data')
  assert not list((tmp_path / 'data' / 'folders').rglob('*record*'))


def test_files_are_read_once_and_others_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, images=_noise(2, 4, 4, 3), labels=np.array([0, 1]))
  name = builders.prepare_npz(path, tmp_path)
  record = next((tmp_path / 'arrays').rglob('*record-*'))
  before = record.stat().st_mtime_ns
  assert builders.prepare_npz(path, tmp_path) == name
  assert record.stat().st_mtime_ns == before
  np.savez(path, images=_noise(2, 4, 4, 3, seed=1), labels=np.array([0, 1]))
  with pytest.raises(ValueError, match='prepared from other files'):
    builders.prepare_npz(path, tmp_path)
  with pytest.raises(ValueError, match='cannot name a data set'):
    builders.prepare_npz(path, tmp_path, name='../x')


def test_tfds_s_own_sets_are_read_without_their_other_features(tmp_path):
  about = sets.get('mnist')
  image = _noise(28, 28)
  _tfds_set(tmp_path, about, [(image, 7)])
  opened = prepared.open_set('mnist', tmp_path)
  assert opened.label_names == tuple('0123456789')
  (example,) = opened.test
  assert example['label'] == 7
  np.testing.assert_array_equal(example['image'], np.dstack([image] * 3))
  assert prepared.prepare('mnist', tmp_path) == opened.folder


def test_tfds_prepares_a_set_of_its_own(tmp_path, monkeypatch):
  # food101 needs no TensorFlow; its archive is made here.
  names = (
    tfds.builder('food101', data_dir=tmp_path).info.features['label'].names
  )
  archive = tmp_path / 'archive' / 'food-101'
  rows = {}
  for split, name in (('train', names[2]), ('test', names[5])):
    x = _noise(9, 8, 3, seed=len(rows))
    _save(archive / 'images' / name / '1.jpg', x)
    (archive / 'meta').mkdir(exist_ok=True)
    listed = json.dumps({name: [f'{name}/1']})
    (archive / 'meta' / f'{split}.json').write_text(listed)
    with Image.open(archive / 'images' / name / '1.jpg') as image:
      rows[split] = np.asarray(image)
  manager = mock.Mock(downloaded_size=0, manual_dir=None)
  manager.download_and_extract.return_value = str(archive.parent)
  monkeypatch.setattr(
    tfds.core.DatasetBuilder, '_make_download_manager', lambda *_, **__: manager
  )
  monkeypatch.setattr(prepared, '_why_not_download', lambda *_: [])
  folder = prepared.prepare('food101', tmp_path)
  opened = prepared.open_set('food101', tmp_path)
  assert folder == opened.folder == tmp_path / 'food101' / '2.0.0'
  for images, split, label in (
    (opened.train, 'train', 2),
    (opened.test, 'test', 5),
  ):
    (example,) = images
    np.testing.assert_array_equal(example['image'], rows[split])
    assert example['label'] == label
  prepared.prepare('food101', tmp_path)
  manager.download_and_extract.assert_called_once()


def test_letters_stand_upright_and_count_from_zero(tmp_path):
  about = sets.get('emnist')
  image = _noise(28, 28)
  _tfds_set(tmp_path, about, [(image, 2)], [str(i) for i in range(37)])
  opened = prepared.open_set('emnist', tmp_path)
  (example,) = opened.train
  assert opened.label_names[example['label']] == 'B'
  np.testing.assert_array_equal(example['image'][..., 0], image.T)


def test_a_set_of_other_classes_is_refused(tmp_path):
  about = sets.get('mnist')
  _tfds_set(tmp_path, about, [(_noise(28, 28), 0)], ['a', 'b'])
  with pytest.raises(ValueError, match='2 classes found, 10 are known'):
    prepared.open_set('mnist', tmp_path)
  path = tmp_path / 'x.npz'
  np.savez(path, images=_noise(2, 4, 4, 3), labels=np.array([0, 1]))
  name = builders.prepare_npz(path, tmp_path)
  with pytest.raises(ValueError, match="no split 'test' among train"):
    prepared.open_set(name, tmp_path)
  about = dataclasses.replace(sets.get(name), test='train')
  with pytest.raises(ValueError, match="no split 'dev'"):
    prepared.open_set(about, tmp_path).images('dev')


def test_files_of_another_format_are_refused(tmp_path):
  _tfds_set(tmp_path, sets.get('mnist'), [(_noise(28, 28), 0)])
  path = prepared.place(sets.get('mnist'), tmp_path) / 'dataset_info.json'
  path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
  with pytest.raises(ValueError, match='files are tfrecord'):
    prepared.open_set('mnist', tmp_path)


@pytest.mark.parametrize(
  ('name', 'match'),
  [
    ('mnist', r"prepared\.prepare\('mnist', .*(?s:.*)pip install tensorflow"),
    ('resisc45', r'downloads/manual/NWPU-RESISC45 holds'),
    ('gtsrb', r'downloads/manual/gtsrb holds train/<class>'),
    ('arrays/x', r"builders\.prepare_npz\('FILE', .*name='x'\)"),
    ('arrays/mnist', r"builders\.prepare_npz\('FILE', .*name='mnist'\)"),
    ('folders/x', r"builders\.prepare_folder\('FOLDER', .*name='x'\)"),
  ],
)
def test_what_is_not_prepared_says_at_once_how_to(tmp_path, name, match):
  begin = time.perf_counter()
  with pytest.raises(ValueError, match=match):
    prepared.open_set(name, tmp_path)
  assert time.perf_counter() - begin < 5


def test_preparing_says_all_that_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(prepared.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=r'(?s)NWPU.*must hold.*TensorFlow'):
    prepared.prepare('resisc45', tmp_path)
  with pytest.raises(ValueError, match=r'(?s)TensorFlow.*download=False'):
    prepared.prepare('mnist', tmp_path, download=False)
  with pytest.raises(ValueError, match='no data set'):
    prepared.prepare('arrays/x', tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_host_that_is_not_there_is_no_wait(tmp_path, monkeypatch):
  def urlopen(request, timeout):
    raise prepared.urllib.error.URLError(f'{timeout} s')

  monkeypatch.setattr(prepared.urllib.request, 'urlopen', urlopen)
  with pytest.raises(ValueError, match='food-101.*cannot be reached'):
    prepared.prepare('food101', tmp_path)


def test_traffic_signs_come_from_manual_files(tmp_path):
  manual = tmp_path / 'downloads' / 'manual' / 'gtsrb'
  for split in ('train', 'test'):
    for i in range(43):
      _save(manual / split / f'{i:05d}' / '0.ppm', _noise(4, 5, 3, seed=i))
  folder = prepared.prepare('gtsrb', tmp_path, download=False)
  opened = prepared.open_set('gtsrb', tmp_path)
  assert opened.folder == folder
  assert opened.label_names[14] == 'stop'
  want = _noise(4, 5, 3, seed=14)
  found = {x['label']: x['image'] for x in opened.test}
  np.testing.assert_array_equal(found[14], want)
