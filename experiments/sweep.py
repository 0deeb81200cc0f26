"""Runs a command over a grid of its config's values, each in its own workdir.

  python -m experiments.sweep --run=finetune --config=configs/finetune.py \
    --config.pool=PATH --over=learning_rate=1e-4,3e-4,1e-3 --over=seed=0,1 \
    --workdir=PATH

Each `--over` is a key of the config, with dots, and its values; there is a run
for each combination. What holds a comma stands in quotes, as in
`--over="bad='0,1','2'"`. Without one, the config file's own `sweep(add)` says
what to run: it calls `add(key=value, ...)` for each run.

Writes to the workdir `runs/<values>/`, each as the command writes it, and
`sweep.md`, `sweep.csv` and `sweep.json`, which say what all of them are worth.
Started again with the same workdir it goes on where it was; a grid may grow. A
run that fails is listed with its error, others go on, and the next start tries
it again.

Who chooses the best of a sweep by test images fools himself: merges take
`--config.report_on=dev`.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import io
import itertools
import json
import pathlib
import re
import runpy
from typing import Any, NamedTuple
import zlib

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from dam_jax import checkpoint
from experiments import attack
from experiments import command
from experiments import evaluate
from experiments import finetune
from experiments import merge
from experiments import paper
from experiments import pretrain
from experiments import settings

Row = dict[str, Any]
"""What was measured: 'of' which model or method, and rates 'acc' and 'asr'."""


class Command(NamedTuple):
  """A command that can be swept.

  Attributes:
    run: of its module.
    result: the file that it writes last, JSON.
    rows: what to show of that.
  """

  run: command.Run
  result: str
  rows: Callable[[Any], list[Row]]


def _of_models(record: Mapping[str, Any]) -> list[Row]:
  return [
    {'of': name, 'acc': found.get('acc'), 'asr': found.get('asr')}
    for name, found in record['models'].items()
  ]


def _of_means(report: Mapping[str, Any]) -> list[Row]:
  rows: dict[str, Row] = {}
  for row in report['rows']:
    if row['task'] == 'mean' and row['metric'] in ('acc', 'asr'):
      name = row.get('method') or row['model']
      rate = {key: row[key] for key in ('value', 'low', 'high')}
      rows.setdefault(name, {'of': name})[row['metric']] = rate
  return [*rows.values()]


def _of_table(table: Mapping[str, Any]) -> list[Row]:
  return [
    {'of': f'{number} bad, {name}', **found}
    for number, methods in table.items()
    for name, found in methods.items()
  ]


def _of_tasks(report: Mapping[str, Any]) -> list[Row]:
  return [{'of': task, 'acc': acc} for task, acc in report.items()]


COMMANDS = {
  'finetune': Command(finetune.run, 'record.json', _of_models),
  'attack': Command(attack.run, 'record.json', _of_models),
  'merge': Command(merge.run, 'report.json', _of_means),
  'evaluate': Command(evaluate.run, 'evaluate.json', _of_means),
  'paper': Command(paper.run, 'table.json', _of_table),
  'pretrain': Command(pretrain.run, 'base.json', _of_tasks),
}
"""What can be swept, by name of the command."""


def grid(over: Sequence[str]) -> list[dict[str, str]]:
  """Reads values of keys, and combines them.

  Args:
    over: such as 'seed=0,1'.

  Returns:
    Values by key of each run, the last key's changing first.

  Raises:
    ValueError: with all that does not read so.

  Examples:
    >>> grid(['seed=0,1', 'bad="0,1"'])
    [{'seed': '0', 'bad': '0,1'}, {'seed': '1', 'bad': '0,1'}]
  """
  values: dict[str, list[str]] = {}
  lines = []
  for text in over:
    key, _, listed = text.partition('=')
    try:
      found = settings.split_quoted(listed)
    except ValueError as e:
      lines.append(f'{text}: {e}')
      continue
    if not key or not found:
      lines.append(f"{text}: want a key and values, such as 'seed=0,1'")
    if key in values:
      lines.append(f'{key} is swept twice')
    values[key] = found
  if lines:
    raise ValueError('\n  '.join(['a sweep:', *lines]))
  return [
    dict(zip(values, chosen, strict=True))
    for chosen in itertools.product(*values.values())
  ]


def _listed(file: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what a config file's own `sweep` adds."""
  sweep = runpy.run_path(str(file)).get('sweep')
  if sweep is None:
    raise ValueError(f'a sweep: give --over, for {file} has no function sweep')
  points: list[dict[str, Any]] = []
  sweep(lambda **chosen: points.append(chosen))
  return points


class _Point(NamedTuple):
  """One run: its name, what is set, and its config."""

  name: str
  chosen: dict[str, Any]
  config: settings.Config


def _points(
  config: settings.Config, chosen: Sequence[Mapping[str, Any]]
) -> list[_Point]:
  """Makes the config of each run.

  Raises:
    ValueError: with all keys and values that do not fit, and runs that come
      twice; or where there is none.
  """
  points, lines = [], []
  for pairs in chosen:
    own = config.copy_and_resolve_references()
    lines += settings.override(own, pairs)
    if not lines:
      flat = settings.flat(own)
      found = {key: flat[key] for key in pairs}
      points.append(_Point(_name(found), found, own))
  lines = [*dict.fromkeys(lines)]
  names = [point.name for point in points]
  lines += sorted({f'{x} comes twice' for x in names if names.count(x) > 1})
  if not chosen:
    lines.append('there is nothing to run')
  if lines:
    raise ValueError('\n  '.join(['a sweep:', *lines]))
  return points


def _name(chosen: Mapping[str, Any]) -> str:
  """Returns the name of a run's folder."""
  text = ','.join(f'{key}={value}' for key, value in chosen.items())
  safe = re.sub(r'[^\w.,=+-]+', '_', text)
  if safe == text and len(text) <= 120:
    return text
  return f'{safe[:100]}-{zlib.crc32(text.encode()):08x}'


def run(
  config: settings.Config,
  workdir: pathlib.Path,
  console: Console,
  *,
  name: str,
  chosen: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """Runs what is missing of a sweep.

  Args:
    config: of the command.
    workdir: where to write.
    console: to show progress and the table on.
    name: of the command, see `COMMANDS`.
    chosen: what each run sets of the config, by key with dots.

  Returns:
    What sweep.json holds: of each run 'run', 'set', 'rows' or 'error'.

  Raises:
    ValueError: before any run, with all keys and values that do not fit, or
      where the workdir holds runs of another config; after the last, where some
      failed.
  """
  if name not in COMMANDS:
    known = ', '.join(COMMANDS)
    raise ValueError(f'a sweep: {name!r} cannot be swept, there are {known}')
  points = _points(config, chosen)
  _claim(points, workdir / 'runs', name)
  found = []
  for i, point in enumerate(points, 1):
    console.rule(f'{i} of {len(points)}: {point.name}')
    found.append(_one(point, workdir / 'runs' / point.name, name, console))
    _write(workdir, found)
  console.print(_table(found))
  failed = [line['run'] for line in found if 'error' in line]
  if failed:
    what = f'{len(failed)} of {len(found)} runs failed; start again to try them'
    raise ValueError('\n  '.join([f'{what}:', *failed]))
  return found


def _claim(points: list[_Point], folder: pathlib.Path, name: str) -> None:
  """Makes folders these runs', or raises where one is another's."""
  lines, todo = [], {}
  for point in points:
    path = folder / point.name / 'swept.json'
    asked = json.loads(
      json.dumps({'run': name, 'config': point.config.to_dict()})
    )
    if not path.exists():
      todo[path] = asked
    elif json.loads(path.read_text()) != asked:
      lines.append(str(path.parent))
  if lines:
    head = 'runs of another config are there, take another workdir:'
    raise ValueError('\n  '.join([head, *lines]))
  for path, asked in todo.items():
    checkpoint.write(path, json.dumps(asked, indent=2))


def _one(
  point: _Point, folder: pathlib.Path, name: str, console: Console
) -> dict[str, Any]:
  """Runs one point unless it is there, and returns its line."""
  about = COMMANDS[name]
  line = {'run': point.name, 'set': point.chosen}
  result = folder / about.result
  if not result.exists():
    try:
      with command.alone(folder):
        about.run(point.config, folder, console)
    except (ValueError, FloatingPointError, OSError) as e:
      console.print(f'failed: {e}', highlight=False, soft_wrap=True)
      return {**line, 'error': str(e)}
  return {**line, 'rows': about.rows(json.loads(result.read_text()))}


_RATES = ('acc', 'asr')


def _write(workdir: pathlib.Path, found: list[dict[str, Any]]) -> None:
  checkpoint.write(workdir / 'sweep.json', json.dumps(found, indent=2))
  keys, lines = _keys(found), []
  for line, row in _rows(found):
    rates = [
      (row.get(rate) or {}).get(part, '')
      for rate in _RATES
      for part in ('value', 'low', 'high')
    ]
    lines.append([line['set'].get(k, '') for k in keys] + [row['of'], *rates])
  parts = [f'{rate}{x}' for rate in _RATES for x in ('', '_low', '_high')]
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(
    [[*keys, 'of', *parts], *lines]
  )
  checkpoint.write(workdir / 'sweep.csv', text.getvalue())
  columns = [*keys, 'of', 'ACC', 'ASR']
  table = [columns, ['---'] * len(columns), *_cells(found)]
  checkpoint.write(
    workdir / 'sweep.md',
    ''.join(f'| {" | ".join(cells)} |\n' for cells in table),
  )


def _keys(found: list[dict[str, Any]]) -> list[str]:
  return [*dict.fromkeys(key for line in found for key in line['set'])]


def _rows(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Row]]:
  """Returns lines and their rows; of a run that failed its error."""
  return [
    (line, row)
    for line in found
    for row in line.get('rows', [{'of': f'failed: {line.get("error")}'}])
  ]


def _cells(found: list[dict[str, Any]]) -> list[list[str]]:
  keys = _keys(found)
  out = []
  for line, row in _rows(found):
    rates = [
      f'{100 * x["value"]:.1f} ({100 * x["low"]:.1f} to {100 * x["high"]:.1f})'
      if (x := row.get(rate))
      else ''
      for rate in _RATES
    ]
    of = ' '.join(row['of'].split())
    out.append([*(str(line['set'].get(key, '')) for key in keys), of, *rates])
  return out


def _table(found: list[dict[str, Any]]) -> Table:
  table = Table(title='in per cent, with 95 % intervals')
  for column in [*_keys(found), 'of', 'ACC', 'ASR']:
    table.add_column(column, overflow='fold')
  for cells in _cells(found):
    table.add_row(*cells)
  return table


def _define_flags() -> None:
  flags.DEFINE_enum('run', None, [*COMMANDS], 'the command to run')
  flags.DEFINE_multi_string(
    'over', [], 'a key and its values, such as seed=0,1; may be repeated'
  )


def _start(
  config: settings.Config, workdir: pathlib.Path, console: Console
) -> list[dict[str, Any]]:
  if flags.FLAGS.run is None:
    raise ValueError(f'--run is missing: one of {", ".join(COMMANDS)}')
  if flags.FLAGS.over:
    chosen = grid(flags.FLAGS.over)
  else:
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    chosen = _listed(pathlib.Path(file))
  return run(config, workdir, console, name=flags.FLAGS.run, chosen=chosen)


if __name__ == '__main__':
  _define_flags()
  command.start(_start, 'configs/finetune.py')
