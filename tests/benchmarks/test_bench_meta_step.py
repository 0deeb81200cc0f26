"""The timing of learned merges' steps: its problem, counts and command."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import records
from benchmarks import runs
from benchmarks import step_counts as counts
from benchmarks import step_problem as problem
from benchmarks import step_runs
from benchmarks import steps_ours
import dam_jax as dj
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import flops

NUM, BATCH = 2, 3
METHODS = (
  'adamerging_layer_wise',
  'concrete_layer_wise',
  'concrete_task_arithmetic',
  'dam_paper',
  'dam_released',
)


@pytest.mark.parametrize('model', problem.SIZES)
def test_shapes_are_those_of_the_tower(model):
  config = clip.VisionConfig(**problem.SIZES[model])
  pixels = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
  init = clip.VisionTower(config).init
  want = jax.eval_shape(init, jax.random.key(0), pixels)['params']
  shapes = problem.shapes(model)
  for path, leaf in dj.tree.flatten(want).items():
    shape = shapes.pop(convert.clip_vision.to_name(path))
    axes = convert.clip_vision.axes(path) or range(len(shape))
    assert tuple(shape[axis] for axis in axes) == leaf.shape
  assert not shapes


def test_our_parameters_are_those_that_peers_draw():
  base, experts = (x.unravel() for x in steps_ours.raveled('nano', NUM))
  assert dj.tree.check_stacked(base, experts) == NUM
  flat, stacked = dj.tree.flatten(base), dj.tree.flatten(experts)
  for name, shape in problem.shapes('nano').items():
    want, theirs = problem.leaf(name, shape, NUM)
    path = convert.clip_vision.to_path(name)
    axes = convert.clip_vision.axes(path) or range(len(shape))
    np.testing.assert_array_equal(flat[path], want.transpose(axes))
    for k in range(NUM):
      np.testing.assert_array_equal(stacked[path][k], theirs[k].transpose(axes))


def test_draws_are_the_same_again_and_differ_from_each_other():
  name, shape = 'vision_model.post_layernorm.weight', (300,)
  base, experts = problem.leaf(name, shape, 3)
  again, fewer = problem.leaf(name, shape, 2)
  np.testing.assert_array_equal(base, again)
  np.testing.assert_array_equal(experts[:2], fewer)
  assert abs(base.mean() - 1) < 0.01
  assert len({x.tobytes() for x in (base, *experts)}) == 4
  lead = (2, NUM, BATCH)
  images = [problem.images('nano', *lead, step) for step in (0, 0, 1)]
  np.testing.assert_array_equal(*images[:2])
  assert not np.array_equal(images[0], images[2])
  assert images[0].shape == (*lead, 32, 32, 3)
  assert 0 <= images[0].min() <= images[0].max() <= 1
  references = problem.references(*lead, 0)
  np.testing.assert_allclose(references.sum(-1), 1, rtol=1e-5)
  norms = np.linalg.norm(problem.heads('nano', NUM), axis=1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_experts_share_what_fusion_bench_does_not_merge():
  shape = problem.shapes('nano')[problem.PROJECTION]
  base, experts = problem.leaf(problem.PROJECTION, shape, NUM)
  np.testing.assert_array_equal(experts, np.stack([base] * NUM))


@pytest.fixture(scope='module')
def traced():
  """Says how to count a method's operations on what JAX traces."""
  models = steps_ours.raveled('nano', NUM)

  def args(learner):
    init = learner.merger.init
    state = jax.eval_shape(init, jax.random.key(0), *models)
    plan = learner.merger.plan
    images = problem.images('nano', plan.phases, NUM, learner.batch, 0)
    return state, *models, dj.Batch(jnp.asarray(images))

  return args


def counted(learner, part='flops', model='nano'):
  spec, total = learner.spec, 0
  for phase in steps_ours.phases(spec, NUM).values():
    found = counts.count(
      model,
      phase,
      num=NUM,
      batch=learner.batch,
      masks=len(spec.masks),
      itemsize=4,
    )
    total += found[part]
  return total


@pytest.mark.parametrize('method', METHODS)
def test_operations_are_those_of_the_products_that_are_traced(method, traced):
  learner = steps_ours.make_learner('nano', method, NUM, BATCH, 'float32')
  assert counted(learner) == flops.count(learner.merger.step, *traced(learner))


def test_operations_are_nearly_all_that_xla_counts(traced):
  learner = steps_ours.make_learner('nano', 'dam_paper', NUM, 64, 'float32')
  lowered = jax.jit(learner.merger.step).lower(*traced(learner))
  found = lowered.cost_analysis()['flops']
  # Beside products XLA counts what is done to entries, much in a small tower.
  assert 0.5 * found < counted(learner) < found


def test_an_image_takes_the_known_operations():
  forward, _ = counts.passes('vit_b32', counts.Phase(forward=1))
  weights, _ = counts.passes('vit_b32', counts.Phase(weights=1))
  inputs, _ = counts.passes('vit_b32', counts.Phase(inputs=1))
  # 8.8 GFLOP with all tokens of the last block, which features do not need.
  assert 8.0e9 < forward < 8.8e9
  assert 2.9 < weights / forward < 3
  assert 1.9 < inputs / forward < 2.1


def test_phases_end_with_the_whole_step():
  learner = steps_ours.make_learner('nano', 'dam_paper', NUM, BATCH, 'float32')
  parts = steps_ours.prefixes(learner.spec)
  assert list(parts) == ['inner', 'perturbation', 'masks']
  assert parts['masks'] is learner.spec
  assert [part.plan().phases for part in parts.values()] == [1, 2, 4]
  until = {
    name: [{'seconds': x}]
    for name, x in zip(parts, (1.0, 3.0, 7.0), strict=True)
  }
  assert step_runs.phase_seconds({'until': until}) == {
    'inner': 1.0,
    'perturbation': 2.0,
    'masks': 4.0,
  }


def test_figures_are_shares_of_what_the_machine_does():
  row = {
    'counted': {'a': {'flops': 30, 'bytes': 4}, 'b': {'flops': 10, 'bytes': 6}},
    'machine': {'flops': 100.0, 'bytes': 10.0},
    'ours': [{'seconds': 2.0}],
  }
  found = step_runs.figures(row, 'ours')
  assert found == pytest.approx({'mfu': 0.2, 'roofline': 0.5})


def test_differences_are_relative():
  ours = {'a/loss': 2.0, 'b/loss': 1.0, 'coefficients': {'v': [3.0], 'w': [4]}}
  peer = {'a/loss': 1.0, 'coefficients': {'w': [4.0], 'v': [3.5]}}
  found = problem.difference(ours, peer)
  assert found == pytest.approx({'a/loss': 0.5, 'coefficients': 0.1})


def test_a_peer_is_left_out_for_a_reason():
  row = {'method': 'dam_paper', 'platform': 'tpu'}
  missing = step_runs.missing
  assert missing('torch', '', row) == 'no --torch_python'
  assert missing('torch', 'python', row) == 'not on tpu'
  assert missing('fusion_bench', 'python', row) == 'no dam_paper'
  assert not missing('torch', 'python', row | {'platform': 'cpu'})


def measure(method, out, *more):
  subprocess.run(
    [
      *(sys.executable, '-m', 'benchmarks.bench_meta_step', '--quick'),
      *(f'--methods={method}', '--batch=2', '--repeats=2', f'--out={out}'),
      *more,
    ],
    cwd=runs.ROOT,
    check=True,
  )
  return records.read(str(out), 'meta_step')


def test_a_step_is_measured_and_written(tmp_path):
  [row] = measure('concrete_layer_wise', tmp_path / 'found.jsonl')
  assert (row['model'], row['experts'], row['batch']) == ('nano', 2, 2)
  assert len(row['ours']) == 2
  assert min(row['ours'][0].values()) > 0
  assert set(row['until']) == set(row['counted']) == {'inner', 'masks'}
  assert row['compile'] > 0
  assert row['first']['ours']['peak'] > 0
  assert row['xla']['temp'] > 0
  assert row['left_out'] == {
    'torch': 'no --torch_python',
    'fusion_bench': 'no --fusion_bench_python',
  }
  assert not math.isnan(step_runs.figures(row, 'ours')['mfu'])


def test_a_case_that_fails_is_written_and_named(tmp_path):
  out = tmp_path / 'found.jsonl'
  with pytest.raises(subprocess.CalledProcessError):
    measure('tea', out)
  [row] = records.read(str(out), 'meta_step')
  assert "unknown methods ['tea']" in row['failed']


@pytest.mark.parametrize(
  ('peer', 'method'),
  [('torch', 'adamerging_layer_wise'), ('fusion_bench', 'dam_released')],
)
def test_peers_take_the_same_step(peer, method, request, tmp_path, monkeypatch):
  python = request.config.getoption('fusion_bench_python')
  if not python:
    pytest.skip('no environment with fusion_bench: pass --fusion_bench_python')
  # What is compared does not depend on a compiler, and takes seconds without.
  monkeypatch.setenv('TORCHDYNAMO_DISABLE', '1')
  out = tmp_path / 'found.jsonl'
  [row] = measure(method, out, f'--{peer}_python={python}', '--nophases')
  assert max(row[f'{peer}_difference'].values()) < 1e-3
  assert 'coefficients' in row[f'{peer}_difference']
  assert len(row[peer]) == 2
