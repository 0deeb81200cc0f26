"""Dev images: none is trained on or reported on."""

import numpy as np
import pytest

from dam_jax.data import builders
from dam_jax.data import holdout
from dam_jax.data import prepared
from dam_jax.data import preprocess


def _source(keys, shape=(4, 4, 3)):
  """Images that are the same where their keys are."""
  return [
    {
      'image': np.random.default_rng(k).integers(0, 256, shape, np.uint8),
      'label': k % 3,
    }
    for k in keys
  ]


@pytest.mark.parametrize('num', [1, 30, 38])
def test_dev_images_are_nowhere_else(num):
  keys, test_keys = [*range(40), 3, 3, 7], [50, 51, 51, 1, 2]
  found = holdout.hold_out(_source(keys), _source(test_keys), num)
  dev = {keys[i] for i in found.dev}
  train = {keys[i] for i in found.train}
  assert len(found.dev) == len(dev) == num
  assert not dev & train
  assert not dev & set(test_keys)
  assert dev | train == set(range(40))
  assert len(found.train) == sum(k not in dev for k in keys)
  assert (found.repeated, found.in_test, found.test_repeated) == (3, 2, 1)


def test_the_choice_depends_on_pixels_and_seed_alone():
  keys = list(range(30))
  other = list(np.random.default_rng(0).permutation(keys))
  choices = [
    {k[i] for i in holdout.hold_out(_source(k), _source([99]), 9, seed=s).dev}
    for k, s in ((keys, 0), (other, 0), (keys, 1))
  ]
  assert choices[0] == choices[1] != choices[2]


def test_fewer_images_than_asked_for_are_refused():
  images, test = _source([0, 0, 1, 2]), _source([2, 5])
  assert len(holdout.hold_out(images, test, 2).dev) == 2
  with pytest.raises(
    ValueError, match='3 dev images.*of 4 images 3 differ, and 2 of those'
  ):
    holdout.hold_out(images, test, 3)
  with pytest.raises(ValueError, match='positive number'):
    holdout.hold_out(images, test, 0)
  with pytest.raises(ValueError, match='seed from 0'):
    holdout.hold_out(images, test, 1, seed=-1)


def test_read_split_resizes_in_order():
  images = _source(range(5), (9, 7, 3))
  split = holdout.read_split(images, [3, 1], size=6)
  want = [preprocess.resize_crop(images[i]['image'], 6) for i in (3, 1)]
  np.testing.assert_array_equal(split.images, want)
  assert split.labels.tolist() == [0, 1]
  assert split.labels.dtype == np.int32
  with pytest.raises(ValueError, match='no images'):
    holdout.read_split(images, [], size=6)


def test_a_task_of_a_set_holds_out_of_its_training_images(tmp_path):
  train, test = _source([*range(20), 30]), _source([30, 31, 32])
  np.savez(
    tmp_path / 'noise.npz',
    **{
      f'{name}_{key}s': np.stack([x[key] for x in split])
      for name, split in (('train', train), ('test', test))
      for key in ('image', 'label')
    },
  )
  name = builders.prepare_npz(tmp_path / 'noise.npz', tmp_path)
  opened = prepared.open_set(name, tmp_path)
  head = np.eye(5, 3, dtype=np.float32)
  task, held = holdout.to_task(opened, head, size=8, dev=20, test=2)
  assert held.in_test == 1
  assert held.train.tolist() == [20]
  assert task.name == 'noise'
  assert task.dev.images.shape == (20, 8, 8, 3)
  assert task.test.labels.tolist() == [30 % 3, 31 % 3]
  with pytest.raises(ValueError, match='21 dev images'):
    holdout.to_task(opened, head, size=8, dev=21)
  with pytest.raises(ValueError, match='4 images to report on, there are 3'):
    holdout.to_task(opened, head, size=8, dev=2, test=4)
  with pytest.raises(ValueError, match='3 label names for 2 classes'):
    holdout.to_task(opened, head[:, :2], size=8, dev=2)
