"""Files in and out: what is read is what was written, and figures."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import checkpoint_runs
from benchmarks import records
from benchmarks import runs
from benchmarks import worker


@pytest.mark.parametrize('kind', checkpoint_runs.KINDS)
@pytest.mark.parametrize(
  ('direction', 'drop'),
  [('save', False), ('restore', False), ('restore', True)],
)
def test_kind_is_written_and_read_again_and_again(
  kind, direction, drop, tmp_path
):
  job = checkpoint_runs.load(
    **{'folder': str(tmp_path), 'kind': kind, 'direction': direction},
    **{'drop': drop, 'width': 24, 'layers': 1},
  )
  json.dumps(job.about)
  assert job.about['same']
  assert job.about['bytes'] > 24 * 24 * 4
  for _ in range(2):
    figures, found = worker.measure(job, job.prepare())
    assert figures['seconds'] > 0
  assert (found is None) == (direction == 'save')
  source = tmp_path / 'plain' / checkpoint_runs.SOURCE
  assert source.stat().st_size == job.about['bytes']
  for request in ('copy', 'read'):
    assert job.requests[request](None)['seconds'] > 0
  copied = tmp_path / 'plain' / 'target.bin'
  assert copied.read_bytes() == source.read_bytes()
  assert 0 <= job.requests['held'](None) <= 1


def test_what_differs_is_noticed(monkeypatch, tmp_path):
  kind = checkpoint_runs.KINDS['safetensors']
  monkeypatch.setitem(
    checkpoint_runs.KINDS,
    'safetensors',
    kind._replace(
      restore=lambda folder, held: {
        leaf: np.zeros_like(x) for leaf, x in held.items()
      }
    ),
  )
  job = checkpoint_runs.load(
    **{'folder': str(tmp_path), 'kind': 'safetensors', 'direction': 'save'},
    **{'drop': False, 'width': 24, 'layers': 1},
  )
  assert not job.about['same']


def test_command_writes_rows(tmp_path):
  out = tmp_path / 'out.jsonl'
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_checkpoint'),
      *('--kinds=safetensors', '--width=24', '--layers=1', '--repeats=1'),
      *(f'--folder={tmp_path}', f'--out={out}'),
    ],
    cwd=runs.ROOT,
    check=True,
  )
  rows = records.read(str(out), 'checkpoint')
  assert [(r['direction'], r['cache']) for r in rows] == [
    *(('save', 'warm'), ('restore', 'warm')),
    ('restore', 'dropped'),
  ]
  for row in rows:
    assert row['gbps'] * row['seconds'] * 1e9 == pytest.approx(row['bytes'])
    assert row['of_copy'] > 0
  assert list(tmp_path.iterdir()) == [out]
