"""A merge that several hosts run together: here, processes of one machine."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from configs import pool as pool_config
from dam_jax import distributed
from experiments import merge
from experiments import preemption
from tests.test_distributed import free_port

ROOT = pathlib.Path(__file__).parents[2]
CHANGES = {
  'bad': 'evil',
  'methods': 'dam_robust',
  'steps': 7,
  'batch': 4,
  'dev': 8,
  'test_batch': 12,
  'transfer_test': 6,
  'scan_layers': False,
  'max_lost': 4,
  'audit': False,
  'options.dam_robust.warmup_ascents': 4,
}


def _start(pool, workdir, **changes):
  """Starts two processes of two devices each."""
  address = f'127.0.0.1:{free_port()}'
  env = {k: x for k, x in os.environ.items() if k not in distributed.VARIABLES}
  env |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '2',
  }
  given = {**CHANGES, 'pool': str(pool), 'mesh': 'data=4', **changes}
  return [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'experiments.merge'),
        '--config=configs/pool.py',
        *(f'--config.{key}={value}' for key, value in given.items()),
        f'--workdir={workdir}',
        f'--coordinator={address}',
        '--num_processes=2',
        f'--process_id={i}',
        *([f'--config.seed={i}'] if 'seed' in changes else []),
      ],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]


def _finish(running):
  """Returns exit codes and outputs."""
  outputs = [process.communicate(timeout=300)[0] for process in running]
  return [process.returncode for process in running], outputs


def test_two_hosts_stop_together_go_on_and_end_where_one_does(
  small_pool, tmp_path
):
  workdir = tmp_path / 'run'
  running = _start(small_pool, workdir)
  until = time.monotonic() + 240
  while not (workdir / 'run.json').exists() and time.monotonic() < until:
    assert [p.poll() for p in running] == [None, None], _finish(running)
    time.sleep(0.05)
  # JAX looks for signals each second, and steps take less. This one comes while
  # they are compiled, so all stop after the first two, which run at once.
  running[1].send_signal(signal.SIGTERM)
  codes, outputs = _finish(running)
  assert codes == [preemption.EXIT_CODE] * 2, outputs
  assert 'dam_robust: asked to stop after step' in outputs[0]
  assert not (workdir / 'report.json').exists()
  (save,) = (workdir / 'states' / 'dam_robust').glob('[0-9]*')
  assert 0 < int(save.name) < CHANGES['steps']

  codes, outputs = _finish(_start(small_pool, workdir))
  assert codes == [0, 0], outputs
  assert 'report:' in outputs[0]
  assert 'report:' not in outputs[1]
  config = pool_config.get_config()
  config.update_from_flattened_dict({**CHANGES, 'pool': str(small_pool)})
  want = merge.run(config, tmp_path / 'alone', Console(file=io.StringIO()))
  found = json.loads((workdir / 'report.json').read_text())
  for row, wanted in zip(found['rows'], want['rows'], strict=True):
    assert row['value'] == pytest.approx(wanted['value'], abs=0.1), row
  path = 'models/dam_robust/model.safetensors'
  ours, theirs = load_file(workdir / path), load_file(tmp_path / 'alone' / path)
  for name, x in theirs.items():
    if 'k_proj.bias' not in name:
      np.testing.assert_allclose(ours[name], x, atol=2e-3, err_msg=name)


def test_hosts_that_were_given_different_configs_all_stop(small_pool, tmp_path):
  running = _start(small_pool, tmp_path / 'run', seed=0)
  codes, outputs = _finish(running)
  assert codes == [1, 1], outputs
  for output in outputs:
    assert 'config: not that of process 0 on 1' in output
  assert not (tmp_path / 'run').exists()
