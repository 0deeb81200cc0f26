"""What readers get from a run's numbers."""

import html.parser
import io
import json
import re

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from rich.console import Console

from dam_jax import attacks
from experiments import pictures
from experiments import report as report_lib

TASKS = ('one', 'two')


def _row(method, task, role, metric, value, n=100):
  return {
    'method': method,
    'task': task,
    'role': role,
    'metric': metric,
    'value': value,
    'low': max(0.0, value - 0.05),
    'high': min(1.0, value + 0.05),
    'n': n,
  }


def _report(*, bad=True, target_name='<b>Stop</b> & "go"'):
  rows = []
  table = {
    'task_arithmetic': (0.7, 0.9),
    'dam_robust': (0.72, 0.1),
    'base': (0.5, 0.02),
    'single': (0.8, 1.0),
    'clean_merge': (0.71, 0.03),
  }
  for name, (acc, asr) in table.items():
    rows += [_row(name, t, 'clean', 'acc', acc) for t in TASKS]
    rows += [_row(name, t, 'all', 'acc', acc) for t in ('mean', 'worst')]
    if bad:
      rows.append(_row(name, 'two', 'attacked', 'asr', asr))
      rows += [
        _row(name, t, 'attacked', m, asr)
        for t in ('mean', 'worst')
        for m in ('asr', 'ra')
      ]
  attack = {
    'model': 'bad_two',
    'task': 'two',
    'target': 1,
    'target_name': target_name,
    'kind': 'patch',
  }
  record = {
    'tasks': list(TASKS),
    'attacked': [attack] if bad else [],
    'experts': {'one': 'clean_one', 'two': 'bad_two' if bad else 'clean_two'},
    'seeds': {'merge': 0},
    'command': 'python -m experiments.merge',
    'config': {
      'pool': 'p',
      'report_on': 'test',
      'options': {'ties': {'density': 0.2}},
    },
    'options': {},
    'hashes': {'base': 'ab'},
    'versions': {'dam_jax': '0'},
    'device': 'cpu',
    'peak_rss_mib': 100.0,
    'seconds': {'base': {'total': 1.0, 'steps': 0, 'compile': 0, 'step': 0}},
    'seconds_total': 2.0,
    'finished': 'now',
    'transfer': {},
  }
  return {'rows': rows, 'record': record}


class _Page(html.parser.HTMLParser):
  """Collects a page's tags, what they load, and its text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.loads, self.text = [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.loads += [
      value for key, value in attributes if key in ('src', 'href', 'srcset')
    ]

  def handle_data(self, data):
    self.text += data


def _page(report):
  return _Page(
    report_lib.html(report, {'acc_asr': report_lib.scatter(report)}, {})
  )


def test_markdown_has_a_line_a_method_and_a_cell_a_column():
  report = _report()
  lines = report_lib.markdown(report).split('\n')
  cells = [line.count('|') for line in lines[:7]]
  assert len(set(cells)) == 1
  assert '| task_arithmetic | 70.0 (65.0\N{EN DASH}75.0) |' in lines[2]
  assert [c for c in report_lib.columns(report) if c[0] == 'asr'] == [
    ('asr', 'two')
  ]
  assert lines[3].startswith('| dam_robust ')
  assert 'base, zero-shot' in lines[4]


def test_terminal_table_shows_values_and_intervals():
  out = io.StringIO()
  Console(file=out, width=120).print(report_lib.terminal(_report(), 120))
  line = next(x for x in out.getvalue().split('\n') if 'dam_robust' in x)
  assert re.findall(r'[\d.]+±[\d.]+', line)[:3] == [
    '72.0±5.0',
    '72.0±5.0',
    '10.0±5.0',
  ]


def test_a_narrow_terminal_gets_the_values_alone():
  out = io.StringIO()
  Console(file=out, width=70).print(report_lib.terminal(_report(), 70))
  text = out.getvalue()
  assert '±' not in text.split('Per cent')[0]
  assert 'dam_robust' in text
  assert '\N{HORIZONTAL ELLIPSIS}' not in text


def test_page_needs_nothing_else_and_escapes_names():
  page = _page(_report())
  assert page.loads
  assert all(x.startswith('data:image/png;base64,') for x in page.loads)
  assert 'b' in page.tags  # of the tiles,
  assert '<b>Stop</b> & "go"' in page.text  # not of a class's name
  assert not {'script', 'link', 'iframe', 'object'} & set(page.tags)


def test_summary_says_what_a_plain_merge_inherits_and_what_is_left():
  text = report_lib.summary(_report(target_name='Stop'))
  for piece in ('Two image', 'One of them is', 'Stop', '90.0', '10.0', '3.0'):
    assert piece in text


def test_without_bad_experts_the_report_is_about_accuracy():
  report = _report(bad=False)
  assert 'None of them is known' in report_lib.summary(report)
  assert 'known to be backdoored' in _page(report).text
  assert report_lib.columns(report) == [('acc', 'mean'), ('acc', 'worst')]


def test_a_report_survives_json():
  report = _report()
  again = json.loads(json.dumps(report))
  assert report_lib.markdown(again) == report_lib.markdown(report)
  assert report_lib.scatter(again) == report_lib.scatter(report)


@pytest.mark.parametrize('count', [1, 25])
def test_labels_of_points_stay_on_the_picture(count):
  methods = {
    f'dam_released_{i}': {
      'acc': (0.7 + 1e-3 * i, 0.69, 0.72),
      'asr': (0.9, 0.88, 0.92),
    }
    for i in range(count)
  }
  png = pictures.acc_asr(methods, [], names={})
  with Image.open(io.BytesIO(png)) as image:
    assert image.width > 800
    assert image.getpixel((2, 2))[:3] == (255, 255, 255)


def test_note_says_where_dev_images_stand_in():
  report = _report()
  assert 'take the place' not in report_lib.note(report)
  report['record']['config']['report_on'] = 'dev'
  assert 'dev images take the place of test' in report_lib.note(report)


def test_a_warp_is_shown_on_lines_and_a_patch_on_grey():
  x = jnp.linspace(-1, 1, 16)
  grid = jnp.stack(jnp.meshgrid(-x, x), -1)  # a mirror
  mirror = attacks.Warp(grid=grid, task='a', target=0)
  lines = np.asarray(pictures.lines((16, 16, 3)))
  found = pictures.shown(mirror, (16, 16, 3))
  np.testing.assert_allclose(found, lines[:, ::-1], atol=1e-5)
  assert not np.allclose(found, lines, atol=0.1)
  patch = attacks.patch_trigger((16, 16, 3), size=3, task='a', target=0)
  found = pictures.shown(patch, (16, 16, 3))
  assert (found[:13] == 0.5).all()
  assert (found[13:, 13:] != 0.5).all()
