"""Pictures of benchmarks' rows, each the bytes of a PNG file."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from experiments.pictures import MUTED
from experiments.pictures import STYLE
from experiments.pictures import TASK_COLOURS
from experiments.pictures import png

Row = Mapping[str, Any]
PROGRAMS = {
  'ours': '#0072B2',
  'fusion_bench': '#D55E00',
  'mergekit': '#009E73',
  'numpy': '#67727e',
  'torch': '#CC79A7',
}
"""Colour of each program."""


def median(found: Any, key: str = 'seconds') -> float:
  """Returns the median of runs, or of plain numbers."""
  values = [x[key] if isinstance(x, Mapping) else x for x in found]
  return statistics.median(values) if values else float('nan')


def _against(
  axes: Axes, rows: Sequence[Row], fits: Sequence[Row], key: str, of: str
) -> None:
  """Draws time or memory of each method against experts or devices."""
  unit = 1 if of == 'seconds' else 1e6
  for i, method in enumerate(dict.fromkeys(r['method'] for r in rows)):
    own = sorted(
      (r for r in rows if r['method'] == method), key=lambda r: r[key]
    )
    x = np.array([r[key] for r in own])
    values = [median(r['runs']) if of == 'seconds' else r['peak'] for r in own]
    colour, line = TASK_COLOURS[i % len(TASK_COLOURS)], None
    for fit in fits:
      if (fit['method'], fit['of']) == (method, of) and key == 'experts':
        line = (fit['fixed'] + fit['marginal'] * x) / unit
        axes.plot(x, line, color=colour, lw=1, alpha=0.6)
    axes.plot(
      *(x, np.divide(values, unit)),
      'o' if line is not None else 'o:',
      color=colour,
      ms=4,
      label=method,
    )
  axes.set_xlabel(f'number of {key}')
  axes.set_ylabel('seconds' if of == 'seconds' else 'memory, MB')
  axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
  axes.set_xticks(sorted({r[key] for r in rows}))


def scaling(rows: Sequence[Row]) -> bytes:
  """Draws time and memory against experts, and time against devices.

  Args:
    rows: of `benchmarks.bench_scaling`, with its fits.
  """
  fits = [r for r in rows if r['axis'] == 'fit']
  kinds = list(dict.fromkeys(r['what'] for r in rows))
  panels = (('experts', 'seconds'), ('experts', 'peak'), ('devices', 'seconds'))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(9.6, 2.9 * len(kinds)), layout='constrained')
    grid = figure.subplots(len(kinds), len(panels), squeeze=False)
    for what, line in zip(kinds, grid, strict=True):
      for axes, (key, of) in zip(line, panels, strict=True):
        own = [r for r in rows if r['axis'] == key and r['what'] == what]
        if own:
          _against(axes, own, fits, key, of)
        else:
          axes.set_axis_off()
      line[0].set_title(f'{what}s')
      line[0].legend()
      if any(r.get('shared_cores') for r in rows):
        line[2].set_title('devices share the same cores', color=MUTED)
    return png(figure)


def dots(values: Mapping[str, Mapping[str, float]], label: str) -> bytes:
  """Draws a dot of each program for each case, on a logarithmic axis.

  Args:
    values: by case and program.
    label: of the values.
  """
  programs = list(dict.fromkeys(p for case in values.values() for p in case))
  others = iter(TASK_COLOURS)
  with matplotlib.rc_context(STYLE):
    size = (7.4, 1.2 + 0.24 * len(values))
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots()
    for program in programs:
      at = [k for k, case in enumerate(values.values()) if program in case]
      axes.plot(
        [list(values.values())[k][program] for k in at],
        at,
        'o',
        color=PROGRAMS.get(program) or next(others),
        label=program,
      )
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xscale('log')
    axes.set_xlabel(label)
    figure.legend(loc='outside upper right', ncols=len(programs))
    return png(figure)


def merges(rows: Sequence[Row], part: str) -> bytes:
  """Draws seconds of ours and of others for each merge of a part.

  Args:
    rows: of `benchmarks.bench_merge`; of several forms the fastest counts.
    part: 'memory' or 'disk'.
  """
  found: dict[str, dict[str, float]] = {}
  for row in rows:
    if row['part'] == part and 'ours' in row:
      name = f'{row["method"]} {row.get("variant", "")}'.strip()
      case = found.setdefault(f'{name}, K = {row["experts"]}', {})
      for program, times in (
        ('ours', row['ours']),
        *((p, x['runs']) for p, x in row.get('peers', {}).items()),
      ):
        case[program] = min(median(times), case.get(program, np.inf))
  return dots(found, 'seconds')


def checkpoints(rows: Sequence[Row]) -> bytes:
  """Draws GB/s of files in and out.

  Args:
    rows: of `benchmarks.bench_checkpoint`.
  """
  found: dict[str, dict[str, float]] = {}
  for row in rows:
    cache = 'pages dropped' if row.get('cache') == 'dropped' else 'as they are'
    case = f'{row["kind"]}, {row["direction"]}'
    found.setdefault(case, {})[cache] = row['bytes'] / 1e9 / median(row['runs'])
  return dots(found, 'GB/s')


def step_programs(row: Row) -> list[dict[str, Any]]:
  """Returns a row of `benchmarks.bench_meta_step` for each of its programs.

  Each has what is known of model, method, experts, compute, program, seconds,
  cpu, compile, first, peak, flops and mfu. A row that has a program's seconds
  is that program's already.
  """
  if 'seconds' in row:
    return [{'program': 'ours', **row}]
  keys = ('model', 'method', 'experts', 'compute')
  counted = row.get('counted', {}).values()
  flops = sum(phase['flops'] for phase in counted) or None
  reached = row.get('machine', {}).get('flops')
  found = []
  for program in ('ours', 'torch', 'fusion_bench'):
    if program in row:
      about = row if program == 'ours' else row.get(f'{program}_about', {})
      first = row.get('first', {}).get(program, {})
      seconds = [x['seconds'] for x in row[program]]
      known = {
        **{key: row.get(key) for key in keys},
        **{'program': program, 'seconds': seconds},
        'cpu': [x['cpu'] for x in row[program]],
        'compile': about.get('compile'),
        'first': first.get('seconds'),
        'peak': row.get('memory', {}).get(program) or first.get('peak'),
        'flops': flops,
      }
      if flops and reached:
        known['mfu'] = flops / reached / median(seconds)
      found.append({key: x for key, x in known.items() if x is not None})
  return found


def steps(rows: Sequence[Row]) -> bytes:
  """Draws seconds a step of each program.

  Args:
    rows: of `benchmarks.bench_meta_step`.
  """
  found: dict[str, dict[str, float]] = {}
  for row in (program for each in rows for program in step_programs(each)):
    words = [row.get('model'), row.get('method'), row.get('compute')]
    name = ', '.join(str(x) for x in words if x)
    case = found.setdefault(f'{name}, K = {row.get("experts", "?")}', {})
    case[row['program']] = median(row['seconds'])
  return dots(found, 'seconds a step')
