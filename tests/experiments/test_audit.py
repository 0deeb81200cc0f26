"""Uploads audited one by one, and the experts of a merge."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import audit as audit_config
from configs import pool as pool_config
from dam_jax import distributed
from dam_jax.data import tasks as tasks_lib
from experiments import audit
from experiments import load
from experiments import merge
from experiments import suspects
from experiments import uploads


def _config(folder, **changes):
  config = audit_config.get_config('runlocal')
  config.update({'pool': str(folder), 'images': 8, **changes})
  return config


def _run(config, workdir):
  return audit.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def done(small_pool, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('audit')
  return workdir, _run(_config(small_pool), workdir)


def test_every_upload_is_audited_and_shown(done, small_pool):
  workdir, out = done
  rows = {r['model']: r for r in out['rows']}
  assert {*rows} == {'clean_one', 'clean_two', 'clean_three', 'evil'}
  assert [rows[n]['known'] for n in ('evil', 'clean_one')] == ['bad', 'clean']
  task = tasks_lib.load_pool(small_pool, bad=['evil']).triggers['evil'].task
  assert rows['evil']['task'] == task
  scores = [r['suspicion'] for r in out['rows']]
  assert scores == sorted(scores, reverse=True)
  evil, *clean = (
    rows[n]['suspicion']
    for n in ('evil', 'clean_one', 'clean_two', 'clean_three')
  )
  beaten = [0.5 * (evil >= x) + 0.5 * (evil > x) for x in clean]
  assert out['auc'] == pytest.approx(np.mean(beaten))
  page = (workdir / 'audit.html').read_text()
  for name in rows:
    assert name in page
    assert name in (workdir / 'audit.md').read_text()
  assert page.count('data:image/png;base64,') == 2
  for row in rows.values():
    kinds = {kind: row[f'suspicion_{kind}'] for kind in ('patch', 'warp')}
    assert row['suspicion'] == max(kinds.values()) == kinds[row['kind']]
    assert (row['area'] is None) == (row['kind'] == 'warp')


def test_an_upload_that_was_audited_is_not_audited_again(done, small_pool):
  workdir, out = done
  path = workdir / 'audit.json'
  held = json.loads(path.read_text())
  held['rows'] = [
    r | {'seconds': -1.0} for r in held['rows'] if r['model'] != 'evil'
  ]
  path.write_text(json.dumps(held))
  again = {r['model']: r for r in _run(_config(small_pool), workdir)['rows']}
  assert again['clean_one']['seconds'] == -1
  evil = next(r for r in out['rows'] if r['model'] == 'evil')
  assert again['evil'] | {'seconds': 0} == evil | {'seconds': 0}
  with pytest.raises(ValueError, match='another config'):
    _run(_config(small_pool, seed=1), workdir)


def test_what_is_wrong_is_said_at_once(small_pool, tmp_path):
  with pytest.raises(ValueError, match='batch must be.*\n.*keep must be'):
    _run(_config(small_pool, keep=0, batch=0), tmp_path)
  with pytest.raises(ValueError, match='nobody: no such checkpoint'):
    _run(_config(small_pool, models='nobody,clean_one'), tmp_path)


def test_numbers_behind_a_task_do_not_hide_it(small_pool, tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  for name in ('mine_two_12', 'clean_one', 'base'):
    (tmp_path / 'checkpoints' / f'{name}.safetensors').touch()
  found = audit.find_uploads(tmp_path, ['one', 'two'])
  assert [(u.name, u.task, u.known) for u in found] == [
    ('clean_one', 'one', 'clean'),
    ('mine_two_12', 'two', ''),
  ]
  (tmp_path / 'checkpoints' / 'stranger.safetensors').touch()
  with pytest.raises(ValueError, match='stranger: its name ends in no task'):
    audit.find_uploads(tmp_path, ['one', 'two'])


@pytest.fixture(scope='module')
def colluders(small_pool, tmp_path_factory):
  """A pool in which evil's task vector is half of clean_three's too."""
  folder = tmp_path_factory.mktemp('colluders') / 'pool'
  shutil.copytree(small_pool, folder)
  base, evil, three = (
    uploads.load_model(uploads.path(folder, name))
    for name in ('base', 'evil', 'clean_three')
  )
  mixed = jax.tree.map(lambda b, x, y: (x + y) - b, base, evil, three)
  uploads.save_model(folder, 'clean_three', mixed)
  return folder


def test_uploads_that_were_not_made_apart_are_searched_together(
  colluders, done, tmp_path
):
  alone = _run(_config(colluders, models='evil'), tmp_path)['rows'][0]
  assert alone['company'] == {}
  before = {r['model']: r for r in done[1]['rows']}
  assert alone['suspicion'] == before['evil']['suspicion']
  # An upload that is known by now is audited again where it has company.
  models = 'evil,clean_one,clean_three'
  out = _run(_config(colluders, models=models), tmp_path)
  rows = {r['model']: r for r in out['rows']}
  assert [*rows['evil']['company']] == ['clean_three']
  assert rows['clean_three']['company']['evil'] == pytest.approx(0.7, abs=0.05)
  assert rows['clean_one']['company'] == {}
  page = (tmp_path / 'audit.html').read_text()
  assert f'clean_three ({rows["evil"]["company"]["clean_three"]:.2f})' in page
  assert rows['evil']['suspicion'] != alone['suspicion']
  assert rows['clean_one']['suspicion'] == before['clean_one']['suspicion']


@pytest.fixture(scope='module')
def merged(colluders, tmp_path_factory):
  """A merge that audits its experts: its config, workdir and report."""
  config = pool_config.get_config('runlocal')
  config.update({'bad': 'evil', 'tasks': 'one,two,three', 'dev': 8, 'test': 12})
  config.update({'audit': True, 'methods': 'dam_robust', 'steps': 2})
  config.update({'pool': str(colluders), 'compiler_options': {}})
  workdir = tmp_path_factory.mktemp('merged')
  console = Console(file=io.StringIO(), width=120)
  return config, workdir, merge.run(config, workdir, console)


def test_experts_of_a_merge_are_searched_in_company(merged):
  _, workdir, report = merged
  known = {r['model']: r['known'] for r in report['record']['suspects']}
  assert known == {'evil': 'bad', 'clean_one': '', 'clean_three': ''}
  found = {r['model']: r['company'] for r in report['record']['suspects']}
  assert [*found['evil']] == ['clean_three']
  assert [*found['clean_three']] == ['evil']
  assert not found['clean_one']
  trust = {r['model']: r['trust'] for r in report['record']['suspects']}
  half = suspects.TRUST
  assert trust == {'evil': half, 'clean_one': 1.0, 'clean_three': half}
  page = (workdir / 'report.html').read_text()
  assert 'Which experts to distrust' in page
  assert 'evil was searched together with clean_three' in page
  assert 'it starts with 50 % of the coefficient of others' in page
  rows = report['record']['suspects']
  most = max((r for r in rows), key=lambda r: r['others']['suspicion'])
  assert most['others']['planter'] in {*found} - {most['model']}
  assert f'without {most["others"]["planter"]} its patch works least' in page


def search(setup, folder):
  return suspects.find(
    setup.image_logits_fn,
    setup.base,
    setup.experts,
    setup.pool.tasks,
    [setup.hashes[path.stem] for path in setup.pool.experts.values()],
    base_hash=setup.hashes['base'],
    folder=folder,
    seed=0,
    compiler_options={},
  )


def test_each_process_searches_for_some_tasks(
  merged, colluders, monkeypatch, tmp_path
):
  config, workdir, _ = merged
  setup = load.load(config, colluders)
  folder = tmp_path / 'suspects'
  shutil.copytree(workdir / 'suspects', folder)
  warps = {p for p in folder.iterdir() if 'points' in np.load(p)}
  assert len(warps) == 3
  for path in warps:
    path.unlink()
  own = []

  class Second(distributed.Hosts):
    index, count = 1, 2

  monkeypatch.setattr(distributed, 'Hosts', Second)
  monkeypatch.setattr(
    distributed,
    'wait',
    lambda name: own.extend(p for p in warps if p.exists()),
  )
  search(setup, folder)
  assert [path.name.split('-')[0] for path in own] == [setup.tasks[1]]
  assert all(path.exists() for path in warps)


def test_the_experts_of_a_merge_are_searched_once(merged, colluders):
  config, workdir, report = merged
  setup, folder = load.load(config, colluders), workdir / 'suspects'

  def kept():
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}

  before = kept()
  assert len(before) == 9
  found = search(setup, folder)
  assert kept() == before
  seeds = suspects.seeds(found)
  num = len(suspects.AREAS)
  shape = (num + 1, 3, *setup.image_shape)
  assert seeds.params.pattern_logits.shape == shape
  assert seeds.points.shape == (4, 3, 6, 6, 2)
  alone = [not suspect.company for suspect in found]
  assert sorted(alone) == [False, False, True]
  assert seeds.trust.tolist() == [1.0 if x else suspects.TRUST for x in alone]
  own = [suspect.patch.target for suspect in found]
  others = [suspect.others.found.target for suspect in found]
  assert seeds.classes.tolist() == [own] * num + [others]
  for t, suspect in enumerate(found):
    patch, warp = (
      f.target if f.suspicion > suspects.NAMED else -1
      for f in (suspect.patch, suspect.warp)
    )
    want = [patch] * num + [-1] + [warp] * 4
    assert seeds.shunned[:, t].tolist() == want
  named, unnamed = (found[0].warp._replace(suspicion=x) for x in (0.7, 0.5))
  seeds_of_two = suspects.seeds(
    [found[0]._replace(warp=warp) for warp in (named, unnamed)]
  )
  np.testing.assert_array_equal(seeds_of_two.points[:, 0], named.seeds)
  assert not seeds_of_two.points[:, 1].any()
  assert seeds_of_two.shunned[-4:].tolist() == [[named.target, -1]] * 4
  assert all(s.others.by != t for t, s in enumerate(found))
  rows = {r['task']: r for r in report['record']['suspects']}
  for task, suspect in zip(setup.tasks, found, strict=True):
    row = rows[task]
    kinds = suspect.patch.suspicion, suspect.warp.suspicion
    assert suspect.own.suspicion == max(kinds)
    for x, y in ((suspect.own, row), (suspect.others.found, row['others'])):
      assert (x.suspicion, x.success) == (y['suspicion'], y['success'])
