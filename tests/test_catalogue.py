"""What the catalogue says of methods is so."""

import jax.numpy as jnp
import pytest

import dam_jax as dj
from dam_jax import catalogue
from dam_jax import streaming


@pytest.mark.parametrize('name', catalogue.DATA_FREE)
def test_passes_are_counted(name):
  entry = catalogue.DATA_FREE[name]
  num = min(3, entry.most)
  required = {'weights': [1.0] * num} if name == 'weighted_average' else {}
  tx = catalogue.build(name, required)
  assert streaming.passes(tx, num) == int(entry.passes)


@pytest.mark.parametrize(
  'entry',
  [
    *catalogue.DATA_FREE.values(),
    *catalogue.INFORMED.values(),
    *catalogue.LEARNED.values(),
  ],
)
def test_docstrings_cite_a_paper(entry):
  title, url = entry.reference
  assert title[0].isupper()
  assert url.startswith('https://')
  assert entry.summary.endswith('.')
  assert getattr(dj, entry.factory.__name__) is entry.factory


def test_table_has_a_row_for_each():
  rows = catalogue.table().splitlines()
  for name in (*catalogue.DATA_FREE, *catalogue.INFORMED, *catalogue.LEARNED):
    assert sum(row.startswith(f'| `{name}` |') for row in rows) == 1


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('tie', {}, "no method 'tie', there are average"),
    ('ties', {'densty': 1}, "no option 'densty'; its options are density"),
    ('weighted_average', {}, "option 'weights' is missing"),
    ('dare', {'then.density': 0.1}, 'without then'),
    ('dare', {'then': 'tie'}, "no method 'tie'"),
    ('ties', {'density': 'x'}, 'ties: '),
  ],
)
def test_what_cannot_be_built_is_said(name, options, message):
  with pytest.raises(ValueError, match=message):
    catalogue.build(name, options)


def test_then_takes_options():
  options = {'rate': 0.0, 'then': 'task_arithmetic', 'then.scale': 0.5}
  tx = catalogue.build('dare', options)
  base, experts = {'w': jnp.ones(1)}, {'w': jnp.array([[2.0], [4.0]])}
  assert dj.merge(tx, base, experts).params['w'] == pytest.approx(3.0)
