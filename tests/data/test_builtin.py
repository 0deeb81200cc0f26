"""The built-in tasks: real images, splits that share none, honest labels."""

import numpy as np
import pytest

from dam_jax.data import builtin
from dam_jax.data import tasks as tasks_lib


@pytest.fixture(scope='module')
def sources():
  return {name: builtin.load(name) for name in builtin.NAMES}


@pytest.mark.parametrize('name', builtin.NAMES)
def test_tasks_fit_themselves(sources, name):
  source = sources[name]
  tasks_lib.check_task(source.task)
  assert source.task.test.images.shape[1:] == (28, 28, 3)
  np.testing.assert_allclose(np.linalg.norm(source.task.head, axis=0), 1, 1e-5)
  for split in (source.pretrain, source.train, source.task.test):
    share = np.bincount(split.labels) / len(split.labels)
    assert len(share) == len(source.task.label_names)
    assert share.min() > 0.3 / len(share)


@pytest.mark.parametrize('name', ['mnist', 'digits'])
def test_splits_share_no_image(sources, name):
  source = sources[name]
  splits = (source.pretrain, source.train, source.task.dev, source.task.test)
  seen = [{x.tobytes() for x in split.images} for split in splits]
  assert sum(map(len, seen)) == len(set.union(*seen))


def test_rotation_turns_the_same_digits(sources):
  plain, turned = sources['mnist'].train, sources['rotation'].train
  for i in range(20):
    back = np.rot90(turned.images[i], -int(turned.labels[i]))
    np.testing.assert_array_equal(back, plain.images[i])


def test_position_is_where_the_ink_is(sources):
  split = sources['position'].task.test
  ink = split.images[..., 0].astype(float)
  grid = np.arange(28)
  row = (ink.sum(2) * grid).sum(1) / ink.sum((1, 2))
  column = (ink.sum(1) * grid).sum(1) / ink.sum((1, 2))
  cell = 3 * np.digitize(row, [10, 17]) + np.digitize(column, [10, 17])
  assert np.mean(cell == split.labels) > 0.9


def test_colour_is_that_of_the_ink(sources):
  source = sources['colour']
  names = source.task.label_names
  images, labels = source.task.test
  red = images[labels == names.index('red')].astype(float)
  brightest = red.sum(-1).reshape(len(red), -1).argmax(-1)
  pixels = red.reshape(len(red), -1, 3)[np.arange(len(red)), brightest]
  assert (pixels[:, 0] > pixels[:, 1]).mean() > 0.9


def test_seeds_decide_everything():
  one, two = builtin.load('colour', seed=1), builtin.load('colour', seed=1)
  np.testing.assert_array_equal(one.train.images, two.train.images)
  other = builtin.load('colour', seed=2)
  assert (one.train.images != other.train.images).any()


def test_an_unknown_task_says_what_there_is():
  with pytest.raises(ValueError, match='mnist, digits'):
    builtin.load('cars')
