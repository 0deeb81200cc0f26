"""The timing of merges: its models, forms and command."""

import functools
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import merge_runs
from benchmarks import merges_ours
from benchmarks import records
from benchmarks import runs
from benchmarks import worker
from dam_jax import checkpoint

SHAPES = merge_runs.tower_shapes(24, 1)


@pytest.fixture
def folder(tmp_path):
  merge_runs.make_models(tmp_path, SHAPES, 2)
  return tmp_path


def load(folder, method, form, num):
  return merges_ours.load(
    folder=str(folder), method=method, form=form, num=num, threads=1
  )


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
  merge = load(folder, 'average', form, 2)
  paths = merge_runs.expert_paths(folder, 2)
  mean = {
    n: (x + y) / 2
    for (n, x), y in zip(
      read(paths[0]).items(), read(paths[1]).values(), strict=True
    )
  }
  checkpoint.save_params(folder / 'mean.safetensors', mean)
  for measure in (worker.measure_first, worker.measure):
    figures, params = measure(merge, merge.prepare())
    assert {'seconds', 'cpu'} <= set(figures)
    difference = functools.partial(merge.requests['difference'], params)
    assert difference(str(folder / 'mean.safetensors')) < 2e-6
  assert difference(str(folder / 'base.safetensors')) > 1e-3


def test_models_of_a_device_are_made_anew(folder):
  merge = load(folder, 'task_arithmetic', 'device', 3)
  (first, experts), (second, _) = merge.prepare(), merge.prepare()
  assert {x.shape[0] for x in jax.tree.leaves(experts)} == {3}
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  assert not any(jax.tree.leaves(same))


def test_files_are_merged_and_figures_written(tmp_path):
  out = tmp_path / 'found.jsonl'
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_merge', '--parts=disk'),
      *('--methods=average', '--experts=2', '--repeats=1'),
      *('--width=24', '--layers=1', f'--out={out}'),
    ],
    cwd=runs.ROOT,
    check=True,
  )
  [row] = records.read(str(out), 'merge')
  assert row['parameters'] == sum(map(math.prod, SHAPES.values()))
  assert (row['part'], row['method'], row['experts']) == ('disk', 'average', 2)
  assert row['bytes'] == 4 * 4 * row['parameters']
  assert len(row['ours']) == 1
