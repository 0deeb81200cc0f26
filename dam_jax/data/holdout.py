"""Dev images that nothing was trained on and nothing is reported on.

What a merge may look at is taken from a data set's training images, without
labels. Which images that are depends on their pixels alone, not on the order
they come in; two images are the same where all their pixels are. No dev image
is left among the training images or stands among those for testing; published
data sets have such copies, so they are counted.
"""

from collections.abc import Iterable
import concurrent.futures
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from dam_jax.data import preprocess
from dam_jax.data.batches import Source
from dam_jax.data.prepared import Prepared
from dam_jax.data.tasks import Split
from dam_jax.data.tasks import Task
from dam_jax.data.tasks import check_task

_SIZE = 16  # bytes of a digest


class Holdout(NamedTuple):
  """Dev images, the training images that are left, and the copies there were.

  Attributes:
    dev: `[D]` places in the source, in order.
    train: places that are left to train on.
    repeated: images of the source that an earlier one of it equals.
    in_test: images of the source that one for testing equals; they are in
      `train`, as they are in the published split, and not in `dev`.
    test_repeated: images for testing that an earlier one equals; all stay.
  """

  dev: np.ndarray
  train: np.ndarray
  repeated: int
  in_test: int
  test_repeated: int


def digests(images: Source, *, threads: int = 2) -> list[bytes]:
  """Hashes each image's pixels and shape.

  Args:
    images: to decode and hash, all of them.
    threads: that do.

  Returns:
    A digest for each.

  Examples:
    >>> one = {'image': np.zeros((2, 3, 3), np.uint8)}
    >>> other = {'image': np.zeros((3, 2, 3), np.uint8)}
    >>> a, b, c = digests([one, other, one])
    >>> a == b, a == c
    (False, True)
  """

  def digest(i: int) -> bytes:
    pixels = np.ascontiguousarray(images[i]['image'])
    found = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=_SIZE)
    found.update(pixels.data)
    return found.digest()

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return list(pool.map(digest, range(len(images))))


def hold_out(
  images: Source, test: Source, num: int, *, seed: int = 0
) -> Holdout:
  """Chooses dev images.

  Args:
    images: to choose from: those to train on.
    test: those to report on.
    num: of dev images, `D`.
    seed: of the choice.

  Returns:
    The choice.

  Raises:
    ValueError: where fewer images than `num` are neither copies of each other
      nor of those for testing.
  """
  if num < 1 or not 0 <= seed < 2**64:
    raise ValueError(
      f'want a positive number of dev images, got {num}, and a seed from 0 to '
      f'2**64 - 1, got {seed}'
    )
  own, reported = digests(images), digests(test)
  first, tested = _first(own), _first(reported)
  free = first.keys() - tested.keys()
  if len(free) < num:
    raise ValueError(
      f'{num} dev images were asked for; of {len(own)} images {len(first)} '
      f'differ, and {len(free)} of those are not among the {len(reported)} for '
      'testing'
    )
  salt = seed.to_bytes(8, 'little')
  order = sorted(free, key=lambda x: hashlib.blake2b(x, salt=salt).digest())
  chosen = set(order[:num])
  return Holdout(
    dev=np.sort([first[x] for x in chosen]),
    train=np.flatnonzero([x not in chosen for x in own]),
    repeated=len(own) - len(first),
    in_test=sum(x in tested for x in own),
    test_repeated=len(reported) - len(tested),
  )


def _first(found: Iterable[bytes]) -> dict[bytes, int]:
  """Maps each digest to its first place."""
  places: dict[bytes, int] = {}
  for i, digest in enumerate(found):
    places.setdefault(digest, i)
  return places


def read_split(
  images: Source, places: Iterable[int], *, size: int, threads: int = 2
) -> Split:
  """Reads images into memory, of CLIP's shape and in uint8.

  Args:
    images: to read from.
    places: of the images, in the order wanted.
    size: of the squares, in pixels; see `preprocess.resize_crop`.
    threads: that read.

  Returns:
    Images `[N, size, size, 3]` and labels.

  Raises:
    ValueError: where there are none.
  """

  def read(place: int) -> tuple[np.ndarray, int]:
    example = images[int(place)]
    return preprocess.resize_crop(example['image'], size), example['label']

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    pairs = list(pool.map(read, places))
  if not pairs:
    raise ValueError('no images to read')
  pixels, labels = zip(*pairs, strict=True)
  return Split(np.stack(pixels), np.asarray(labels, np.int32))


def to_task(
  prepared: Prepared,
  head: np.ndarray,
  *,
  size: int,
  dev: int,
  test: int = 0,
  seed: int = 0,
) -> tuple[Task, Holdout]:
  """Makes a task of a data set, which experiments run on.

  Dev images come from the set's split 'dev' where it has one, else from those
  to train on. `dam_jax.data.tasks.save_task` puts the task into a pool.

  Args:
    prepared: the set.
    head: `[F, L]` float32, a unit vector a class, in the order of
      `prepared.label_names`.
    size: of the images, in pixels.
    dev: how many images merges may look at.
    test: how many of the images to report on to keep, the first ones; 0 keeps
      all.
    seed: of the choice of dev images.

  Returns:
    The task, and which images it holds out: places in split 'dev' or in
    `prepared.train`.

  Raises:
    ValueError: with all that does not fit.
  """
  reported = prepared.test
  if not 0 <= test <= len(reported):
    raise ValueError(
      f'{prepared.about.name}: asked for {test} images to report on, there are '
      f'{len(reported)}'
    )
  source = prepared.images('dev') if 'dev' in prepared.sizes else prepared.train
  found = hold_out(source, reported, dev, seed=seed)
  read = functools.partial(read_split, size=size)
  task = Task(
    name=prepared.about.name,
    head=np.asarray(head),
    label_names=prepared.label_names,
    dev=read(source, found.dev),
    test=read(reported, range(test or len(reported))),
  )
  check_task(task)
  return task, found
