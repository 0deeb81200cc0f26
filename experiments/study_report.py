"""Turns the cells of a study into tables, pictures and a page."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from dam_jax import evaluate
from experiments import merge_run
from experiments import methods
from experiments import pictures
from experiments import report as report_lib
from experiments import study_pictures
from experiments.cells import SECTIONS
from experiments.cells import Cell

FLOOR = 'clean_merge'
"""The control that gives an attack's floor."""

COLUMNS = {
  'acc': 'ACC',
  'asr': 'ASR',
  'asr_plain': 'ASR - plain',
  'acc_plain': 'ACC - plain',
  'asr_floor': 'ASR - floor',
  'transfer': 'transfer',
  'transfer_plain': 'transfer - plain',
  'transfer_floor': 'transfer - floor',
  'reads': 'reads',
  'images': 'images a task',
  'steps': 'steps',
  'seconds': 'seconds',
  'runs': 'runs',
}
"""What the columns of tables are called."""

_USUAL = ('acc', 'asr', 'asr_plain', 'acc_plain', 'asr_floor')
_OF_SECTION = {
  'transfer': ('transfer', 'transfer_plain', 'transfer_floor'),
  'defences': (*_USUAL, 'reads', 'images', 'steps', 'seconds'),
}

NOTE = (
  'Per cent, with 95 % intervals from a bootstrap that draws uploads, merge '
  'seeds and test images; for a rate it is at least as wide as that of Wilson. '
  '“- plain” is the difference to task arithmetic and “- floor” that '
  'to the same merge of clean experts, both paired: on the same images, '
  'uploads and seeds. With as few seeds as three, bootstraps are too narrow. '
  'Seconds are wall-clock on this machine and contain compiling.'
)
"""What the numbers of all tables are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What one method did in one cell.

  Attributes:
    cell: which.
    row: of the table.
    hits: by metric and task, float `[N]`, NaN where an image does not count.
    seconds: 'steps', 'total' and others.
  """

  cell: Cell
  row: str
  hits: Mapping[str, Mapping[str, np.ndarray]]
  seconds: Mapping[str, float]

  @property
  def key(self) -> tuple[str, int, int]:
    """What runs of two methods have in common where they are compared."""
    return self.cell.task, self.cell.upload, self.cell.seed


def read(cell: Cell, folder: pathlib.Path) -> list[Run]:
  """Reads what is on disk of a cell, which may have failed half-way.

  Args:
    cell: one of a study.
    folder: of its run.

  Returns:
    A run a method and control that was measured.
  """
  out = []
  for name in (*cell.methods, *report_lib.CONTROLS):
    path = folder / 'results' / f'{name}.json'
    if not path.exists():
      continue
    with np.load(path.with_suffix('.npz')) as file:
      hits = _by_metric(dict(file))
    seconds = json.loads(path.read_text())['seconds']
    row = cell.rows.get(name, name)
    out.append(Run(cell=cell, row=row, hits=hits, seconds=seconds))
  return out


def _by_metric(arrays) -> dict[str, dict[str, np.ndarray]]:
  """Sorts hits by metric and task; several triggers of a task are averaged."""
  found: dict[str, dict[str, list[np.ndarray]]] = {}
  for key, x in arrays.items():
    metric, *_, task = key.split('/')
    hits = np.where(x < 0, np.nan, x.astype(np.float32))
    found.setdefault(metric, {}).setdefault(task, []).append(hits)
  return {
    metric: {task: np.mean(x, axis=0) for task, x in by_task.items()}
    for metric, by_task in found.items()
  }


def tables(
  runs: Sequence[Run], sections: Sequence[str], *, seed: int, draws: int
) -> dict[str, list[dict[str, Any]]]:
  """Sums up runs over seeds, uploads and images.

  Args:
    runs: of all cells.
    sections: names.
    seed: of the bootstrap.
    draws: of it.

  Returns:
    By section, a dict a row: 'group', 'row', 'x', and the columns that it has;
    rates are (value, low, high).
  """
  out = {}
  for section in sections:
    source = 'succession' if section == 'transfer' else section
    groups: dict[str, dict[str, dict[Any, Run]]] = {}
    for run in runs:
      if run.cell.section == source:
        rows = groups.setdefault(run.cell.group, {})
        rows.setdefault(run.row, {}).setdefault(run.key, run)
    metrics = ('transfer',) if section == 'transfer' else ('acc', 'asr')
    out[section] = [
      _row(group, row, rows, metrics, seed=seed, num=draws)
      for group, rows in groups.items()
      for row in _ordered(rows)
    ]
    if section == 'transfer':
      out[section] = [row for row in out[section] if 'transfer' in row]
  return out


def _ordered(rows) -> list[str]:
  """Returns names of rows, those of controls last."""
  controls = [name for name in report_lib.CONTROLS if name in rows]
  return [name for name in rows if name not in controls] + controls


def _row(group, row, rows, metrics, **options) -> dict[str, Any]:
  """Sums up one row of a table."""
  runs = list(rows[row].values())
  method = next(
    (name for name, shown in runs[0].cell.rows.items() if shown == row), row
  )
  out = {'group': group, 'row': row, 'x': runs[0].cell.x, 'runs': len(runs)}
  for metric in metrics:
    if metric not in runs[0].hits:
      continue
    out[metric] = _rate(runs, metric, **options)
    for against, name in ((merge_run.PLAIN, 'plain'), (FLOOR, 'floor')):
      others = [_partner(run, rows.get(against, {})) for run in runs]
      if row != against and all(o is not None for o in others):
        out[f'{metric}_{name}'] = _gain(runs, others, metric, **options)
  if method in methods.ALL:
    reads = methods.reads(method)
    out |= {
      'reads': reads,
      'images': runs[0].cell.changes.get('dev') if reads != 'none' else None,
      'steps': runs[0].seconds['steps'] or None,
      'seconds': float(np.mean([run.seconds['total'] for run in runs])),
    }
  return out


def _partner(run: Run, others: Mapping[Any, Run]) -> Run | None:
  """Returns the run of another method on the same upload, and seed if any."""
  if run.key in others:
    return others[run.key]
  # What draws nothing runs with one seed alone.
  same = [other for key, other in others.items() if key[:2] == run.key[:2]]
  return same[0] if same else None


def _stack(runs: Sequence[Run], metric: str) -> dict[str, np.ndarray]:
  """Returns `[R, N]` by task, NaN where a run did not measure a task."""
  sizes = {t: x.shape for run in runs for t, x in run.hits[metric].items()}
  return {
    task: np.stack(
      [run.hits[metric].get(task, np.full(shape, np.nan)) for run in runs]
    )
    for task, shape in sizes.items()
  }


def _levels(runs: Sequence[Run]) -> dict[str, Any]:
  return {
    'clusters': [run.key[:2] for run in runs],
    'strata': [run.cell.task for run in runs],
  }


def _rate(runs, metric, **options) -> study_pictures.Interval:
  """Returns the mean rate; its interval has a width where all hits agree."""
  hits = _stack(runs, metric)
  value, low, high = evaluate.bootstrap(
    list(hits.values()), **_levels(runs), **options
  )
  rates = []
  for x in hits.values():
    counted = np.isfinite(x)
    # Runs share their images, so that there are no more of them than in one.
    num = int(counted.sum(axis=1).max())
    count = round(float(x[counted].mean()) * num)
    rates.append(evaluate.rate(np.arange(num) < count))
  least = evaluate.mean(rates)
  return value, min(low, least.low), max(high, least.high)


def _gain(runs, others, metric, **options) -> study_pictures.Interval:
  hits, baseline = _stack(runs, metric), _stack(others, metric)
  tasks = [task for task in hits if task in baseline]
  return evaluate.paired_bootstrap(
    [hits[t] for t in tasks],
    [baseline[t] for t in tasks],
    **_levels(runs),
    **options,
  )


def columns(section: str) -> list[str]:
  """Returns the columns of a section's table.

  Args:
    section: its name.
  """
  return [*_OF_SECTION.get(section, _USUAL), 'runs']


def shown(row: Mapping[str, Any], column: str) -> tuple[str, str]:
  """Returns what a table shows of a row, and the interval below it.

  Args:
    row: of a table.
    column: its key.
  """
  value = row.get(column)
  if value is None:
    return '', ''
  if isinstance(value, (tuple, list)):
    sign = '+' if '_' in column else ''
    number, low, high = (f'{100 * x:{sign}.1f}' for x in value)
    return number, f'{low} to {high}'
  return f'{value:.1f}' if isinstance(value, float) else str(value), ''


def title(row: str) -> str:
  """Returns what a row is called."""
  return report_lib.CONTROLS.get(row, row)


def markdown(study: Mapping[str, Any]) -> str:
  """Writes all tables.

  Args:
    study: what study.json holds.

  Returns:
    Markdown.
  """
  lines = ['# The study', '', NOTE, '']
  for section, rows in study['tables'].items():
    heads = columns(section)
    lines += [f'## {SECTIONS[section]}', '']
    if not rows:
      lines += ['Nothing was measured.', '']
      continue
    names = ' | '.join(COLUMNS[h] for h in heads)
    lines += [
      f'| | method | {names} |',
      '|---|---' + '|---:' * len(heads) + '|',
    ]
    for row in rows:
      cells = []
      for head in heads:
        value, interval = shown(row, head)
        cells.append(f'{value} ({interval})' if interval else value)
      label = f'*{title(row["row"])}*'
      if row['row'] not in report_lib.CONTROLS:
        label = row['row']
      lines.append(f'| {row["group"]} | {label} | {" | ".join(cells)} |')
    lines.append('')
  if study['failed']:
    lines += ['## Failed', '']
    lines += [f'- `{f["cell"]}`: {f["error"]}' for f in study['failed']]
    lines.append('')
  return '\n'.join(lines)


def images(
  study: Mapping[str, Any], cells: Sequence[Cell], folder: pathlib.Path
) -> dict[str, dict[str, bytes]]:
  """Draws a study.

  Args:
    study: what study.json holds.
    cells: of it.
    folder: of the cells.

  Returns:
    PNG files by section and title.
  """
  out: dict[str, dict[str, bytes]] = {}
  tables = study['tables']
  for section in ('succession', 'defences', 'adaptive'):
    for group, rows in _groups(tables.get(section, [])).items():
      values = {
        r['row']: {m: r[m] for m in ('acc', 'asr') if m in r} for r in rows
      }
      png = pictures.acc_asr(
        values, list(report_lib.CONTROLS), names=report_lib.CONTROLS
      )
      out.setdefault(section, {})[group] = png
  for kind, xlabel in (('bad', 'bad experts'), ('tasks', 'tasks, one bad')):
    wanted = [r for r in tables.get('number', []) if kind in r['group'][-8:]]
    if series := _series(wanted):
      png = study_pictures.over_count(
        series, report_lib.CONTROLS, xlabel=f'number of {xlabel}'
      )
      out.setdefault('number', {})[xlabel] = png
  for group, rows in _groups(tables.get('curve', [])).items():
    out.setdefault('curve', {})[group] = _curve(rows)
  for section in ('succession', 'ablation'):
    if shares := _dropped([c for c in cells if c.section == section], folder):
      png = study_pictures.sparsity(shares)
      out.setdefault(section, {})['dropped by the masks'] = png
  for section in SECTIONS:
    for cell in (c for c in cells if c.section == section):
      path = folder / cell.name / 'triggers' / 'dam_robust.png'
      if path.exists():
        found = out.setdefault(section, {})
        found[f'triggers that dam_robust found in {cell.name}'] = (
          path.read_bytes()
        )
        break
  return out


def _groups(rows) -> dict[str, list[dict[str, Any]]]:
  out: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    out.setdefault(row['group'], []).append(row)
  return out


def _series(rows) -> dict[str, list[tuple[float, study_pictures.Interval]]]:
  kept = [r for r in rows if r['row'] not in ('base', 'single', 'oracle')]
  names = dict.fromkeys(r['row'] for r in kept if 'asr' in r)
  return {
    name: [(r['x'], r['asr']) for r in kept if r['row'] == name]
    for name in names
  }


def _curve(rows) -> bytes:
  others = (merge_run.PLAIN, *report_lib.CONTROLS)
  points = [
    (r['x'], r['acc'], r['asr']) for r in rows if r['row'] not in others
  ]
  marks = {
    title(r['row']): (r['acc'], r['asr'])
    for r in rows
    if r['row'] in (merge_run.PLAIN, FLOOR)
  }
  return study_pictures.trade_off(points, marks)


def _dropped(cells, folder) -> dict[str, dict[str, dict[str, float]]]:
  """Returns the mean share that masks drop, by row, mask and part in order."""
  found: dict[str, dict[str, dict[str, list[float]]]] = {}
  for cell in cells:
    for name in cell.methods:
      path = folder / cell.name / 'masks' / f'{name}.json'
      if not path.exists():
        continue
      row = found.setdefault(cell.rows.get(name, name), {})
      for mask, leaves in json.loads(path.read_text()).items():
        for leaf, share in leaves.items():
          part = leaf.split('/')[0]
          row.setdefault(mask, {}).setdefault(part, []).append(share)
  return {
    row: {
      mask: {part: float(np.mean(x)) for part, x in parts.items()}
      for mask, parts in masks.items()
    }
    for row, masks in found.items()
  }


def html(
  study: Mapping[str, Any], images: Mapping[str, Mapping[str, bytes]]
) -> str:
  """Writes the page: one file that needs nothing else.

  Args:
    study: what study.json holds.
    images: from `images`.

  Returns:
    HTML.
  """
  return (
    report_lib.environment()
    .get_template('study.html.j2')
    .render(
      study=study,
      titles=SECTIONS,
      groups={s: _groups(rows) for s, rows in study['tables'].items()},
      heads={s: columns(s) for s in study['tables']},
      names=COLUMNS,
      controls=report_lib.CONTROLS,
      title=title,
      shown=shown,
      images=images,
      note=NOTE,
      definitions=[
        pair
        for pair in report_lib.DEFINITIONS
        if pair[0] in ('ACC', 'ASR', 'transfer', 'floor', 'ceiling')
      ],
    )
  )
