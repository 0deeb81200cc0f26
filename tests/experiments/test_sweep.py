"""Grids of configs, run where they are not yet, and their table."""

import csv
import io
import json

from ml_collections import config_dict
import pytest
from rich.console import Console

from configs import finetune as finetune_config
from experiments import finetune
from experiments import sweep


def _quiet():
  return Console(file=io.StringIO(), width=200)


@pytest.fixture
def fake(monkeypatch):
  """A command that notes its calls, and fails where told to."""
  calls, broken = [], set()

  def run(config, workdir, console):
    del console
    calls.append((config.rate, config.part.seed))
    if config.part.seed in broken:
      raise FloatingPointError('not finite,\nlower it')
    acc = {'value': config.rate, 'low': 0.0, 'high': 1.0}
    text = json.dumps({'models': {'clean': {'acc': acc}}})
    (workdir / 'record.json').write_text(text)

  about = sweep.COMMANDS['finetune']._replace(run=run)
  monkeypatch.setitem(sweep.COMMANDS, 'finetune', about)
  return calls, broken


def _config():
  return config_dict.ConfigDict({'rate': 0.5, 'part': {'seed': 0}}).lock()


def _sweep(workdir, *over, config=None):
  return sweep.run(
    config or _config(),
    workdir,
    _quiet(),
    name='finetune',
    chosen=sweep.grid(over),
  )


def test_a_grid_runs_what_is_missing_and_may_grow(fake, tmp_path):
  calls, _ = fake
  over = ('rate=0.25,1', 'part.seed=3,4')
  found = _sweep(tmp_path, *over)
  assert calls == [(0.25, 3), (0.25, 4), (1.0, 3), (1.0, 4)]
  assert _sweep(tmp_path, *over) == found
  assert len(calls) == 4
  more = _sweep(tmp_path, 'rate=0.25,1', 'part.seed=3,4,5')
  assert calls[4:] == [(0.25, 5), (1.0, 5)]
  assert json.loads((tmp_path / 'sweep.json').read_text()) == more
  with (tmp_path / 'sweep.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [
    (r['rate'], r['part.seed'], r['acc'], r['asr']) for r in rows[:2]
  ] == [
    ('0.25', '3', '0.25', ''),
    ('0.25', '4', '0.25', ''),
  ]
  table = (tmp_path / 'sweep.md').read_text()
  assert '| 1.0 | 5 | clean | 100.0 (0.0 to 100.0) |  |' in table
  assert sorted(p.name for p in (tmp_path / 'runs').iterdir())[0] == (
    'rate=0.25,part.seed=3'
  )


def test_a_run_that_fails_is_listed_and_tried_again(fake, tmp_path):
  calls, broken = fake
  broken.add(4)
  with pytest.raises(ValueError, match='1 of 3 runs failed'):
    _sweep(tmp_path, 'part.seed=3,4,5')
  assert 'failed: not finite, lower it' in (tmp_path / 'sweep.md').read_text()
  assert len(calls) == 3
  broken.clear()
  found = _sweep(tmp_path, 'part.seed=3,4,5')
  assert calls[3:] == [(0.5, 4)]
  assert not any('error' in line for line in found)


def test_runs_of_another_config_are_refused(fake, tmp_path):
  calls, _ = fake
  _sweep(tmp_path, 'part.seed=3,4')
  other = config_dict.ConfigDict({'rate': 0.7, 'part': {'seed': 0}})
  with pytest.raises(ValueError, match='another config') as e:
    _sweep(tmp_path, 'part.seed=3,4,5', config=other)
  assert 'part.seed=3' in str(e.value)
  assert 'part.seed=5' not in str(e.value)
  assert len(calls) == 2


def test_all_that_is_wrong_is_said_before_any_run(fake, tmp_path):
  calls, _ = fake
  with pytest.raises(ValueError, match='a sweep') as e:
    sweep.grid(['seed', 'rate=1', 'rate=2', 'a="b'])
  for words in ('seed: want a key', 'rate is swept twice', 'No closing'):
    assert words in str(e.value)
  with pytest.raises(ValueError, match='a sweep') as e:
    _sweep(tmp_path, 'rate=1,x', 'part.sed=1')
  assert "rate is float, got 'x'" in str(e.value)
  assert str(e.value).count('did you mean part.seed?') == 1
  with pytest.raises(ValueError, match=r'rate=1\.0 comes twice'):
    _sweep(tmp_path, 'rate=1,1.0')
  with pytest.raises(ValueError, match='prepare'):
    sweep.run(_config(), tmp_path, _quiet(), name='prepare', chosen=[])
  assert not calls
  assert not [*tmp_path.iterdir()]


def test_a_config_file_lists_its_own_runs(tmp_path):
  listed = sweep._listed(finetune_config.__file__)
  assert len(listed) == 9
  assert listed[1] == {'learning_rate': 1e-4, 'seed': 1}
  points = sweep._points(finetune_config.get_config('runlocal'), listed)
  assert points[-1].name == 'learning_rate=0.001,seed=2'
  assert points[-1].config.seed == 2
  (tmp_path / 'none.py').write_text('')
  with pytest.raises(ValueError, match='no function sweep'):
    sweep._listed(tmp_path / 'none.py')


def test_long_and_odd_values_make_different_folders():
  names = {
    sweep._name({'models': f'/a/b{end}', 'x': 'y' * n})
    for end in ('', ' ')
    for n in (1, 200, 201)
  }
  assert len(names) == 6
  assert all('/' not in name and len(name) < 120 for name in names)


def test_fine_tuning_is_swept(small_pool, tmp_path):
  config = finetune_config.get_config('runlocal')
  config.update({'pool': str(small_pool), 'task': 'two', 'steps': 2})
  config.batch = 4
  found = sweep.run(
    config,
    tmp_path,
    _quiet(),
    name='finetune',
    chosen=sweep.grid(['seed=0,1']),
  )
  for line in found:
    record = json.loads(
      (tmp_path / 'runs' / line['run'] / 'record.json').read_text()
    )
    (row,) = line['rows']
    assert row['acc'] == record['models']['clean_two']['acc']
    assert record['config']['seed'] == line['set']['seed']
  assert sweep.COMMANDS['finetune'].run is finetune.run


def test_what_commands_write_is_put_into_rows():
  rate = {'value': 0.5, 'low': 0.4, 'high': 0.6}
  report = {
    'rows': [
      {'method': 'ties', 'metric': 'acc', 'task': 'mean', **rate, 'n': 4},
      {'method': 'ties', 'metric': 'acc', 'task': 'svhn', **rate, 'n': 2},
      {'method': 'ties', 'metric': 'asr', 'task': 'mean', **rate, 'n': 2},
    ]
  }
  assert sweep.COMMANDS['merge'].rows(report) == [
    {'of': 'ties', 'acc': rate, 'asr': rate}
  ]
  report['rows'] = [{'model': 'a', 'metric': 'acc', 'task': 'mean', **rate}]
  assert sweep.COMMANDS['evaluate'].rows(report) == [{'of': 'a', 'acc': rate}]
  assert sweep.COMMANDS['paper'].rows({'2': {'ties': {'acc': rate}}}) == [
    {'of': '2 bad, ties', 'acc': rate}
  ]
  assert sweep.COMMANDS['pretrain'].rows({'svhn': rate}) == [
    {'of': 'svhn', 'acc': rate}
  ]
