"""The comparison with other tools: it finds differences, and finds none."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity_cases
from benchmarks import parity_runs
from benchmarks import records
from benchmarks import runs
from benchmarks.parity_cases import Case
import dam_jax as dj
from dam_jax import checkpoint

SUM = functools.partial(dj.task_arithmetic, 0.3)
PEER = parity_cases.mergekit('task_arithmetic', weight=1.0, lambda_=0.3)


def sums(scale):
  """Makes a peer in this process, which merges by task arithmetic."""

  def run_peer(name, python, folder, jobs):
    for job in jobs:
      models = parity_runs.load_models(folder / job['folder'])
      merged = dj.merge(dj.task_arithmetic(scale), *models).params
      checkpoint.save_params(
        folder / 'merged' / f'{job["out"]}.safetensors', merged
      )
    return {name: python}

  return run_peer


@pytest.fixture
def peer(monkeypatch):
  monkeypatch.setattr(parity_runs, 'run_peer', sums(0.3))


def verdict(case, folder):
  [row], _ = parity_runs.compare([case], {'mergekit': 'python'}, folder, 1)
  return row.verdict


@pytest.mark.parametrize('kind', parity_runs.EXPERTS)
def test_problem_is_the_same_again(kind, tmp_path):
  for name in ('a', 'b'):
    parity_runs.make_problem(tmp_path / name, kind, 3)
  base, experts = parity_runs.load_models(tmp_path / 'a')
  assert set(dj.tree.names(base)) == set(parity_runs.SHAPES)
  assert dj.tree.check_stacked(base, experts) == parity_runs.EXPERTS[kind]
  again = parity_runs.load_models(tmp_path / 'b')
  jax.tree.map(np.testing.assert_array_equal, (base, experts), again)
  for name in ('uniform', 'fisher'):
    given = parity_runs.load(tmp_path / 'a' / f'{name}.safetensors')
    assert not dj.tree.differences(base, given, leading=1)


def deltas(folder, kind):
  parity_runs.make_problem(folder, kind, 0)
  return dj.tree.flatten(dj.tree.task_vectors(*parity_runs.load_models(folder)))


def test_problems_have_what_methods_disagree_on(tmp_path):
  tied = deltas(tmp_path / 'tied', 'tied')['embed/weight']
  moved = np.asarray(tied[np.abs(tied) > 0])
  assert len(np.unique(np.abs(moved))) < moved.size / 2
  assert ((tied.sum(0) == 0) & (tied != 0).any(0)).any()
  still = deltas(tmp_path / 'still', 'still')
  moved = {name: (x != 0).any(range(1, x.ndim)) for name, x in still.items()}
  assert not moved['embed/weight'].any()
  assert moved['layers/2/square/weight'].tolist() == [False, True, True]


def test_difference_is_the_largest_of_any_leaf():
  peer = {'a': jnp.array([1.0, -4.0]), 'b': jnp.zeros(2)}
  same = parity_runs.difference(peer, peer, 0.0)
  assert same.error == same.entries == 0
  ours = {'a': jnp.array([2.0, -4.0]), 'b': jnp.array([0.125, 0.0])}
  found = parity_runs.difference(ours, peer, 0.2)
  assert found == (0.25, 'a', 1)
  assert parity_runs.difference(ours, peer, 0.1).entries == 2


def test_difference_takes_what_is_not_finite_literally():
  nan, one = {'a': jnp.array([np.nan, 1.0])}, {'a': jnp.ones(2)}
  assert parity_runs.difference(nan, nan, 0.0).error == 0
  assert parity_runs.difference(one, nan, 0.0).error == np.inf
  assert parity_runs.difference(nan, one, 0.0).error == np.inf


def test_difference_needs_the_same_leaves():
  with pytest.raises(ValueError, match='b: missing'):
    parity_runs.difference({'a': jnp.ones(1)}, {'b': jnp.ones(1)}, 0.0)


def test_verdicts(peer, tmp_path):
  case = functools.partial(Case, 'task_arithmetic', PEER, problems=('tied',))
  wrong = functools.partial(dj.task_arithmetic, 0.3001)
  assert verdict(case(SUM), tmp_path) == 'same'
  assert verdict(case(SUM, gap='none'), tmp_path) == 'GAP CLOSED'
  assert verdict(case(wrong), tmp_path) == 'DIFFERS'
  assert verdict(case(wrong, gap='scale'), tmp_path) == 'known gap'
  assert verdict(case(None), tmp_path) == 'peer only'


def test_ours_drops_what_the_draws_say(tmp_path):
  parity_runs.make_problem(tmp_path, 'plain', 0)
  base, experts = parity_runs.load_models(tmp_path)
  uniform = parity_runs.load(tmp_path / 'uniform.safetensors')
  drop = functools.partial(parity_cases.dropped, 0.5, then=dj.average)
  case = Case('dare', PEER, drop, given=parity_cases.DRAWS)
  merged = parity_runs.merge_ours(case)(base, experts, {'uniform': uniform})
  want = jax.tree.map(
    lambda b, e, u: b + jnp.where(u > 0.5, 2 * (e - b[None]), 0).mean(0),
    base,
    experts,
    uniform,
  )
  assert parity_runs.difference(merged, want, 0.0).error < 1e-6


def test_ours_may_be_a_function_of_models(peer, tmp_path):
  def merge(base, experts):
    return dj.merge(SUM(), base, experts).params

  case = Case('task_arithmetic', PEER, functools.partial(lambda: merge))
  assert verdict(case, tmp_path) == 'same'


PROGRAM = """
import json, pathlib, sys
from safetensors.numpy import load_file, save_file
_, _, _, folder, name = sys.argv
folder, scale = pathlib.Path(folder), {scale}
(folder / 'merged').mkdir()
for job in json.loads((folder / f'{{name}}.jobs.json').read_text()):
  paths = sorted((folder / job['folder']).glob('expert_*.safetensors'))
  base = load_file(paths[0].with_name('base.safetensors'))
  weights = job['options']['weight']
  if not isinstance(weights, list):
    weights = [weights * scale] * len(paths)
  merged = dict(base)
  for weight, path in zip(weights, paths):
    for leaf, x in load_file(path).items():
      merged[leaf] = merged[leaf] + weight * (x - base[leaf])
  save_file(merged, folder / 'merged' / f"{{job['out']}}.safetensors")
(folder / f'{{name}}.versions.json').write_text(json.dumps({{name: 'mine'}}))
"""


def command(folder, *argv, scale=0.3):
  """Runs the command beside a peer that is a script in a folder."""
  peer, python = folder / 'peer.py', folder / 'python'
  peer.write_text(PROGRAM.format(scale=scale))
  python.write_text(f'#!/bin/sh\nexec {sys.executable} {peer} "$@"\n')
  python.chmod(0o755)
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks.parity', *argv],
    cwd=runs.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )


@pytest.mark.parametrize('scale', [0.3, 0.31])
def test_command_fails_where_a_case_differs(scale, tmp_path):
  out = tmp_path / 'out.jsonl'
  done = command(
    *(tmp_path, f'--mergekit_python={tmp_path / "python"}', '--quick'),
    *(f'--out={out}', '--methods=task_arithmetic'),
    scale=scale,
  )
  assert done.returncode == (0 if scale == 0.3 else 1), done.stdout
  said = 'same' if scale == 0.3 else 'DIFFERS'
  row, other = records.read(str(out), 'parity')
  assert (row['verdict'], other['verdict']) == (said, 'same')
  assert (row['program'], row['seeds']) == ('mergekit', 1)
  assert row['versions']['mergekit'] == {'mergekit': 'mine'}
  assert f'1 {said}' in done.stdout or '2 same' in done.stdout


def test_command_needs_a_peer(tmp_path):
  done = command(tmp_path)
  assert done.returncode
  assert 'give --fusion_bench_python' in done.stdout


def test_failing_peer_says_what_it_printed(tmp_path):
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho no package; exit 3')
  python.chmod(0o755)
  with pytest.raises(RuntimeError, match='mergekit failed in .*\nno package'):
    parity_runs.run_peer('mergekit', str(python), tmp_path, [])


def test_missing_python_is_named(tmp_path):
  with pytest.raises(ValueError, match='no such program: nowhere/python'):
    parity_runs.run_peer('mergekit', 'nowhere/python', tmp_path, [])


def test_unknown_method_is_named():
  with pytest.raises(
    ValueError, match='no such method: tea; there are average'
  ):
    parity_runs.select('ties,tea', ['mergekit'])


def test_cases_can_be_written_down():
  assert parity_runs.describe(PEER) == 'task_arithmetic(weight=1, lambda=0.3)'
  for case in parity_cases.CASES:
    json.dumps(case.peer.options)
    assert set(case.problems) <= set(parity_runs.EXPERTS)
    assert case.ours is None or parity_runs.describe(case.ours)
    assert not case.gap or case.ours
  assert parity_runs.select('all', ['mergekit', 'fusion_bench']) == list(
    parity_cases.CASES
  )


@pytest.mark.parametrize('name', ['fusion_bench', 'mergekit'])
def test_peer_agrees(name, request, tmp_path):
  python = request.config.getoption(f'{name}_python')
  if not python:
    pytest.skip(f'no environment with {name}: pass --{name}_python=<python>')
  cases = parity_runs.select('average,task_arithmetic,ties,dare,slerp', [name])
  rows, versions = parity_runs.compare(cases, {name: python}, tmp_path, 1)
  assert versions[name]['torch']
  assert [row for row in rows if row.verdict in parity_runs.FAILURES] == []
