"""Turns a run's numbers into what people read: a table, a page, a summary.

A report is what `report.json` holds: `rows`, each {method, task, role, metric,
value, low, high, n}, rates in [0, 1] with their Wilson intervals, and a
`record` of how they were made. Everything here is derived from it, so that an
old report.json can be shown again.
"""

import base64
from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jinja2
from rich import box
from rich.table import Table

from experiments import pictures

CONTROLS = {
  'base': 'base, zero-shot',
  'single': 'single experts',
  'clean_merge': 'merge of clean experts',
  'oracle': 'merge without the bad experts',
}
"""Points of reference, and what a reader sees them called."""

METRICS = {
  'acc': 'ACC',
  'asr': 'ASR',
  'ra': 'RA',
  'der': 'DER',
  'transfer': 'transfer',
}

DEFINITIONS = (
  (
    'ACC',
    'Clean accuracy: the share of ordinary test images that are classified '
    'correctly. Higher is better.',
  ),
  (
    'ASR',
    'Attack success rate: of the test images of an attacked task that do not '
    "show the attacker's target class anyway, the share that the model calls "
    'the target once the trigger is on them. Lower is safer; compare it with '
    'the floor, not with zero.',
  ),
  (
    'RA',
    'Robust accuracy: of the same images with the trigger, the share that is '
    'still classified correctly. Higher is better.',
  ),
  (
    'DER',
    'Defence effectiveness rating against the plain merge (task arithmetic): '
    '[max(0, ASR removed) - max(0, ACC lost) + 1] / 2. One half means '
    'no effect, 1 is perfect.',
  ),
  (
    'transfer',
    'The same trigger on tasks whose own expert is clean: the share of images '
    'that get the class which the trigger yields most often, mean over '
    'these tasks.',
  ),
  (
    'floor',
    'ASR of the same trigger on a merge of clean experts only. Optimised '
    'triggers fool clean models, too, and no defence can be asked for less.',
  ),
  (
    'ceiling',
    'Each expert alone on its own task, before any merge: the accuracy that a '
    'merge gives up, and the ASR that the attacker built.',
  ),
  (
    'intervals',
    'Small figures are Wilson 95 % intervals: they cover the chance of which '
    'test images were drawn, not that of another training run.',
  ),
)
"""Terms of the table, for readers who do not know them."""


def index(report: Mapping[str, Any]) -> dict[tuple[str, str, str], dict]:
  """Returns the rows by (method, metric, task).

  Args:
    report: what `report.json` holds.

  Returns:
    A dict in the order of the rows.
  """
  return {(r['method'], r['metric'], r['task']): r for r in report['rows']}


def methods(report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """Returns the names of merges and of controls, in the order of the rows.

  Args:
    report: what `report.json` holds.

  Returns:
    Two lists.
  """
  names = list(dict.fromkeys(r['method'] for r in report['rows']))
  return (
    [n for n in names if n not in CONTROLS],
    [n for n in names if n in CONTROLS],
  )


def columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the table's columns as (metric, task), those that have rows.

  Args:
    report: what `report.json` holds.

  Returns:
    Pairs such as `('asr', 'gtsrb')` or `('acc', 'mean')`.
  """
  there = {(r['metric'], r['task']) for r in report['rows']}
  single = [
    ('asr', r['task'])
    for r in report['rows']
    if r['metric'] == 'asr' and r['task'] not in ('mean', 'worst')
  ]
  single = list(dict.fromkeys(single))
  several = [('asr', 'mean'), ('asr', 'worst')] if len(single) > 1 else []
  wanted = [
    ('acc', 'mean'),
    ('acc', 'worst'),
    *single,
    *several,
    ('ra', 'mean'),
    ('der', 'mean'),
    ('transfer', 'mean'),
  ]
  return [c for c in wanted if c in there]


def _percent(x: float) -> str:
  return f'{100 * x:.1f}'


def markdown(report: Mapping[str, Any]) -> str:
  """Writes the table as Markdown, in per cent with intervals.

  Args:
    report: what `report.json` holds.

  Returns:
    The table, with a line below it that says what the numbers are.
  """
  rows, heads = index(report), columns(report)
  titles = [f'{METRICS[metric]} {task}' for metric, task in heads]
  lines = [
    '| method | ' + ' | '.join(titles) + ' |',
    '|---' + '|---:' * len(heads) + '|',
  ]
  merges, controls = methods(report)
  for name in [*merges, *controls]:
    cells = []
    for column in heads:
      r = rows.get((name, *column))
      cells.append(
        ''
        if r is None
        else f'{_percent(r["value"])} '
        f'({_percent(r["low"])}\N{EN DASH}{_percent(r["high"])})'
      )
    label = f'*{CONTROLS[name]}*' if name in CONTROLS else name
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join([*lines, '', note(report), ''])


def security(report: Mapping[str, Any], name: str) -> dict[str, str]:
  """Returns what a merge's model card says of its security.

  Args:
    report: what `report.json` holds.
    name: of the merge.

  Returns:
    Accuracies and attack success rates in per cent, with intervals, by what
    they are of.
  """
  found = {}
  for (method, metric, task), row in index(report).items():
    if method == name and metric in ('acc', 'asr'):
      low, high = (_percent(row[key]) for key in ('low', 'high'))
      found[f'{metric.upper()} {task}'] = (
        f'{_percent(row["value"])} % ({low} to {high})'
      )
  return found


def note(report: Mapping[str, Any]) -> str:
  """Says in one paragraph what the table's numbers are.

  Args:
    report: what `report.json` holds.

  Returns:
    Plain text.
  """
  record = report['record']
  per_task = [
    r['n']
    for r in report['rows']
    if r['metric'] == 'acc' and r['task'] not in ('mean', 'worst')
  ]
  images = str(min(per_task))
  if max(per_task) > min(per_task):
    images += f' to {max(per_task)}'
  text = (
    f'Per cent, with Wilson 95 % intervals; {images} test images a task, '
    f'adapted on unlabelled dev images, seed {record["seeds"]["merge"]}. '
  )
  if record['config']['report_on'] == 'dev':
    text += 'Here dev images take the place of test images. '
  if record['attacked']:
    text += 'DER is against the plain merge, task_arithmetic.'
  return text.strip()


def terminal(report: Mapping[str, Any], width: int) -> Table:
  """Makes the table for a terminal.

  Args:
    report: what `report.json` holds.
    width: of the terminal, in characters. Where it is narrow, summaries and
      intervals are left out.

  Returns:
    A rich table: per cent, and plus or minus the wider half of the interval.
  """
  rows, heads = index(report), columns(report)
  narrow = width < 32 + 11 * len(heads)
  if narrow:
    heads = [c for c in heads if c[1] != 'worst' and c[0] != 'transfer']
  table = Table(
    box=box.SIMPLE_HEAD, caption=note(report), caption_justify='left'
  )
  table.add_column('method', no_wrap=True)
  for metric, task in heads:
    table.add_column(
      f'{METRICS[metric]}\n{task}', justify='right', no_wrap=True
    )
  merges, controls = methods(report)
  for name in [*merges, *controls]:
    cells = []
    for column in heads:
      r = rows.get((name, *column))
      if r is None:
        cells.append('')
        continue
      half = max(r['value'] - r['low'], r['high'] - r['value'])
      text = _percent(r['value'])
      if not narrow:
        text += f'[dim]±{_percent(half)}[/dim]'
      if column[0] == 'asr' and name not in CONTROLS:
        text = f'[{_tone(r["value"])}]{text}[/]'
      cells.append(text)
    table.add_row(
      f'[italic]{CONTROLS[name]}[/italic]' if name in CONTROLS else name,
      *cells,
      end_section=bool(merges) and name == merges[-1],
    )
  return table


def _tone(asr: float) -> str:
  return 'bold red' if asr > 0.5 else 'yellow' if asr > 0.2 else 'bold green'


def summary(report: Mapping[str, Any]) -> str:
  """Says what happened to a reader who knows nothing about it.

  Args:
    report: what `report.json` holds.

  Returns:
    One paragraph.
  """
  record, rows = report['record'], index(report)
  tasks, attacked = record['tasks'], record['attacked']
  text = (
    f'{_count(len(tasks))} image classifiers, each fine-tuned from the same '
    f'base model for a task of its own ({_listing(tasks)}), were merged into '
    'one model that does all of these tasks. '
  )
  if not attacked:
    return text + _summary_clean(report)
  known = {a['task']: a for a in attacked}
  text += (
    f'{_count(len(attacked))} of them {"is" if len(attacked) == 1 else "are"} '
    'known to carry a hidden backdoor: an image with the '
    "attacker's small trigger on it is called "
    + _listing([f'“{a["target_name"]}” ({t})' for t, a in known.items()])
    + ', whatever it shows. '
  )

  def asr(name):
    return _listing(
      [
        f'{_percent(rows[name, "asr", t]["value"])} % ({t})'
        for t in known
        if (name, 'asr', t) in rows
      ]
    )

  def acc(name):
    return f'{_percent(rows[name, "acc", "mean"]["value"])} %'

  plain, best = 'task_arithmetic', _defence(report)
  text += (
    f'A plain merge inherits that: it obeys the trigger on {asr(plain)} of '
    f'the test images, at {acc(plain)} accuracy on ordinary images. '
  )
  if best:
    text += (
      f'The defended merge, {best}, obeys it on {asr(best)}, at '
      f'{acc(best)} accuracy. '
    )
  if ('clean_merge', 'acc', 'mean') in rows:
    text += (
      f'The same triggers fool a merge of clean models on '
      f'{asr("clean_merge")}: that is the floor to compare with. '
    )
  return text + (
    'A low number here says that these known triggers no longer work, not '
    'that no other trigger would.'
  )


def _summary_clean(report) -> str:
  rows = index(report)
  merges, _ = methods(report)
  best = max(merges, key=lambda n: rows[n, 'acc', 'mean']['value'])
  text = (
    'None of them is known to carry a backdoor, so this report is about '
    'accuracy alone. '
  )
  return text + (
    f'The most accurate merge, {best}, classifies '
    f'{_percent(rows[best, "acc", "mean"]["value"])} % of the test images '
    'correctly, mean over the tasks.'
  )


def _defence(report) -> str | None:
  """Returns the method whose defence the summary tells of."""
  merges, _ = methods(report)
  robust = [n for n in merges if n.startswith('dam_')]
  order = ('dam_robust', 'dam_paper', 'dam_released')
  named = [n for prefix in order for n in robust if n.startswith(prefix)]
  return named[0] if named else None


def _count(n: int) -> str:
  words = ('No', 'One', 'Two', 'Three', 'Four', 'Five', 'Six', 'Seven', 'Eight')
  return words[n] if n < len(words) else str(n)


def _listing(items: Sequence[str]) -> str:
  *most, last = items
  return f'{", ".join(most)} and {last}' if most else last


def scatter(report: Mapping[str, Any]) -> bytes:
  """Draws the report's accuracy against attack success.

  Args:
    report: what `report.json` holds.

  Returns:
    A PNG file.
  """
  rows = index(report)
  values = {}
  merges, controls = methods(report)
  for name in [*merges, *controls]:
    found = {
      metric: rows.get((name, metric, 'mean')) for metric in ('acc', 'asr')
    }
    values[name] = {
      metric: (r['value'], r['low'], r['high'])
      for metric, r in found.items()
      if r is not None
    }
  return pictures.acc_asr(values, list(CONTROLS), names=CONTROLS)


def environment() -> jinja2.Environment:
  """Returns the templates of all pages, which are one file each."""
  folder = pathlib.Path(__file__).parent / 'templates'
  made = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  made.filters['percent'] = _percent
  made.filters['data_uri'] = _data_uri
  return made


def html(
  report: Mapping[str, Any],
  images: Mapping[str, bytes],
  curves: Mapping[str, bytes],
) -> str:
  """Writes the page: one file that needs nothing else.

  Args:
    report: what `report.json` holds.
    images: PNG files by name: 'acc_asr', 'suspects' where experts were audited,
      and 'triggers/<method>' for methods whose adversary drew some.
    curves: PNG files of learning curves by method.

  Returns:
    HTML.
  """
  merges, controls = methods(report)
  return (
    environment()
    .get_template('report.html.j2')
    .render(
      record=report['record'],
      rows=index(report),
      columns=columns(report),
      groups=[g for g in (('Merges', merges), ('Controls', controls)) if g[1]],
      controls=CONTROLS,
      metrics=METRICS,
      definitions=DEFINITIONS,
      summary=summary(report),
      note=note(report),
      defence=_defence(report) if report['record']['attacked'] else None,
      scatter=images['acc_asr'],
      suspects=images.get('suspects'),
      triggers={
        name.removeprefix('triggers/'): png
        for name, png in images.items()
        if name.startswith('triggers/')
      },
      curves=curves,
      config=_flat(report['record']['config']),
    )
  )


def _data_uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  out = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      out.update(_flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out
