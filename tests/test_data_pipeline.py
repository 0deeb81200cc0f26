"""The order in which images are read, and what a step then gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.data import pipeline


def _images(*sizes):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in sizes]


def test_pad_images_keeps_images_and_pads_with_zeros():
  images = _images(2, 5)
  padded = pipeline.pad_images(images)
  np.testing.assert_array_equal(padded[0, :2], images[0])
  np.testing.assert_array_equal(padded[1], images[1])
  assert not padded[0, 2:].any()


def test_pad_images_lists_all_that_is_wrong():
  images = [
    *_images(2),
    np.zeros((0, 4, 4, 3), np.uint8),
    np.zeros((2, 4, 4, 3), np.float32),
    np.zeros((2, 8, 8, 3), np.uint8),
  ]
  with pytest.raises(ValueError, match=r'(?s)task 1.*task 2.*task 3'):
    pipeline.pad_images(images)
  with pytest.raises(ValueError, match='no tasks'):
    pipeline.pad_images([])


@pytest.mark.parametrize('phases', [1, 3])
def test_each_image_comes_once_an_epoch(phases):
  sizes, batch = [12, 7], 2
  steps = 12 * 7  # a whole number of epochs of both tasks
  indices = pipeline.epoch_indices(
    3, sizes, steps=steps, phases=phases, batch=batch
  )
  assert indices.shape == (steps, phases, 2, batch)
  assert indices.dtype == np.int32
  for task, size in enumerate(sizes):
    stream = indices[:, :, task].ravel().reshape(-1, size)
    np.testing.assert_array_equal(
      np.sort(stream), np.broadcast_to(np.arange(size), stream.shape)
    )
    assert (stream[0] != stream[1]).any()


def test_chunks_give_what_one_call_gives():
  whole = pipeline.epoch_indices(1, [9, 5], steps=11, phases=2, batch=4)
  parts = [
    pipeline.epoch_indices(
      1, [9, 5], steps=end - start, phases=2, batch=4, start=start
    )
    for start, end in [(0, 1), (1, 8), (8, 8), (8, 11)]
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_tasks_are_shuffled_apart_and_by_the_seed():
  one = pipeline.epoch_indices(0, [50, 50], steps=2, phases=1, batch=25)
  two = pipeline.epoch_indices(1, [50, 50], steps=2, phases=1, batch=25)
  assert (one[:, :, 0] != one[:, :, 1]).any()
  assert (one != two).any()
  other = pipeline.epoch_indices(0, [50, 30], steps=2, phases=1, batch=25)
  np.testing.assert_array_equal(one[:, :, 0], other[:, :, 0])


@pytest.mark.parametrize(
  ('sizes', 'options', 'message'),
  [
    ([8, 3], {'batch': 4}, 'task 1 has 3'),
    ([], {}, 'no task'),
    ([8], {'batch': 0}, 'batch=0'),
    ([8], {'phases': 0}, 'phases=0'),
    ([8], {'steps': -1}, 'steps=-1'),
  ],
)
def test_epoch_indices_refuses(sizes, options, message):
  options = {'steps': 1, 'phases': 1, 'batch': 2, **options}
  with pytest.raises(ValueError, match=message):
    pipeline.epoch_indices(0, sizes, **options)


def test_gather_reads_images_and_references_alike():
  images = _images(6, 4)
  data = pipeline.Unlabelled(
    jnp.asarray(pipeline.pad_images(images)),
    jnp.arange(2 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 3),
  )
  indices = np.array([[[5, 0], [3, 3]], [[1, 2], [0, 1]]], np.int32)
  batch = jax.jit(pipeline.gather)(data, indices)
  assert batch.images.shape == (2, 2, 2, 4, 4, 3)
  for s, t, b in np.ndindex(2, 2, 2):
    n = indices[s, t, b]
    np.testing.assert_allclose(
      batch.images[s, t, b], images[t][n] / np.float32(255), rtol=1e-6
    )
    np.testing.assert_array_equal(
      batch.references[s, t, b], data.references[t, n]
    )
  assert pipeline.gather(data._replace(references=None), indices)[1] is None


def test_references_ask_each_expert_about_its_own_images():
  images, sizes = _images(5, 3, 1), [5, 3, 1]
  experts = {'w': jnp.array([1.0, 2.0, -3.0])}

  def task_logits_fn(params, task, images):
    score = params['w'] * jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([score, jnp.full_like(score, task)], axis=-1)

  found = pipeline.references(
    task_logits_fn,
    experts,
    jnp.asarray(pipeline.pad_images(images)),
    sizes,
    batch=2,
  )
  for t, x in enumerate(images):
    score = [1.0, 2.0, -3.0][t] * x.mean(axis=(1, 2, 3)) / 255
    want = 1 / (1 + np.exp(t - score))
    np.testing.assert_allclose(found[t, : len(x), 0], want, rtol=1e-5)
    assert not found[t, len(x) :].any()


@pytest.mark.parametrize(
  ('sizes', 'batch'), [([5], 2), ([5, 0], 2), ([6, 3], 2), ([5, 3], 0)]
)
def test_references_refuses_sizes_that_do_not_fit(sizes, batch):
  images = jnp.asarray(pipeline.pad_images(_images(5, 3)))
  with pytest.raises(ValueError, match=r'batch|too many'):
    pipeline.references(lambda *_: None, {}, images, sizes, batch=batch)
