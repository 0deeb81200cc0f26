"""Batches of a data set's images, read ahead by grain.

The order is a function of the seed and of the position: hosts read disjoint
images of every epoch, and an iterator that is set to another's state goes on
with what that one would have read next.

  >>> images = [{'image': np.full((2, 2, 3), i), 'label': i} for i in range(5)]
  >>> iterator = iter(batches(images, 2, seed=0, labels=True))
  >>> first, state = next(iterator), iterator.get_state()
  >>> second = next(iterator)
  >>> iterator.set_state(state)
  >>> bool((next(iterator).labels == second.labels).all())
  True
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Protocol

import grain
import numpy as np

from dam_jax.data.tasks import Split

Transform = Callable[[np.ndarray], np.ndarray]


class Source(Protocol):
  """Images that can be read at random, such as those of a prepared split."""

  def __len__(self) -> int:
    """How many there are."""
    ...

  def __getitem__(self, index: Any) -> Any:
    """One, with its 'image' and 'label'."""
    ...


def batches(
  images: Source,
  batch: int,
  *,
  seed: int | None = None,
  places: Sequence[int] | np.ndarray | None = None,
  transform: Transform | None = None,
  labels: bool = False,
  epochs: int | None = None,
  host: int = 0,
  num_hosts: int = 1,
  drop_remainder: bool = True,
  threads: int = 2,
  ahead: int = 4,
) -> grain.IterDataset:
  """Makes an endless, or finite, stream of batches.

  Args:
    images: of one size, unless `transform` makes them so.
    batch: images a batch and host, `B`.
    seed: of the order, another one each epoch; None is the order that is.
    places: which images to read; all where None.
    transform: of an image `[H, W, 3]` uint8, on the host, such as
      `dam_jax.data.preprocess.resize_crop` with a size.
    labels: whether batches have labels; merges read none.
    epochs: how often to read everything; None is for ever.
    host: number of this process, `jax.process_index()`.
    num_hosts: of processes, `jax.process_count()`.
    drop_remainder: whether each epoch ends with its last whole batch, and each
      host reads as many images: up to `num_hosts - 1` wait for another epoch.
    threads: that read; 0 reads when a batch is asked for.
    ahead: batches that are read before they are asked for.

  Returns:
    A `grain.IterDataset`. `iter` gives its iterator, with `get_state` and
    `set_state`, whose state is small and can be written as JSON. A batch is
    `[B, H, W, C]` as the images are, or with labels a
    `dam_jax.data.tasks.Split`.

  Raises:
    ValueError: with all numbers that do not fit.
  """
  num = len(images) if places is None else len(places)
  lines = _misfits(
    num,
    batch=batch,
    host=host,
    num_hosts=num_hosts,
    epochs=epochs,
    whole=drop_remainder,
    seed=seed,
    threads=threads,
    ahead=ahead,
  )
  if places is not None and num:
    low, high = int(np.min(places)), int(np.max(places))
    if low < 0 or high >= len(images):
      lines.append(f'places from {low} to {high} of {len(images)} images')
  if lines:
    raise ValueError('\n  '.join(['batches:', *lines]))
  dataset = grain.MapDataset.range(num)
  if seed is not None:
    dataset = dataset.seed(seed).shuffle()
  if num_hosts > 1:
    end = num - num % num_hosts if drop_remainder else num
    dataset = dataset.slice(slice(host, end, num_hosts))
  read = functools.partial(_read, images, places, transform, labels)
  dataset = dataset.map(read)
  dataset = dataset.batch(batch, drop_remainder=drop_remainder)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(ahead, threads)
  )
  return dataset.repeat(epochs).to_iter_dataset(options)


def _read(
  images: Source,
  places: Sequence[int] | np.ndarray | None,
  transform: Transform | None,
  labels: bool,
  index: int,
) -> np.ndarray | Split:
  example = images[index if places is None else int(places[index])]
  image = example['image']
  if transform is not None:
    image = transform(image)
  if not labels:
    return image
  return Split(image, np.asarray(example['label'], np.int32))


def _misfits(
  num: int,
  *,
  batch: int,
  host: int,
  num_hosts: int,
  epochs: int | None,
  whole: bool,
  seed: int | None,
  threads: int,
  ahead: int,
) -> list[str]:
  """Says which numbers do not fit, one a line."""
  lines = []
  if batch < 1:
    lines.append(f'batch must be positive, got {batch}')
  if not 0 <= host < num_hosts:
    lines.append(f'host {host} of {num_hosts} hosts')
  elif whole and num // num_hosts < batch:
    lines.append(
      f'{num} images are less than a batch of {batch} for {num_hosts} host(s)'
    )
  elif num <= host:
    lines.append(f'{num} images are none for host {host}')
  if epochs is not None and epochs < 1:
    lines.append(f'epochs must be positive or None, got {epochs}')
  if seed is not None and not 0 <= seed < 2**32:
    lines.append(f'seed must be from 0 to 2**32 - 1, got {seed}')
  if min(threads, ahead) < 0:
    lines.append(f'threads={threads} and ahead={ahead} must not be negative')
  return lines
