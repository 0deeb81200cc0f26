"""Scaling: what is measured on how many devices, and the lines that fit."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import records
from benchmarks import runs
from benchmarks import scaling_fits
from benchmarks import scaling_runs
from benchmarks import worker

SIZE = {'width': 24, 'layers': 1}
STEP = {'width': 64, 'layers': 1, 'image': 8, 'batch': 2}


def measured(experts, seconds, peak):
  return {
    **{'axis': 'experts', 'what': 'merge', 'method': 'ties'},
    **{'experts': experts, 'devices': 1, 'runs': [{'seconds': seconds}]},
    'peak': peak,
  }


def test_a_line_is_fitted():
  rows = [measured(k, 0.5 + 0.25 * k, 100 + 10 * k**2) for k in (2, 4, 8)]
  time, memory = scaling_fits.fits(rows)
  assert (time['of'], memory['of']) == ('seconds', 'peak')
  assert time['fixed'] == pytest.approx(0.5)
  assert time['marginal'] == pytest.approx(0.25)
  assert time['r2'] == pytest.approx(1)
  assert 0.9 < memory['r2'] < 1
  assert scaling_fits.fits(rows[:2]) == []


def test_devices_merge_as_one_does():
  norms = {}
  for devices in (1, 2):
    job = scaling_runs.load(
      **{'what': 'merge', 'method': 'ties', 'experts': 3},
      **{'devices': devices, 'size': SIZE},
    )
    json.dumps(job.about)
    figures, merged = worker.measure_first(job, job.prepare())
    assert figures['held'] > 0
    norms[devices] = job.requests['norms'](merged)
  np.testing.assert_allclose(norms[1], norms[2], rtol=1e-6)


def test_a_step_goes_on_from_the_one_before():
  job = scaling_runs.load(
    **{'what': 'step', 'method': 'adamerging_layer_wise', 'experts': 2},
    **{'devices': 1, 'size': STEP},
  )
  found = []
  for _ in range(2):
    _, state = worker.measure(job, job.prepare())
    found.append(job.requests['norms'](state))
  assert np.isfinite(found).all()
  assert not np.array_equal(*found)


def test_more_devices_than_there_are_is_an_error():
  with pytest.raises(ValueError, match='want 99 devices, there are'):
    scaling_runs.load(
      **{'what': 'merge', 'method': 'ties', 'experts': 2},
      **{'devices': 99, 'size': SIZE},
    )


def test_command_writes_rows_and_a_picture(tmp_path):
  out, picture = tmp_path / 'out.jsonl', tmp_path / 'picture.png'
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_scaling', '--steps='),
      *('--merges=task_arithmetic', '--experts=2,3,4', '--devices=1,2'),
      *('--fixed_experts=2', '--width=24', '--layers=1', '--repeats=2'),
      *(f'--out={out}', f'--picture={picture}'),
    ],
    cwd=runs.ROOT,
    check=True,
  )
  rows = records.read(str(out), 'scaling')
  axes = [row['axis'] for row in rows]
  assert axes == ['experts'] * 3 + ['devices'] * 2 + ['fit'] * 2
  assert rows[4]['devices'] == 2
  assert rows[4]['difference'] < 1e-6
  assert rows[4]['shared_cores']
  assert picture.read_bytes().startswith(b'\x89PNG')
