"""Unlabelled images that stay on the device, and the order they are read in.

The images of all tasks lie in one padded uint8 array on the device; only int32
indices travel, so that many steps run under one dispatch
(`dam_jax.scan_steps`). The order is a function of the seed and the position
alone: a run that resumes at step 100 reads what an unbroken run would have.

  >>> import numpy as np
  >>> epoch_indices(0, [4], steps=2, phases=1, batch=2).shape
  (2, 1, 1, 2)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.typing import Batch, Params, TaskLogitsFn


class Unlabelled(NamedTuple):
  """Images of all tasks without labels, ready to be gathered from.

  Attributes:
    images: `[T, N, H, W, C]` uint8; tasks with fewer than `N` images are
      padded with zeros, which no index of `epoch_indices` points at.
    references: `[T, N, L]` class probabilities that each task's own expert
      gives to them, or None.
  """

  images: jax.Array
  references: jax.Array | None = None


def pad_images(images: Sequence[np.ndarray]) -> np.ndarray:
  """Lays the images of tasks of different size into one array.

  Args:
    images: for each of `T` tasks `[N_t, H, W, C]` uint8.

  Returns:
    `[T, max N_t, H, W, C]` uint8, padded with zeros.

  Raises:
    ValueError: with all that is wrong: no task, no images, another dtype, or
      shapes of images that differ.

  Examples:
    >>> pad_images([np.ones((2, 4, 4, 3), np.uint8),
    ...             np.ones((3, 4, 4, 3), np.uint8)]).shape
    (2, 3, 4, 4, 3)
  """
  if not images:
    raise ValueError('no tasks: a merge with data needs images of each task')
  lines = []
  for t, x in enumerate(images):
    if x.ndim != 4 or not len(x) or x.dtype != np.uint8:
      lines.append(
        f'task {t}: got {x.dtype.name}{list(x.shape)}, want uint8[N, H, W, C] '
        'with N > 0'
      )
    elif x.shape[1:] != images[0].shape[1:]:
      lines.append(
        f'task {t}: images are {x.shape[1:]}, those of task 0 are '
        f'{images[0].shape[1:]}'
      )
  if lines:
    raise ValueError('\n  '.join(['unlabelled images:', *lines]))
  size = max(len(x) for x in images)
  padded = np.zeros((len(images), size, *images[0].shape[1:]), np.uint8)
  for row, x in zip(padded, images, strict=True):
    row[: len(x)] = x
  return padded


def epoch_indices(
  seed: int,
  sizes: Sequence[int],
  *,
  steps: int,
  phases: int,
  batch: int,
  start: int = 0,
) -> np.ndarray:
  """Which images each step reads: each task's once an epoch, shuffled.

  A task's images form an endless stream, one random permutation after the
  other, of which phase `s` of step `i` takes the `i * phases + s`-th `batch`.
  Tasks are shuffled apart from each other.

  Args:
    seed: of the permutations.
    sizes: number of images of each of `T` tasks.
    steps: how many steps to give.
    phases: draws a step, `S`.
    batch: images a task and draw, `B`.
    start: the first step; any split into chunks gives the same indices.

  Returns:
    `[steps, S, T, B]` int32.

  Raises:
    ValueError: where a number is not positive, or a batch does not fit into a
      task's images.

  Examples:
    >>> whole = epoch_indices(7, [5, 3], steps=4, phases=2, batch=3)
    >>> part = epoch_indices(7, [5, 3], steps=1, phases=2, batch=3, start=3)
    >>> bool((whole[3:] == part).all())
    True
  """
  if min(steps, start, seed) < 0 or min(phases, batch) < 1:
    raise ValueError(
      'phases and batch must be positive and steps, start and seed not '
      f'negative, got phases={phases}, batch={batch}, steps={steps}, '
      f'start={start}, seed={seed}'
    )
  small = [f'task {t} has {n}' for t, n in enumerate(sizes) if n < batch]
  if small or not len(sizes):
    raise ValueError(
      f'a batch of {batch} images needs as many of each task: '
      + (', '.join(small) or 'there is no task')
    )
  rows = []
  for task, size in enumerate(sizes):
    first, last = start * phases * batch, (start + steps) * phases * batch
    epochs = range(first // size, -(-last // size))
    stream = [
      np.random.default_rng((seed, task, epoch)).permutation(size)
      for epoch in epochs
    ]
    stream = np.concatenate([np.zeros(0, np.int64), *stream])
    offset = epochs.start * size
    rows.append(stream[first - offset : last - offset])
  stacked = np.stack(rows).reshape(len(sizes), steps, phases, batch)
  return stacked.transpose(1, 2, 0, 3).astype(np.int32)


def gather(data: Unlabelled, indices: jax.Array) -> Batch:
  """Reads one step's images, on the device.

  Args:
    data: images of all tasks.
    indices: `[S, T, B]`, as `epoch_indices` gives them for one step.

  Returns:
    Images in [0, 1], and their references where `data` has them.

  Examples:
    >>> data = Unlabelled(jnp.full((1, 2, 4, 4, 3), 255, jnp.uint8))
    >>> batch = gather(data, jnp.array([[[1, 0, 1]]]))
    >>> batch.images.shape, float(batch.images.max())
    ((1, 1, 3, 4, 4, 3), 1.0)
  """
  tasks = jnp.arange(indices.shape[1])[None, :, None]
  images = data.images[tasks, indices].astype(jnp.float32) / 255
  if data.references is None:
    return Batch(images)
  return Batch(images, data.references[tasks, indices])


def references(
  task_logits_fn: TaskLogitsFn,
  experts: Params,
  images: jax.Array,
  sizes: Sequence[int],
  *,
  batch: int = 128,
) -> jax.Array:
  """Asks each expert once about its own task's images.

  Args:
    task_logits_fn: `(params, task, images [B, H, W, C] in [0, 1]) -> [B, L]`,
      with a traced task index.
    experts: stacked models `[T, ...]`, one a task.
    images: `[T, N, H, W, C]` uint8.
    sizes: number of images of each task.
    batch: images a forward pass.

  Returns:
    Class probabilities `[T, N, L]` float32; zero for padding.

  Raises:
    ValueError: where a size or the batch is not positive, or a size does not
      fit the images.
  """
  num_tasks, num_images = images.shape[:2]
  if batch < 1 or len(sizes) != num_tasks or min(sizes) < 1:
    raise ValueError(
      f'need a positive batch and {num_tasks} positive sizes, got {batch} and '
      f'{list(sizes)}'
    )
  if max(sizes) > num_images:
    raise ValueError(f'{list(sizes)} images of {num_images} are too many')
  batch = min(batch, num_images)

  @jax.jit
  def predict(experts, task, start):
    # A start near the end is clamped: the overlap is computed again.
    pixels = jax.lax.dynamic_slice_in_dim(images[task], start, batch)
    expert = jax.tree.map(lambda x: x[task], experts)
    pixels = pixels.astype(jnp.float32) / 255
    return jax.nn.softmax(task_logits_fn(expert, task, pixels))

  zero = jnp.zeros([], jnp.int32)
  num_classes = jax.eval_shape(predict, experts, zero, zero).shape[-1]
  out = np.zeros((num_tasks, num_images, num_classes), np.float32)
  for task, size in enumerate(sizes):
    for start in range(0, size, batch):
      start = max(0, min(start, size - batch))
      p = predict(experts, jnp.int32(task), jnp.int32(start))
      out[task, start : start + batch] = np.asarray(p)
    out[task, size:] = 0
  return jnp.asarray(out)
