"""Defences as merges: what they read, and how long they may take."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import pool as pool_config
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import defences
from dam_jax.models import convert
from experiments import load
from experiments import merge
from experiments import merge_run
from experiments import methods
from experiments import repairs


def _config(folder, **changes):
  config = pool_config.get_config()
  given = {
    'pool': str(folder),
    'bad': 'evil',
    'steps': 2,
    'batch': 4,
    'test_batch': 12,
    'transfer_test': 0,
    'audit': False,
    'compiler_options': {},
  }
  config.update(given | changes)
  config.options.ibvs.rate = 0.5
  return config


@pytest.fixture(scope='module')
def setup(small_pool):
  return load.load(_config(small_pool), small_pool)


@pytest.fixture(scope='module')
def done(small_pool, tmp_path_factory):
  """A run of all repairs: its workdir and report."""
  workdir = tmp_path_factory.mktemp('run')
  config = _config(small_pool, methods='repairs')
  console = Console(file=io.StringIO(), width=120)
  return workdir, merge.run(config, workdir, console)


@pytest.mark.parametrize('name', repairs.BUILDERS)
def test_every_repair_changes_the_plain_merge_and_is_measured(done, name):
  workdir, report = done
  rows = {(r['method'], r['metric'], r['task']): r for r in report['rows']}
  assert (name, 'asr', 'two') in rows
  assert (name, 'der', 'two') in rows
  assert report['record']['seconds'][name]['total'] > 0

  def params(method):
    return checkpoint.load_params(
      workdir / 'models' / method / 'model.safetensors',
      name_map=convert.clip_vision,
    )

  moved = [
    float(np.abs(a - b).max())
    for a, b in zip(
      *(jax.tree.leaves(params(m)) for m in (name, merge_run.PLAIN)),
      strict=True,
    )
  ]
  assert np.isfinite(moved).all()
  if name not in ('clp', 'anp'):  # which may find nothing to prune
    assert max(moved) > 0


def test_wag_averages_the_experts_not_the_plain_merge(done, setup):
  params = checkpoint.load_params(
    done[0] / 'models' / 'wag' / 'model.safetensors',
    name_map=convert.clip_vision,
  )
  want = dj.merge(dj.average(), setup.base, setup.experts).params
  for a, b in zip(*map(jax.tree.leaves, (params, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_defences_get_what_they_read_and_no_more(setup):
  assert repairs.data(setup, defences.NoData) == ()
  unlabelled = repairs.data(setup, defences.Unlabelled)
  labelled = repairs.data(setup, defences.Labelled)
  assert not hasattr(unlabelled, 'labels')
  assert labelled.images.shape == (3, 8, 8, 8, 3)
  for t, task in enumerate(setup.pool.tasks):
    np.testing.assert_array_equal(labelled.labels[t], task.dev.labels)
    np.testing.assert_allclose(
      255 * labelled.images[t], task.dev.images, atol=1e-3
    )


def test_table_says_what_each_reads():
  want = {
    'clp': 'none',
    'wag': 'none',
    'repo_awm': 'unlabelled',
    'repo_sau': 'unlabelled',
  }
  for name in repairs.BUILDERS:
    assert methods.reads(name) == want.get(name, 'labelled clean')
  assert methods.reads('ties') == 'none'
  assert methods.reads('dam_robust') == 'unlabelled'


@pytest.mark.parametrize(
  ('name', 'steps', 'want'),
  [
    ('anp', 30, {'steps': 30}),
    ('anp', 9000, {'steps': 2000}),
    ('sau', 30, {'rounds': 10}),
    ('awm', 30, {'rounds': 2}),
    ('awm', 1, {'rounds': 1}),
    ('clp', 30, {}),
    ('sau', 0, {'rounds': 100}),
  ],
)
def test_steps_bound_every_loop(name, steps, want):
  chosen = methods.resolve([name], {}, steps=steps, batch=4, images=10)[name]
  assert {k: chosen.get(k) for k in want} == want
  assert chosen.get('batch', 4) == 4


def test_masks_of_a_repair_start_from_the_plain_merge(setup):
  options = methods.resolve(['repo_awm'], {}, steps=2, batch=4)['repo_awm']
  plain = dj.task_arithmetic(0.3)
  merger = repairs.merger('repo_awm', setup, options, plain)
  merged = dj.merge(plain, setup.base, setup.experts).params
  state = merger.init(jax.random.key(0), setup.base, setup.experts)
  # A mask that lets all through, with the rescale at its own mean.
  masks = jax.tree.map(lambda x: x + 50, state.masks)
  found = merger.finalize(
    state._replace(masks=masks), setup.base, setup.experts
  )
  for a, b in zip(*map(jax.tree.leaves, (found, merged)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_options_are_checked_before_any_work(small_pool, tmp_path):
  config = _config(small_pool, methods='anp')
  config.options.anp.eps = -1.0
  with pytest.raises(ValueError, match='eps must be at least 0, got -1'):
    merge.run(config, tmp_path, Console(file=io.StringIO()))
  assert not (tmp_path / 'results').exists()
