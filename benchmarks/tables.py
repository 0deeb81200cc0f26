"""Tables in Markdown, and pictures, of what benchmarks wrote.

  python -m benchmarks.tables FILE --pictures=FOLDER

`FILE` holds lines of JSON of any of the benchmarks, of one run or of several:
of what was measured twice the newer row counts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from absl import app
from absl import flags

from benchmarks import pictures
from benchmarks import records
from benchmarks.pictures import median

_PICTURES = flags.DEFINE_string('pictures', '', 'folder for PNG files')

Row = Mapping[str, Any]
PERCENT = 100


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Returns a table whose columns after the first are at the right."""
  rule = ['---', *['---:'] * (len(head) - 1)]
  return '\n'.join(f'| {" | ".join(x)} |' for x in (head, rule, *lines))


def _number(x: float | None, unit: float = 1.0) -> str:
  return '' if x is None else f'{x / unit:.3g}'


def _first(row: Row, name: str) -> float | None:
  """Returns a figure, the median where a row has several."""
  found = row.get(name)
  return median(found) if isinstance(found, list) and found else found or None


def meta_step(rows: Sequence[Row]) -> str:
  """Seconds a step of learned merges, and of others beside them."""
  lines = []
  for row in (x for each in rows for x in pictures.step_programs(each)):
    mfu = row.get('mfu')
    lines.append(
      [
        *(str(row.get(x, '')) for x in ('model', 'method', 'experts')),
        *(str(row.get(x, '')) for x in ('compute', 'program')),
        *(_number(_first(row, x)) for x in ('seconds', 'cpu', 'compile')),
        _number(_first(row, 'first')),
        _number(row.get('peak'), 1e9),
        _number(row.get('flops'), 1e12),
        '' if mfu is None else f'{mfu:.0%}',
      ]
    )
  head = ['model', 'method', 'K', 'compute', 'program', 'step, s', 'CPU, s']
  head += ['compile, s', 'first, s', 'peak, GB', 'TFLOP', 'of peak']
  return markdown(head, lines)


def _name(row: Row) -> str:
  return f'{row["method"]} {row.get("variant", "")}'.strip()


def _merge_lines(row: Row) -> Iterator[list[str]]:
  head = [row['part'], _name(row), str(row['experts']), row['form']]
  missing = [f'{p}: {why}' for p, why in row.get('missing', {}).items()]
  if 'ours' not in row:
    yield [*head, *[''] * 6, '; '.join(missing)]
    return
  seconds = median(row['ours'])
  speed, share = row['bytes'] / 1e9 / seconds, ''
  if 'copy' in row:
    moved = row['bytes']
    if row['part'] == 'memory':
      moved = 2 * 4 * row['parameters']
    share = f'{speed * median(row["copy"]) / moved * 1e9:.0%}'
  head += [_number(seconds), _number(speed), share]
  for program, found in row.get('peers', {}).items():
    peer = median(found['runs'])
    yield [*head, program, _number(peer), f'{peer / seconds:.1f}', '']
    head = [''] * len(head)  # the same as in the line above
  if missing or not row.get('peers'):
    yield [*head, '', '', '', '; '.join(missing)]


def merge(rows: Sequence[Row]) -> str:
  """Merges without data."""
  head = ['part', 'method', 'K', 'form', 'ours, s', 'GB/s', 'of copying']
  head += ['beside', 's', 'faster', 'left out']
  return markdown(head, [line for row in rows for line in _merge_lines(row)])


def scaling(rows: Sequence[Row]) -> str:
  """Time and memory against experts and devices, and the lines that fit."""
  lines, fitted = [], []
  for row in rows:
    if row['axis'] == 'fit':
      unit = 1 if row['of'] == 'seconds' else 1e6
      said = 'seconds' if row['of'] == 'seconds' else 'memory, MB'
      figures = [_number(row[x], unit) for x in ('fixed', 'marginal')]
      fitted.append([row['method'], said, *figures, f'{row["r2"]:.3f}'])
    else:
      devices = str(row['devices'])
      if row['shared_cores'] and row['devices'] > 1:
        devices += ', the same cores'
      lines.append(
        [
          *(row['what'], row['method'], str(row['experts']), devices),
          _number(row['compile']),
          _number(median(row['runs'])),
          _number(median(row['runs'], 'cpu')),
          _number(row['peak'], 1e6),
        ]
      )
  head = ['', 'method', 'K', 'devices', 'compile, s', 's', 'CPU, s', 'MB']
  tables = [markdown(head, lines)]
  if fitted:
    head = ['method', 'of', 'fixed', 'each expert', 'R^2']
    tables.append(markdown(head, fitted))
  return '\n\n'.join(tables)


def checkpoint(rows: Sequence[Row]) -> str:
  """Files in and out."""
  lines = []
  for row in rows:
    pages = f'{row["cache"]}'
    if 'held' in row:
      pages += f' ({row["held"]:.0%} stay)'
    lines.append(
      [
        *(row['kind'], row['direction'], pages),
        *(_number(row['bytes'], 1e6), _number(row['seconds'])),
        *(_number(row['gbps']), f'{row["of_copy"]:.0%}'),
        _number(median(row['read'])) if 'read' in row else '',
      ]
    )
  head = ['kind', '', 'pages', 'MB', 's', 'GB/s', 'of copying', 'reading, s']
  return markdown(head, lines)


def images(rows: Sequence[Row]) -> str:
  """Images read, decoded and laid into batches."""
  lines = [
    [
      *(row['kind'], str(row['threads']), _number(row['per_second'])),
      _number(1000 * row['cpu'] / row['images']),
    ]
    for row in rows
  ]
  return markdown(['kind', 'threads', 'images/s', 'CPU ms an image'], lines)


def parity(rows: Sequence[Row]) -> str:
  """The largest error of each method beside each program."""
  programs = list(dict.fromkeys(row['program'] for row in rows))
  errors: dict[str, dict[str, float]] = {}
  verdicts: dict[str, set[str]] = {}
  for row in rows:
    own = errors.setdefault(row['method'], {})
    verdicts.setdefault(row['method'], set()).add(row['verdict'])
    if 'error' in row:
      program = row['program']
      own[program] = max(row['error'], own.get(program, 0.0))
  lines = [
    [
      method,
      *(f'{own[p]:.1e}' if p in own else '' for p in programs),
      ', '.join(sorted(verdicts[method])),
    ]
    for method, own in errors.items()
  ]
  return markdown(['method', *programs, 'verdict'], lines)


def clip_parity(rows: Sequence[Row]) -> str:
  """The largest error of each comparison with transformers' CLIP."""
  lines = [
    [
      *(row['model'], row['what'], f'{row["error"]:.1e}'),
      '' if row['limit'] is None else f'{row["limit"]:.0e}',
      row['verdict'],
    ]
    for row in rows
  ]
  return markdown(['model', 'compared', 'error', 'limit', 'verdict'], lines)


def security(rows: Sequence[Row]) -> str:
  """ACC and ASR with intervals, per cent."""
  lines = [
    [
      f'{row["metric"].upper()}, {row["task"]}',
      *(
        '{:.1f} ({:.1f} to {:.1f})'.format(*(PERCENT * x for x in row[name]))
        for name in ('ours', 'peer', 'difference')
      ),
    ]
    for row in rows
  ]
  head = ['', '`dam_released`', 'FusionBench', 'difference']
  return markdown(head, lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
  'meta_step': meta_step,
  'merge': merge,
  'scaling': scaling,
  'checkpoint': checkpoint,
  'input': images,
  'security': security,
  'parity': parity,
  'clip_parity': clip_parity,
}
"""By a benchmark's name."""

IDENTITY = {
  'meta_step': ('model', 'method', 'experts', 'compute', 'program', 'devices'),
  'merge': ('part', 'method', 'variant', 'experts', 'form', 'parameters'),
  'scaling': ('axis', 'what', 'method', 'of', 'experts', 'devices', 'width'),
  'checkpoint': ('kind', 'direction', 'cache', 'bytes'),
  'input': ('kind', 'threads', 'batch', 'device'),
  'security': ('metric', 'task'),
  'clip_parity': ('model', 'what'),
  'parity': ('method', 'program', 'ours', 'peer', 'problems'),
}
"""What says that two rows are of the same measurement."""


def newest(benchmark: str, rows: Sequence[Row]) -> list[Row]:
  """Returns the last row of every measurement, in the order of the first."""
  found = {}
  for row in rows:
    same = [row.get(key) for key in IDENTITY[benchmark]]
    found[json.dumps(same)] = row
  return list(found.values())


def measured_on(rows: Sequence[Row]) -> str:
  """Says on what machines rows were measured, and of which commits."""
  said = dict.fromkeys(
    ', '.join(
      [
        str(row.get('processor', '')),
        f'{row.get("cores", "?")} cores',
        *([str(row['device'])] if row.get('device') else []),
        f'commit {row.get("commit", "")[:9]}',
      ]
    )
    for row in rows
    if row.get('axis') != 'fit'  # which has nothing of its own
  )
  return '; '.join(said)


def draw(benchmark: str, rows: Sequence[Row]) -> dict[str, bytes]:
  """Returns pictures of a benchmark by the names of their files."""
  if benchmark == 'merge':
    parts = [p for p in ('memory', 'disk') if any(p == r['part'] for r in rows)]
    return {f'merge_{part}.png': pictures.merges(rows, part) for part in parts}
  drawn = {
    'meta_step': pictures.steps,
    'scaling': pictures.scaling,
    'checkpoint': pictures.checkpoints,
  }
  if benchmark not in drawn:
    return {}
  return {f'{benchmark}.png': drawn[benchmark](rows)}


def main(argv):
  """Prints tables and writes pictures."""
  if len(argv) < 2:
    raise app.UsageError('name a file of rows')
  rows = [row for path in argv[1:] for row in records.read(path)]
  for benchmark, table in TABLES.items():
    own = newest(benchmark, [r for r in rows if r['benchmark'] == benchmark])
    if not own:
      continue
    print(f'## {benchmark}\n\n{table(own)}\n\nOn {measured_on(own)}.\n')
    if _PICTURES.value:
      folder = Path(_PICTURES.value)
      folder.mkdir(parents=True, exist_ok=True)
      for name, data in draw(benchmark, own).items():
        (folder / name).write_bytes(data)


if __name__ == '__main__':
  app.run(main)
