"""The study: its cells, its sums, and that it goes on where it was."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from configs import study as study_config
from experiments import cells
from experiments import merge
from experiments import merge_run
from experiments import study
from experiments import study_report


@pytest.fixture(scope='module')
def pool(small_pool, tmp_path_factory):
  """The small pool, its bad expert as two uploads of an attack."""
  folder = tmp_path_factory.mktemp('study') / 'pool'
  shutil.copytree(small_pool, folder)
  for name in ('badnets_two_0', 'badnets_two_1'):
    for part, ext in (('checkpoints', 'safetensors'), ('triggers', 'npz')):
      shutil.copy(
        folder / part / f'evil.{ext}', folder / part / f'{name}.{ext}'
      )
  return folder


def _config(pool, **changes):
  config = study_config.get_config('runlocal')
  config.update(
    {
      'pool': str(pool),
      'nano_pool': str(pool),
      'sections': 'succession,transfer',
      'attacks': 'badnets',
      'attacked': 'two',
      'attack_seeds': 2,
      'merge_seeds': 2,
      'methods': 'average,dare',
      'tasks': 'one,two',
      'bad': 'evil',
      'bad_counts': '0,1',
      'task_counts': '2,3',
      'task_order': 'two,one,three',
      'task_bad': 'evil',
      'number_methods': 'average',
      'dev': 0,
      'test': 0,
      'transfer_test': 12,
      'steps': 2,
      'batch': 2,
      **changes,
    }
  )
  return config


def _quiet():
  return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope='module')
def done(pool, tmp_path_factory):
  """A study's config, workdir and what it found."""
  workdir = tmp_path_factory.mktemp('run')
  config = _config(pool)
  return config, workdir, study.run(config, workdir, _quiet())


def test_random_merges_alone_run_with_every_seed(pool):
  found = cells.make(_config(pool))
  assert [(c.upload, c.seed, tuple(c.methods)) for c in found] == [
    (upload, seed, methods)
    for upload in (0, 1)
    for seed, methods in (
      (0, ('task_arithmetic', 'average', 'dare')),
      (1, ('dare',)),
    )
  ]
  assert [c.changes['bad'] for c in found[::2]] == [
    'badnets_two_0',
    'badnets_two_1',
  ]
  assert found[1].changes['options.dare.seed'] == 1


def test_bad_experts_and_tasks_are_counted(pool):
  found = cells.make(_config(pool, sections='number', merge_seeds=1))
  assert [
    (c.group, c.x, c.changes['bad'], c.changes['tasks']) for c in found
  ] == [
    ('0 bad of 2', 0, '0', 'one,two'),
    ('1 bad of 2', 1, 'evil', 'one,two'),
    ('1 bad of 2 tasks', 2, 'evil', 'two,one'),
    ('1 bad of 3 tasks', 3, 'evil', 'two,one,three'),
  ]
  # Without a bad expert, its trigger is still measured.
  assert found[0].changes['triggers'] == 'evil'


def test_an_ablation_departs_from_the_usual_options(pool):
  config = _config(pool, sections='ablation', ablation_attacks='badnets')
  found = cells.make(config)
  assert {row for c in found for row in c.rows.values()} == {*cells.ABLATION}
  only = next(c for c in found if 'dam_paper, M2 only' in c.rows.values())
  own = cells.merge_config(config, only)
  assert tuple(own.options.dam_paper.masks) == ('safety',)
  assert own.options.dam_paper['update'] == 'alternate'


def test_all_that_a_study_lacks_is_said_at_once(pool, tmp_path):
  config = _config(pool, attacks='sig', tasks='one,four', sections='all')
  config.defence_attacks = config.ablation_attacks = 'badnets'
  config.curve_attacks = config.adaptive_attacks = 'badnets'
  with pytest.raises(ValueError, match='the study lacks') as error:
    study.run(config, tmp_path, _quiet())
  for missing in ('sig_two_0.safetensors', 'sig_two_1.npz', 'four.npz'):
    assert missing in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sections': 'everything'}, "unknown section 'everything'"),
    ({'sections': ''}, 'no section'),
    ({'safety_weights': '1,a'}, 'safety_weights must be numbers'),
    ({'draws': 0}, 'draws must be positive, got 0'),
    ({'nano_pool': '/nowhere'}, '/nowhere: no such folder'),
    ({'sections': 'number', 'bad_counts': '3'}, '3 of bad, which has 1'),
    ({'methods': 'best'}, 'best'),
  ],
)
def test_configs_that_make_no_sense(pool, changes, message):
  with pytest.raises(ValueError, match=message):
    cells.make(_config(pool, **changes))


def _rates(workdir, method, upload, seeds=(0,)):
  """Returns ACC of each task and ASR of the attacked one in the cells."""
  found = []
  for seed in seeds:
    folder = workdir / 'cells' / f'succession-badnets-two-{upload}-s{seed}'
    rows = json.loads((folder / 'report.json').read_text())['rows']
    values = {
      (r['metric'], r['task']): r['value']
      for r in rows
      if r['method'] == method
    }
    acc = [values['acc', task] for task in ('one', 'two', 'three')]
    found.append((np.mean(acc), values['asr', 'two']))
  return np.mean(found, axis=0)


@pytest.mark.parametrize(('method', 'runs'), [('average', 2), ('dare', 4)])
def test_tables_average_what_the_cells_measured(done, method, runs):
  _, workdir, found = done
  (row,) = (r for r in found['tables']['succession'] if r['row'] == method)
  seeds = range(runs // 2)
  want = np.mean([_rates(workdir, method, i, seeds) for i in (0, 1)], axis=0)
  plain = np.mean([_rates(workdir, merge_run.PLAIN, i) for i in (0, 1)], axis=0)
  assert row['runs'] == runs
  np.testing.assert_allclose([row['acc'][0], row['asr'][0]], want, atol=1e-6)
  np.testing.assert_allclose(
    [row['acc_plain'][0], row['asr_plain'][0]], want - plain, atol=1e-6
  )
  for value, low, high in (row['acc'], row['asr'], row['asr_floor']):
    assert low <= value <= high
  assert row['asr'][2] - row['asr'][1] > 0.2  # of nine images


def test_a_study_has_tables_pictures_and_a_page(done):
  _, workdir, found = done
  assert not found['failed']
  assert json.loads((workdir / 'study.json').read_text()) == found
  text = (workdir / 'study.md').read_text()
  for title in (cells.SECTIONS['succession'], cells.SECTIONS['transfer']):
    assert f'## {title}' in text
  assert '| badnets | *merge of clean experts* |' in text
  page = (workdir / 'study.html').read_text()
  assert 'src="data:image/png' in page
  assert 'src="http' not in page
  assert 'href="http' not in page
  picture = (workdir / 'pictures' / 'succession_0.png').read_bytes()
  assert picture.startswith(b'\x89PNG')


def test_a_study_goes_on_where_it_was(done, monkeypatch):
  config, workdir, found = done
  lost = workdir / 'cells' / 'succession-badnets-two-1-s1'
  (lost / 'report.json').unlink()
  ran, run = [], merge.run

  def count(config, folder, console, *, audits):
    assert audits == workdir / 'suspects'
    ran.append(folder.name)
    return run(config, folder, console, audits=audits)

  monkeypatch.setattr(merge, 'run', count)
  again = study.run(config, workdir, _quiet())
  assert ran == [lost.name]
  assert again['tables'] == found['tables']


def test_another_study_is_refused(done):
  config, workdir, _ = done
  changed = config.copy_and_resolve_references()
  changed.test = 11
  with pytest.raises(ValueError, match='hold runs with another config'):
    study.run(changed, workdir, _quiet())


def test_a_cell_that_fails_is_reported_and_no_more(pool, tmp_path, monkeypatch):
  run = merge.run

  def fail(config, folder, console, *, audits):
    if config.bad == 'badnets_two_0':
      raise FloatingPointError('loss is nan')
    return run(config, folder, console, audits=audits)

  monkeypatch.setattr(merge, 'run', fail)
  config = _config(pool, sections='succession', methods='average')
  found = study.run(config, tmp_path, _quiet())
  assert found['failed'] == [
    {
      'cell': 'succession-badnets-two-0-s0',
      'error': 'FloatingPointError: loss is nan',
    }
  ]
  assert (
    '`succession-badnets-two-0-s0`: FloatingPointError'
    in (tmp_path / 'study.md').read_text()
  )
  assert found['tables']['succession'][0]['runs'] == 1


def _run(row, upload, seed, hits, task='two'):
  cell = cells.Cell(
    section='curve',
    name=f'{row}{upload}{seed}',
    group='badnets',
    x=1.0,
    task=task,
    upload=upload,
    seed=seed,
    methods=['dam_robust'],
    changes={},
    rows={'dam_robust': row},
  )
  hits = {'acc': {task: np.asarray(hits, np.float32)}}
  seconds = {'steps': 3, 'total': 2.0}
  return study_report.Run(cell=cell, row=row, hits=hits, seconds=seconds)


def test_gains_are_paired_with_the_same_upload():
  """Uploads differ much, methods little: only pairs see the difference."""
  runs = []
  for upload in range(3):
    easy = np.arange(200) < 60 * (upload + 1)
    worse = easy & (np.arange(200) % 60 > 3)
    runs.append(_run('dam_robust', upload, 0, worse))
    plain = _run('dam_robust', upload, 0, easy)
    runs.append(dataclasses.replace(plain, row=merge_run.PLAIN))
  found = study_report.tables(runs, ['curve'], seed=0, draws=500)['curve']
  (row,) = (r for r in found if r['row'] == 'dam_robust')
  value, low, high = row['acc_plain']
  assert value < 0
  assert high < 0
  assert high - low < 0.5 * (row['acc'][2] - row['acc'][1])
