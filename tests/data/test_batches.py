"""Batches of images: order, hosts, position."""

import json

import numpy as np
import pytest

from dam_jax.data import batches
from dam_jax.data.tasks import Split


def _images(num):
  return [
    {'image': np.full((2, 3, 3), i, np.uint8), 'label': i} for i in range(num)
  ]


def _read(num, batch=2, **options):
  dataset = batches.batches(
    _images(num), batch, labels=True, epochs=options.pop('epochs', 1), **options
  )
  return [list(x.labels) for x in dataset]


def test_batches_hold_images_and_labels_where_asked():
  labelled = next(iter(batches.batches(_images(4), 3, labels=True)))
  assert isinstance(labelled, Split)
  assert labelled.images.shape == (3, 2, 3, 3)
  assert labelled.images.dtype == np.uint8
  assert labelled.labels.dtype == np.int32
  np.testing.assert_array_equal(labelled.images[:, 0, 0, 0], labelled.labels)
  plain = next(iter(batches.batches(_images(4), 3)))
  np.testing.assert_array_equal(plain, labelled.images)


def test_without_seed_the_order_stays():
  assert _read(5) == [[0, 1], [2, 3]]
  assert _read(5, drop_remainder=False) == [[0, 1], [2, 3], [4]]


def test_each_epoch_is_another_order_of_all_images():
  first, second = np.array(_read(40, 4, seed=3, epochs=2)).reshape(2, 40)
  for epoch in (first, second):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
  assert (first != second).any()
  assert (first != np.arange(40)).any()


def test_the_seed_and_nothing_else_makes_the_order():
  order = _read(40, 4, seed=3)
  assert order == _read(40, 4, seed=3, threads=0)
  assert order == _read(40, 4, seed=3, threads=4, ahead=9)
  assert order != _read(40, 4, seed=4)


@pytest.mark.parametrize('seed', [None, 5])
@pytest.mark.parametrize('num', [24, 26])
def test_hosts_read_disjoint_images_of_each_epoch(seed, num):
  found = [
    np.array(_read(num, 4, seed=seed, epochs=3, host=i, num_hosts=3))
    for i in range(3)
  ]
  assert {x.shape for x in found} == {(6, 4)}
  for epoch in range(3):
    read = np.concatenate([x[2 * epoch : 2 * epoch + 2].ravel() for x in found])
    assert len(set(read)) == 24


def test_hosts_miss_nothing_where_remainders_stay():
  read = [
    x
    for host in range(3)
    for b in _read(11, 2, host=host, num_hosts=3, drop_remainder=False)
    for x in b
  ]
  assert sorted(read) == list(range(11))


@pytest.mark.parametrize('steps', [0, 1, 4, 7])
def test_an_iterator_goes_on_where_another_was(steps):
  def fresh():
    return iter(batches.batches(_images(9), 2, seed=1))

  whole = fresh()
  for _ in range(steps):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  resumed = fresh()
  resumed.set_state(state)
  for _ in range(6):
    np.testing.assert_array_equal(next(resumed), next(whole))


def test_places_choose_and_transforms_change_images():
  dataset = batches.batches(
    _images(9),
    2,
    places=[7, 1, 4],
    transform=lambda x: x[:1] + 100,
    epochs=1,
    drop_remainder=False,
  )
  first, second = dataset
  assert first.shape == (2, 1, 3, 3)
  assert [*first[:, 0, 0, 0], *second[:, 0, 0, 0]] == [107, 101, 104]


def test_all_that_does_not_fit_is_listed():
  with pytest.raises(
    ValueError, match=r'(?s)batch must.*host 2 of 2.*epochs.*seed.*threads'
  ):
    batches.batches(
      _images(4), 0, host=2, num_hosts=2, epochs=0, seed=-1, threads=-1
    )
  with pytest.raises(ValueError, match='less than a batch of 3'):
    batches.batches(_images(4), 3, num_hosts=2)
  with pytest.raises(ValueError, match='from 1 to 4 of 4'):
    batches.batches(_images(4), 1, places=[1, 4])
  with pytest.raises(ValueError, match='none for host 3'):
    batches.batches(_images(3), 1, host=3, num_hosts=4, drop_remainder=False)
