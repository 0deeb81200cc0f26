"""The timing of merges: its models, forms and command."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import merge_cases
from benchmarks import merge_runs
from benchmarks import merges_numpy
from benchmarks import merges_ours
from benchmarks import records
from benchmarks import runs
from benchmarks import worker
from dam_jax import catalogue
from dam_jax import checkpoint

SHAPES = merge_runs.tower_shapes(24, 1)


@pytest.fixture
def folder(tmp_path):
  merge_runs.make_models(tmp_path, SHAPES, 2)
  return tmp_path


def load(folder, method, form, num):
  return merges_ours.load(
    **{'folder': str(folder), 'method': method, 'variant': ''},
    **{'form': form, 'num': num, 'threads': 1},
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
  assert difference(str(paths[0])) > 1e-3


def test_models_of_a_device_are_made_anew(folder):
  merge = load(folder, 'task_arithmetic', 'device', 3)
  (first, experts), (second, _) = merge.prepare(), merge.prepare()
  assert {x.shape[0] for x in jax.tree.leaves(experts)} == {3}
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  assert not any(jax.tree.leaves(same))


def test_what_is_timed_is_every_merge_of_the_catalogue():
  known = list(catalogue.DATA_FREE)
  plan = merge_cases.load(methods=['all'], experts=[2, 20]).about['plan']
  json.dumps(plan)
  assert list(dict.fromkeys(case['method'] for case in plan[2])) == known
  only_pairs = {'slerp', 'nuslerp'}
  assert {case['method'] for case in plan[20]} == {*known} - only_pairs
  for case in plan[2]:
    entry = catalogue.DATA_FREE[case['method']]
    compared = {'FusionBench': 'fusion_bench', 'mergekit': 'mergekit'}
    for said, peer in compared.items():
      cases = [c for c in plan[2] if c['method'] == case['method']]
      assert (said in entry.tested) == any(peer in c['peers'] for c in cases)
    # What the command is told makes the merge.
    catalogue.build(case['method'], case['options'])
  unknown = merge_cases.load(methods=['tea', 'ties'], experts=[2]).about
  assert unknown['unknown'] == ['tea']


def test_weights_are_those_of_as_many_experts():
  [variant] = merge_cases.variants('weighted_average', 5)
  assert variant.ours.args == ((0.5, 0.3, 0.4, 0.5, 0.3),)
  for case in variant.cases.values():
    [weights] = [
      case.peer.options[x]
      for x in ('weight', 'weights')
      if x in case.peer.options
    ]
    assert weights == variant.ours.args[0]


def test_options_say_what_is_merged():
  def settled(method, name=''):
    return merge_cases.options(merge_cases.find(method, name, 2).ours)

  assert settled('task_arithmetic') == {'scale': 0.3}
  assert settled('wudi')['others'] == 'average'
  dare = settled('dare', 'as mergekit')
  assert (dare['rescale'], dare['then.scale']) == ('l1', 0.3)
  assert settled('emr') is None


@pytest.mark.parametrize('method', ['average', 'task_arithmetic'])
def test_numpy_merges_alike(folder, method):
  options = {'scale': 0.3} if method == 'task_arithmetic' else {}
  job = merges_numpy.load(
    folder=str(folder), method=method, options=options, num=2
  )
  path = str(folder / 'numpy.safetensors')
  job.requests['save'](job.run(job.prepare()), path)
  ours = load(folder, method, 'stacked', 2)
  merged = ours.run(ours.prepare())
  assert ours.requests['difference'](merged, path) < merge_cases.TOLERANCE


def test_each_task_has_its_own_model(folder):
  ours = load(folder, 'emr', 'stacked', 2)
  leaves = jax.tree.leaves(ours.run(ours.prepare()))
  assert {x.shape[0] for x in leaves} == {2}


def test_mergekit_gets_a_weight_for_each_expert(tmp_path):
  peer = {
    'method': 'linear',
    'options': {'weight': [0.5, 0.3], 'normalize': True},
    'inputs': 'first',
  }
  out = tmp_path / 'peer'
  argv = merge_runs.mergekit_argv('bin/python', tmp_path, 2, peer, out, 3)
  assert argv[0] == 'bin/mergekit-pytorch'
  config = json.loads((tmp_path / 'peer.yml').read_text())
  assert config['parameters'] == {'normalize': True}
  assert [x['parameters']['weight'] for x in config['models']] == [0.5, 0.3]
  assert config['base_model'] == config['models'][0]['model']


def test_a_difference_or_a_gap_is_said():
  row = {
    **{'part': 'memory', 'says': 'average()', 'experts': 2, 'form': 'stacked'},
    **{'tolerance': 1e-5, 'peers': {'numpy': {'difference': 1e-3}}},
  }
  assert 'differs from numpy by 1.0e-03' in merge_runs.wrong([row])[0]
  row['peers']['numpy']['difference'] = float('nan')
  assert merge_runs.wrong([row])
  row['peers']['numpy']['difference'] = 1e-6
  assert merge_runs.wrong([row]) == []
  needed = merge_runs.models_needed
  assert needed('ours', 'ties', 'leaves', 20) < needed(
    'ours', 'ties', 'stacked', 20
  )


def command(out, *argv):
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_merge'),
      *('--width=24', '--layers=1', '--repeats=1', f'--out={out}', *argv),
    ],
    cwd=runs.ROOT,
    check=True,
  )
  return records.read(str(out), 'merge')


def test_files_are_merged_and_figures_written(tmp_path):
  [row] = command(
    *(tmp_path / 'found.jsonl', '--parts=disk', '--methods=average'),
    '--experts=2',
  )
  assert row['parameters'] == sum(map(math.prod, SHAPES.values()))
  assert (row['part'], row['method'], row['experts']) == ('disk', 'average', 2)
  assert row['bytes'] == 4 * 4 * row['parameters']
  assert len(row['ours']) == len(row['copy']) == 1


def test_processes_may_be_used_again(tmp_path):
  rows = command(
    *(tmp_path / 'found.jsonl', '--quick', '--parts=memory'),
    *('--methods=average,pcb', '--experts=2,3', '--forms=donated'),
  )
  assert [(r['method'], r['experts']) for r in rows] == [
    *(('average', 2), ('pcb', 2)),
    *(('average', 3), ('pcb', 3)),
  ]
  for row in rows:
    assert row['first']['held'] > 0
    assert list(row.get('peers', {})) == ['numpy'] * (row['method'] != 'pcb')
