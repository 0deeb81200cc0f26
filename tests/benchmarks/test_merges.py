"""The timing of merges: its models, workers and commands."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import merge_runs
from benchmarks import merge_worker
from benchmarks import merges_ours
from dam_jax import checkpoint

SHAPES = merge_runs.tower_shapes(24, 1)


@pytest.fixture
def folder(tmp_path):
  merge_runs.make_models(tmp_path, SHAPES, 2)
  return tmp_path


def read(path):
  model = checkpoint.open_model(path)
  return {name: model.read(name) for name in model.leaves}


def test_models_have_the_towers_size_and_are_the_same_again(folder, tmp_path):
  shapes = merge_runs.tower_shapes(768, 12)
  assert sum(map(math.prod, shapes.values())) == 87_849_216
  base, expert = (
    read(folder / f'{name}.safetensors') for name in ('base', 'expert_1')
  )
  assert {n.replace('/', '.'): x.shape for n, x in base.items()} == SHAPES
  for name, leaf in base.items():
    assert 5e-4 < np.std(expert[name] - leaf) < 2e-3
  merge_runs.make_models(tmp_path, SHAPES, 2)
  again = read(tmp_path / 'expert_1.safetensors')
  jax.tree.map(np.testing.assert_array_equal, expert, again)


@pytest.mark.parametrize(
  'form', ['stacked', 'donated', 'leaves', 'leaves_donated']
)
def test_every_form_merges_again_and_again(folder, form):
  merge = merges_ours.load(folder, 'average', form, 2, 1)
  paths = merge_worker.expert_paths(folder, 2)
  mean = {
    n: (x + y) / 2
    for (n, x), y in zip(
      read(paths[0]).items(), read(paths[1]).values(), strict=True
    )
  }
  checkpoint.save_params(folder / 'mean.safetensors', mean)
  for measure in (merge_worker.measure_first, merge_worker.measure):
    figures, params = measure(merge, merge.prepare())
    assert {'seconds', 'cpu'} <= set(figures)
    assert merge.difference(params, folder / 'mean.safetensors') < 2e-6
  off = merge.difference(params, folder / 'base.safetensors')
  assert off > 1e-3


def test_models_of_a_device_are_made_anew(folder):
  merge = merges_ours.load(folder, 'task_arithmetic', 'device', 3, 1)
  (first, experts), (second, _) = merge.prepare(), merge.prepare()
  assert {x.shape[0] for x in jax.tree.leaves(experts)} == {3}
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  assert not any(jax.tree.leaves(same))


def test_a_worker_answers_and_says_what_failed(tmp_path):
  with merge_runs.Worker(
    sys.executable, 'merge_worker', tmp_path, 'copy', '', 1000, 1
  ) as worker:
    assert worker.about == {'threads': 1}
    assert worker.ask('run')['seconds'] > 0
    with pytest.raises(RuntimeError, match='has no attribute'):
      worker.ask('nonsense')


def test_runs_take_turns_until_time_is_up():
  calls = []
  runs = [lambda i=i: calls.append(i) or {'seconds': i} for i in range(2)]
  found = merge_runs.alternate(runs, 3, 60)
  assert calls == [0, 1] * 3
  assert found == [[{'seconds': i}] * 3 for i in range(2)]
  assert [len(x) for x in merge_runs.alternate(runs, 3, 0)] == [1, 1]


def test_a_command_is_measured_or_its_error_shown(tmp_path):
  log = tmp_path / 'log'
  found = merge_runs.run_command(
    [sys.executable, '-c', 'sum(range(10 ** 6))'], log
  )
  assert set(found) == {'seconds', 'cpu', 'peak'}
  assert min(found.values()) > 0
  wrong = [sys.executable, '-c', 'raise ValueError("so it is")']
  with pytest.raises(RuntimeError, match='Error: so it is'):
    merge_runs.run_command(wrong, log)


def test_files_are_merged_and_figures_written(tmp_path):
  out = tmp_path / 'found.jsonl'
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.merges', '--parts=disk'),
      *('--methods=average', '--experts=2', '--repeats=1'),
      *('--width=24', '--layers=1', f'--json={out}'),
    ],
    cwd=merge_runs.ROOT,
    check=True,
  )
  found = json.loads(out.read_text())
  assert found['parameters'] == sum(map(math.prod, SHAPES.values()))
  [row] = found['rows']
  assert (row['part'], row['method'], row['experts']) == ('disk', 'average', 2)
  assert row['bytes'] == 4 * 4 * found['parameters']
  assert len(row['ours']) == 1
