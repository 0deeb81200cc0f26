"""What lies on disk after a run's steps."""

import csv
import importlib.util

import jax
import numpy as np
import pytest

from dam_jax.metric_writer import MetricWriter


def _read(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def test_chunks_become_one_table(tmp_path):
  path = tmp_path / 'new' / 'curve.csv'
  with MetricWriter(path) as writer:
    writer.write(
      0, {'b': np.array([1.5, np.nan]), 'a': np.array([True, False])}
    )
    writer.write(2, {'a': np.array([True]), 'b': np.float32([0.1])})
    assert len(_read(path)) == 3  # on disk before the end
  rows = _read(path)
  assert [r['step'] for r in rows] == ['0', '1', '2']
  assert [r['a'] for r in rows] == ['1', '0', '1']
  assert [float(r['b']) for r in rows] == pytest.approx(
    [1.5, np.nan, 0.1], nan_ok=True
  )


def test_other_columns_or_lengths_are_refused(tmp_path):
  with MetricWriter(tmp_path / 'curve.csv') as writer:
    writer.write(0, {'a': np.zeros(2)})
    with pytest.raises(ValueError, match='as at first'):
      writer.write(2, {'b': np.zeros(2)})
    with pytest.raises(ValueError, match='one value a step'):
      writer.write(2, {'a': np.zeros(2), 'b': np.zeros(3)})
    with pytest.raises(ValueError, match='one value a step'):
      writer.write(2, {'a': np.zeros((2, 2))})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with MetricWriter(tmp_path / 'curve.csv') as writer:
    writer.write(0, {'a': np.zeros(2)})
  assert not list(tmp_path.iterdir())


def _events(folder):
  """Reads scalars by name, [steps and values], as TensorBoard does."""
  accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  tensor_util = pytest.importorskip('tensorboard.util.tensor_util')
  found = accumulator.EventAccumulator(
    str(folder), size_guidance={accumulator.TENSORS: 0}
  ).Reload()
  return {
    name: [
      (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
      for event in found.Tensors(name)
    ]
    for name in found.Tags()['tensors']
  }


def test_tensorboard_reads_the_same_numbers(tmp_path):
  path = tmp_path / 'curves' / 'average.csv'
  for first in (3.0, 1.0):  # the second file takes the place of the first
    with MetricWriter(path) as writer:
      writer.write(
        0, {'b': np.array([first, 0.5]), 'a': np.array([True, False])}
      )
      writer.write(2, {'a': np.array([True]), 'b': np.float32([0.1])})
      events = _events(tmp_path / 'curves' / 'average')  # before the end
  assert events['a'] == [(0, 1), (1, 0), (2, 1)]
  assert events['b'] == [(0, 1), (1, 0.5), (2, np.float32(0.1))]
  rows = _read(path)
  assert [float(row['b']) for row in rows] == pytest.approx([1, 0.5, 0.1])


def test_event_files_can_be_asked_for_or_left_out(tmp_path, monkeypatch):
  path = tmp_path / 'curve.csv'
  with MetricWriter(path, tensorboard=False) as writer:
    writer.write(0, {'a': np.zeros(2)})
  assert [*tmp_path.iterdir()] == [path]
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with MetricWriter(path) as writer:
    writer.write(0, {'a': np.zeros(2)})
  assert [*tmp_path.iterdir()] == [path]
  with pytest.raises(ValueError, match='pip install tensorboard'):
    MetricWriter(path, tensorboard=True)
