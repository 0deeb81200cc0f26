"""Images a second: every kind is read whole, and rows say so."""

import subprocess
import sys

import pytest

from benchmarks import records
from benchmarks import runs


def test_command_writes_rows(tmp_path):
  out = tmp_path / 'out.jsonl'
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_input', '--images=9'),
      *('--batch=4', '--repeats=2', '--threads=0,2', f'--folder={tmp_path}'),
      f'--out={out}',
    ],
    cwd=runs.ROOT,
    check=True,
  )
  rows = records.read(str(out), 'input')
  assert [(r['kind'], r['threads']) for r in rows] == [
    (kind, threads)
    for kind in ('png_32', 'png_32_host', 'png_32_device', 'jpeg_256_host')
    for threads in (0, 2)
  ] + [('resident_224', 0)]
  for row in rows:
    assert row['images'] == 8  # a whole number of batches
    assert row['per_second'] * row['seconds'] == pytest.approx(8)
    assert len(row['runs']) == 2
    assert row['cpu'] > 0
  assert list(tmp_path.iterdir()) == [out]
