"""The comparison with transformers' CLIP finds differences, and finds none."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import clip_problem as problem
from benchmarks import clip_runs
from benchmarks import records
from benchmarks import runs
from dam_jax import checkpoint
from dam_jax.models import convert


def test_error_is_by_the_largest_entry():
  theirs = np.array([1.0, -4.0], np.float32)
  assert clip_runs.error(theirs, theirs) == 0
  assert clip_runs.error(np.array([2.0, -4.0]), theirs) == 0.25
  with pytest.raises(ValueError, match=r'ours is \(1,\), theirs \(2,\)'):
    clip_runs.error(theirs[:1], theirs)


def test_gradients_of_key_biases_are_by_those_of_queries():
  names = 'a.k_proj.bias', 'a.q_proj.bias', 'a.fc1.bias'
  theirs = {name: np.full(3, 2.0) for name in names}
  theirs[names[0]] = np.full(3, 1e-9)
  ours = {**theirs, names[0]: np.full(3, -1e-9), names[2]: np.full(3, 3.0)}
  found = clip_runs.gradient_errors(ours, theirs)
  assert found == {names[0]: 1e-9, names[1]: 0, names[2]: 0.5}
  with pytest.raises(ValueError, match='other leaves: .*fc1'):
    clip_runs.gradient_errors(ours, {k: theirs[k] for k in names[:2]})


@pytest.mark.parametrize(
  ('error', 'limit', 'verdict'),
  [
    (0.0, 0.0, 'same'),
    (1e-5, 1e-5, 'same'),
    (2e-5, 1e-5, 'DIFFERS'),
    (float('nan'), 1e-5, 'DIFFERS'),
    (9.0, None, 'measured'),
  ],
)
def test_verdicts(error, limit, verdict):
  assert clip_runs.Row('a', 'b', error, limit).verdict == verdict


def test_leaves_have_the_names_and_layouts_of_the_file(tmp_path):
  kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
  params = {'text': {'text_projection': {'kernel': kernel}}}
  found = clip_runs.in_file(params, convert.clip)
  np.testing.assert_array_equal(found.pop('text_projection.weight'), kernel.T)
  assert not found


def test_problem_is_the_same_again_and_has_a_wrong_end():
  config = problem.GOLDEN['legacy']
  one, other = (problem.inputs(config, 3) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert (one['tokens'] == 2).any()
  assert (one['tokens'].max(axis=1) == problem.VOCABULARY - 1).all()
  assert one['by/texts'].shape == (3, 6)


def test_transformers_agrees(request, tmp_path):
  python = request.config.getoption('torch_python')
  if not python:
    pytest.skip('no environment with transformers: pass --torch_python=')
  out = tmp_path / 'out.jsonl'
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.clip_parity', '--quick'),
      *(f'--torch_python={python}', f'--out={out}'),
    ],
    cwd=runs.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  rows = records.read(str(out), 'clip_parity')
  assert {'same', 'measured'} == {row['verdict'] for row in rows}
  assert rows[0]['versions']['dam_jax'] == checkpoint.versions()
