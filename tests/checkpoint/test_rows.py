"""Vocabularies of different sizes are fitted as the rule says."""

import numpy as np
import pytest

from dam_jax import checkpoint

PATH = 'embed/weight'


def model(*rows, dtype=np.float32):
  array = np.array([[r, -r] for r in rows], dtype)
  return checkpoint.open_model(
    {'embed': {'weight': array}, 'other': np.ones(2, np.float32)}
  )


BASE = model(1, 2, 3)
EXPERTS = {'more': model(10, 20, 30, 40, 50), 'some': model(7, 8, 9, 60)}


def fit(rule, base=BASE, experts=EXPERTS):
  base, experts = checkpoint.fit_rows(base, experts, {PATH: rule})
  found = {'base': base, **experts}
  for m in found.values():
    assert m.leaves[PATH].shape == m.read(PATH).shape
    assert m.leaves[PATH].dtype == m.read(PATH).dtype
    np.testing.assert_array_equal(m.read('other'), [1, 1])
  return {name: m.read(PATH)[:, 0].tolist() for name, m in found.items()}


def test_keep_takes_the_bases_leaf():
  assert set(map(tuple, fit('keep').values())) == {(1, 2, 3)}


def test_intersect_cuts_to_what_all_have():
  assert fit('intersect') == {
    'base': [1, 2, 3],
    'more': [10, 20, 30],
    'some': [7, 8, 9],
  }


def test_pad_fills_with_the_base_and_the_experts_mean():
  assert fit('pad') == {
    'base': [1, 2, 3, 50, 50],
    'more': [10, 20, 30, 40, 50],
    'some': [7, 8, 9, 60, 50],
  }
  larger = fit('pad', model(1, 2, 3, 4), {'less': model(5, 6)})
  assert larger == {'base': [1, 2, 3, 4], 'less': [5, 6, 3, 4]}


def test_dtypes_stay():
  base, experts = checkpoint.fit_rows(
    model(1, 2, dtype=np.float16), {'e': model(3, 4, 5)}, {PATH: 'pad'}
  )
  assert base.read(PATH).dtype == np.float16
  assert experts['e'].read(PATH).dtype == np.float32


def test_all_that_does_not_fit_is_named():
  wide = checkpoint.open_model({'embed': {'weight': np.ones((4, 3))}})
  none = checkpoint.open_model({'x': np.ones(1)})
  with pytest.raises(ValueError, match='cannot be fitted') as error:
    checkpoint.fit_rows(BASE, {'w': wide, 'n': none}, {PATH: 'crop'})
  for line in (
    "must be one of ('keep', 'pad', 'intersect'), got 'crop'",
    'n: embed/weight: missing',
    "more than its rows: {'base': [3, 2], 'w': [4, 3]}",
  ):
    assert line in str(error.value)
