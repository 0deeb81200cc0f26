"""`dam-jax merge` on several hosts: here, processes of one machine."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dam_jax import checkpoint
from dam_jax import cli
from dam_jax import distributed
from tests.cli.test_commands import arguments
from tests.cli.test_commands import files as files  # a fixture
from tests.test_distributed import free_port

ROOT = pathlib.Path(__file__).parents[2]


def run(*argv, count=2, differ=()):
  """Returns exit code and errors of each process."""
  address = f'127.0.0.1:{free_port()}'
  env = {k: x for k, x in os.environ.items() if k not in distributed.VARIABLES}
  running = [
    subprocess.Popen(
      [
        *(sys.executable, '-c', 'from dam_jax import cli; cli.run()', 'merge'),
        *argv,
        *(differ if i else ()),
        f'--coordinator={address}',
        f'--num-processes={count}',
        f'--process-id={i}',
      ],
      cwd=ROOT,
      env=env | {'JAX_PLATFORMS': 'cpu'},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  errors = [process.communicate(timeout=120)[1] for process in running]
  return [process.returncode for process in running], errors


@pytest.mark.parametrize('out', ['out', 'out.safetensors'])
def test_two_hosts_write_what_one_does(files, out):
  argv = arguments(files, '--set=density=0.3', '--shard-gb=1e-7', method='ties')
  codes, errors = run(*argv, f'--out={files / "two" / out}')
  assert codes == [0, 0], errors
  assert 'written in' in errors[0]
  assert 'written in' not in errors[1]
  assert cli.main(['merge', *argv, f'--out={files / "one" / out}']) == 0
  found = {p.name: p for p in (files / 'two').rglob('*') if p.is_file()}
  wanted = {p.name: p for p in (files / 'one').rglob('*') if p.is_file()}
  assert {*found} == {*wanted}
  for name, path in wanted.items():
    if path.suffix == '.safetensors' and path.name != 'out.safetensors':
      assert found[name].read_bytes() == path.read_bytes(), name
  if out == 'out':
    one, two = (
      json.loads((files / k / out / 'merge_record.json').read_text())
      for k in ('one', 'two')
    )
    assert one['files'] == two['files']


def test_two_hosts_write_an_orbax_checkpoint(files):
  argv = arguments(files, '--format=orbax')
  codes, errors = run(*argv, f'--out={files / "two"}')
  assert codes == [0, 0], errors
  assert cli.main(['merge', *argv, f'--out={files / "one"}']) == 0
  found, wanted = (
    checkpoint.open_model(files / name) for name in ('two', 'one')
  )
  assert dict(found.leaves) == dict(wanted.leaves)
  for path in wanted.leaves:
    np.testing.assert_array_equal(found.read(path), wanted.read(path))
  chunks = {
    name: len([*(files / name / 'state' / 'embed.weight').glob('[0-9]*')])
    for name in ('two', 'one')
  }
  assert chunks == {'two': 2, 'one': 1}
  assert not [*files.glob('.two*')]


def test_hosts_with_other_arguments_stop(files):
  argv = arguments(files, f'--out={files / "out"}', method='ties')
  codes, errors = run(*argv, differ=['--set=density=0.5'])
  assert codes == [2, 2], errors
  for error in errors:
    assert 'plan: not that of process 0 on 1' in error
  assert not (files / 'out').exists()
