"""Runs the whole experiment of Defense-Aware Merging, from data to table.

  python -m experiments.paper --config=configs/paper_vit_b32.py --workdir=PATH

One after the other, each by the command of that name:

  prepare   data sets, CLIP and zero-shot heads -> pool/
  finetune  a clean expert a task               -> pool/checkpoints/clean_*
  attack    a bad upload for some of the tasks  -> pool/checkpoints/<attack>_*
  merge     by every method, with some of them  -> merge_<how many>/

Records of experts lie in `experts/<name>/record.json`, reports in
`merge_<how many>/report.html`, and `table.md` and `table.json` sum them up.
Started again with the same workdir it goes on where it was, and does nothing
twice. More tasks to attack and other numbers of bad experts add to it; other
methods want another workdir, or the folders `merge_*` out of the way.
"""

import json
import os
import pathlib
import shutil
from typing import Any

from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from dam_jax import checkpoint
from experiments import attack
from experiments import bench
from experiments import command
from experiments import finetune
from experiments import load
from experiments import merge
from experiments import prepare
from experiments import report as report_lib
from experiments import settings
from experiments import uploads

KEYS = {
  'prepare': 'config of experiments.prepare',
  'finetune': 'config of experiments.finetune, of all experts',
  'attack': 'config of experiments.attack, of all bad uploads',
  'attacked': 'tasks to attack, names with commas, in the order in which bad '
  'uploads take the place of clean ones',
  'targets': 'class that each is to give, index, in the same order',
  'bad': 'how many uploads are bad, numbers with commas: a merge and a table '
  'of each',
  'merge': 'config of experiments.merge',
}
"""What a config says. Where the pool, a task or a name is concerned, what the
configs of the parts say is not read."""


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises with all that is wrong with a config, before any work."""
  settings.raise_if(settings.wrong_keys(config, KEYS))
  prepare.check_config(config.prepare)
  lines = bench.check_keys(config.finetune, finetune.KEYS)
  lines += bench.check_keys(config.attack, attack.KEYS)
  load.check_config(config.merge)
  names = prepare.task_names(config.prepare)
  lines += bench.not_mirrored(config.finetune, names)
  lines += bench.not_mirrored(config.attack, names)
  attacked = settings.split(config.attacked)
  numbers = [*settings.split(config.targets), *settings.split(config.bad)]
  lines += [
    f'attacked task {name} is not among {", ".join(names)}'
    for name in attacked
    if name not in names
  ]
  lines += [f'{x!r} is no number' for x in numbers if not x.isdigit()]
  if len(set(attacked)) != len(attacked):
    lines.append(f'attacked has a task twice: {config.attacked}')
  if len(settings.split(config.targets)) != len(attacked):
    lines.append(
      f'{len(attacked)} tasks are attacked, of {len(_targets(config))} targets'
    )
  if not settings.split(config.bad):
    lines.append('bad is empty')
  lines += [
    f'bad {x}: {len(attacked)} tasks are attacked'
    for x in settings.split(config.bad)
    if x.isdigit() and int(x) > len(attacked)
  ]
  settings.raise_if(lines)


def _targets(config: config_dict.ConfigDict) -> dict[str, int]:
  """Returns the target by attacked task."""
  return dict(
    zip(
      settings.split(config.attacked),
      map(int, settings.split(config.targets)),
      strict=False,
    )
  )


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Runs what is missing of the experiment.

  Args:
    config: see `KEYS`.
    workdir: where to write.
    console: to show progress and the tables on.

  Returns:
    What table.json holds: by number of bad uploads and method, mean 'acc' and,
    where there are some, mean 'asr' over the attacked tasks, each with 'low'
    and 'high'.

  Raises:
    ValueError: where a config makes no sense, data or the CLIP cannot be had,
      or the workdir holds another experiment.
  """
  check_config(config)
  pool = workdir / 'pool'
  _claim(config, workdir)
  prepare.run(config.prepare, pool, console)
  targets = _targets(config)
  _check_targets(pool, targets)
  names = prepare.task_names(config.prepare)
  for name in names:
    own = _part(config.finetune, pool=str(pool), task=name, name='')
    _make(finetune.run, own, workdir, f'clean_{name}', console)
  bad = {}
  for name, target in targets.items():
    own = _part(
      config.attack, pool=str(pool), task=name, name='', target=target
    )
    bad[name] = f'{config.attack.attack}_{name}'
    _make(attack.run, own, workdir, bad[name], console)
  table = {}
  for number in settings.split(config.bad):
    chosen = [bad[name] for name in targets][: int(number)]
    own = _part(
      config.merge,
      pool=str(pool),
      tasks=','.join(names),
      bad=','.join(chosen),
    )
    report = merge.run(own, workdir / f'merge_{number}', console)
    table[number] = _sum_up(report)
  checkpoint.write(workdir / 'table.json', json.dumps(table, indent=2))
  checkpoint.write(workdir / 'table.md', _markdown(table))
  console.print(_terminal(table))
  return table


def _part(
  config: config_dict.ConfigDict, **changes: Any
) -> config_dict.ConfigDict:
  own = config.copy_and_resolve_references()
  own.update(changes)
  return own


def _claim(config: config_dict.ConfigDict, workdir: pathlib.Path) -> None:
  """Makes a workdir this experiment's, or raises where experts are another's.

  Data and merges have their own records.
  """
  path = workdir / 'paper.json'
  asked = json.loads(
    json.dumps(
      {
        'finetune': bench.fixed(config.finetune),
        'attack': bench.fixed(config.attack),
        'targets': _targets(config),
      }
    )
  )
  if path.exists():
    there = json.loads(path.read_text())
    targets = there['targets'] | asked['targets']
    moved = [t for t, x in there['targets'].items() if targets[t] != x]
    lines = [
      f'{key} differs'
      for key in ('finetune', 'attack')
      if there[key] != asked[key]
    ]
    lines += [f'the target of {t} differs' for t in moved]
    if lines:
      head = f'{path} is of another experiment, take another workdir:'
      raise ValueError('\n  '.join([head, *lines]))
    asked['targets'] = targets
  checkpoint.write(path, json.dumps(asked, indent=2))


def _check_targets(pool: pathlib.Path, targets: dict[str, int]) -> None:
  lines = []
  for name, target in targets.items():
    record = json.loads((pool / 'tasks' / f'{name}.json').read_text())
    if target >= record['classes']:
      lines.append(
        f'target {target} is not one of the {record["classes"]} classes of '
        f'{name}'
      )
  settings.raise_if(lines)


def _make(
  make: command.Run,
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  name: str,
  console: Console,
) -> None:
  """Makes an expert and moves it into the pool, unless it is there.

  Its own checkpoint comes last: where it is in the pool, the rest is.
  """
  pool, folder = workdir / 'pool', workdir / 'experts' / name
  if uploads.path(pool, name).exists():
    return
  own = uploads.path(folder, name)
  if not (folder / 'record.json').exists():
    own.unlink(missing_ok=True)  # of a run that was interrupted, to go on
    make(config, folder, console)
  elif not own.exists():
    shutil.rmtree(folder)
    make(config, folder, console)
  files = sorted(
    [*folder.glob('checkpoints/*'), *folder.glob('triggers/*')],
    key=lambda path: path == own,
  )
  for file in files:
    to = pool / file.relative_to(folder)
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, to)


def _sum_up(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns means over tasks by method, ASR over those that are attacked."""
  out: dict[str, dict[str, Any]] = {}
  for row in report['rows']:
    if row['task'] == 'mean' and row['metric'] in ('acc', 'asr'):
      mean = {key: row[key] for key in ('value', 'low', 'high')}
      out.setdefault(row['method'], {})[row['metric']] = mean
  return out


def _cells(found: dict[str, Any]) -> list[str]:
  return [
    f'{100 * x["value"]:.1f} ({100 * x["low"]:.1f} to {100 * x["high"]:.1f})'
    if (x := found.get(metric))
    else ''
    for metric in ('acc', 'asr')
  ]


def _title(number: str) -> str:
  return f'{number} bad, in per cent, with 95 % intervals'


def _label(method: str) -> str:
  return report_lib.CONTROLS.get(method, method)


def _markdown(table: dict[str, Any]) -> str:
  lines = []
  for number, methods in table.items():
    lines += [f'## {_title(number)}', '', '| method | ACC | ASR |']
    lines += ['|---|---:|---:|']
    for method, found in methods.items():
      lines.append(f'| {" | ".join([_label(method), *_cells(found)])} |')
    lines.append('')
  return '\n'.join(lines)


def _terminal(table: dict[str, Any]) -> Table:
  shown = Table(title='means over tasks, in per cent, with 95 % intervals')
  for column in ('bad', 'method', 'ACC', 'ASR'):
    shown.add_column(column)
  for number, methods in table.items():
    for method, found in methods.items():
      shown.add_row(number, _label(method), *_cells(found))
  return shown


if __name__ == '__main__':
  command.start(run, 'configs/paper_vit_b32.py')
