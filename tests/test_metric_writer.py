"""What lies on disk after a run's steps."""

import csv

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
