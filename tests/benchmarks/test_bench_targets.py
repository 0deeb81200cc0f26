"""What is asked of a step on an accelerator."""

import pytest

from benchmarks import bench_targets as targets
from benchmarks import steps_ours

COMMON = {'model': 'nano', 'num': 3, 'batch': 2, 'threads': 1, 'scan': True}
LARGE = {'model': 'pool', 'num': 8, 'remat': True}


def test_every_row_is_run_once_and_the_first_one_first():
  cases = targets.list_cases(COMMON, LARGE, ['dam_paper', 'dam_released'])
  assert [case.kind for case in cases] == [
    *('whole', 'cached', 'fewer', 'whole', 'whole', 'whole', 'large')
  ]
  first, cached, fewer, *_, large = (case.options for case in cases)
  assert first == cached == {**fewer, 'num': 3}
  assert large == {**first, **LARGE}
  whole = {
    (case.options['method'], case.options['compute'])
    for case in cases
    if case.kind == 'whole'
  }
  assert len(whole) == 4


def test_figures_are_in_the_units_of_their_targets():
  row = {
    **COMMON,
    'method': 'dam_paper',
    'compute': 'bfloat16',
    'kind': 'whole',
    'step': 0.03,
    'compile': 21.0,
    'merge': 1.5e-3,
    'peak': 7e9,
  }
  found = {x.target: x.value for x in targets.figures(row, row)}
  assert found == pytest.approx(
    {
      targets.STEP['bfloat16']: 30,
      targets.MEMORY: 7,
      targets.COMPILE: 21,
      targets.MERGE: 1.5,
    }
  )
  fewer = {**row, 'kind': 'fewer', 'num': 2, 'step': 0.025}
  [marginal] = targets.figures(fewer, row)
  assert marginal.value == pytest.approx(5)
  assert marginal.value > marginal.target.most


def test_a_merge_is_timed_apart_from_the_step():
  options = {**COMMON, 'method': 'concrete_layer_wise', 'compute': 'float32'}
  job = steps_ours.load(**options)
  result = job.run(job.prepare())
  seconds = job.requests['merges'](result, 3)
  assert len(seconds) == 3
  assert min(seconds) > 0
