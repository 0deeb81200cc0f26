"""Tables and pictures of rows of every benchmark."""

from absl import flags
from absl.testing import flagsaver
import pytest

from benchmarks import records
from benchmarks import tables

RUNS = [{'seconds': 2.0, 'cpu': 3.0}]
MERGE = {
  **{'part': 'memory', 'method': 'ties', 'variant': 'as mergekit'},
  **{'experts': 2, 'form': 'stacked', 'bytes': 16e9, 'parameters': 1e9},
}
SCALING = {'what': 'merge', 'method': 'ties'}
ROWS = {
  'meta_step': [
    {'model': 'pool', 'method': 'dam_robust', 'seconds': [1.0, 3.0]},
    {
      **{'model': 'nano', 'method': 'dam_paper', 'experts': 2},
      **{'compute': 'float32', 'ours': RUNS, 'torch': RUNS, 'compile': 4.0},
      **{'first': {'torch': {'seconds': 5.0, 'peak': 1e9}}},
      'counted': {'inner': {'flops': 1e12}, 'masks': {'flops': 2e12}},
      'machine': {'flops': 3e12},
    },
    {
      **{'model': 'pool', 'method': 'dam_robust', 'experts': 6},
      **{'program': 'torch', 'seconds': [9.0], 'cpu': [8.0], 'compile': 1.5},
      **{'compute': 'float32', 'peak': 2e9, 'flops': 3e12, 'mfu': 0.25},
    },
  ],
  'merge': [
    {
      **MERGE,
      'ours': RUNS,
      'copy': RUNS,
      'peers': {'mergekit': {'runs': [{'seconds': 10.0}], 'difference': 0.0}},
    },
    {**MERGE, 'experts': 20, 'missing': {'ours': 'needs about 106 models'}},
  ],
  'scaling': [
    {
      **SCALING,
      **{'axis': axis, 'experts': 2, 'devices': 2, 'shared_cores': True},
      **{'compile': 1.0, 'runs': RUNS, 'peak': 5e6},
    }
    for axis in ('experts', 'devices')
  ]
  + [
    {
      **{**SCALING, 'axis': 'fit', 'of': of, 'fixed': 1.0},
      **{'marginal': 0.5, 'r2': 0.999},
    }
    for of in ('seconds', 'peak')
  ],
  'checkpoint': [
    {
      **{'kind': 'orbax', 'direction': 'restore', 'cache': 'dropped'},
      **{'held': 0.0, 'bytes': 4e9, 'seconds': 2.0, 'gbps': 2.0},
      **{'of_copy': 0.5, 'runs': RUNS, 'copy': RUNS, 'read': RUNS},
    }
  ],
  'input': [
    {
      **{'kind': 'png_32', 'threads': 2, 'batch': 64, 'images': 1000},
      **{'per_second': 500.0, 'cpu': 3.0, 'runs': RUNS},
    }
  ],
  'security': [
    {
      **{'metric': 'acc', 'task': 'mean', 'ours': [0.7, 0.6, 0.8]},
      **{'peer': [0.7, 0.6, 0.8], 'difference': [0.0, -0.01, 0.01]},
    }
  ],
  'clip_parity': [
    {
      **{'model': 'vit_b32', 'what': 'logits', 'error': 2e-7},
      **{'limit': limit, 'verdict': verdict},
    }
    for limit, verdict in ((1e-5, 'same'), (None, 'measured'))
  ],
  'parity': [
    {
      **{'method': 'ties', 'program': program, 'verdict': 'same'},
      **{'error': error, 'peer': str(error)},
    }
    for program, error in (
      ('mergekit', 1e-7),
      ('mergekit', 2e-7),
      ('fusion_bench', 3e-8),
    )
  ],
}
SAID = {
  'meta_step': '| dam_robust | 6 | float32 | torch | 9 | 8 | 1.5 |  | 2 |',
  'merge': '| 2 | 8 | 200% | mergekit | 10 | 5.0 |',
  'scaling': '| ties | seconds | 1 | 0.5 | 0.999 |',
  'checkpoint': '| orbax | restore | dropped (0% stay) | 4e+03 | 2 | 2 | 50% |',
  'input': '| png_32 | 2 | 500 | 3 |',
  'security': '| ACC, mean | 70.0 (60.0 to 80.0) |',
  'clip_parity': '| vit_b32 | logits | 2.0e-07 | 1e-05 | same |',
  'parity': '| ties | 2.0e-07 | 3.0e-08 | same |',
}


@pytest.mark.parametrize('benchmark', tables.TABLES)
def test_rows_become_a_table(benchmark):
  text = tables.TABLES[benchmark](ROWS[benchmark])
  assert SAID[benchmark] in text
  for table in text.split('\n\n'):
    # All lines of a table have as many cells.
    assert len({line.count('|') for line in table.split('\n')}) == 1


def test_programs_of_a_step_get_a_line_each():
  text = tables.meta_step(ROWS['meta_step'])
  head = '| nano | dam_paper | 2 | float32'
  assert f'{head} | ours | 2 | 3 | 4 |  |  | 3 | 50% |' in text
  assert f'{head} | torch | 2 | 3 |  | 5 | 1 | 3 | 50% |' in text


def test_what_is_left_out_is_said():
  assert 'ours: needs about 106 models' in tables.merge(ROWS['merge'])


def test_the_newer_row_counts():
  old, new = ({**ROWS['checkpoint'][0], 'seconds': x} for x in (1.0, 2.0))
  assert tables.newest('checkpoint', [old, new]) == [new]
  assert len(tables.newest('merge', ROWS['merge'])) == 2


def test_command_prints_all_and_draws(tmp_path, capsys):
  path = str(tmp_path / 'rows.jsonl')
  for benchmark, rows in ROWS.items():
    records.append(path, benchmark, rows)
  with flagsaver.flagsaver():
    flags.FLAGS(['tables', f'--pictures={tmp_path / "pictures"}'])
    tables.main(['tables', path])
  said = capsys.readouterr().out
  for benchmark in ROWS:
    assert f'## {benchmark}\n' in said
  drawn = sorted((tmp_path / 'pictures').iterdir())
  assert [file.stem for file in drawn] == [
    *('checkpoint', 'merge_memory', 'meta_step', 'scaling')
  ]
  for file in drawn:
    assert file.read_bytes().startswith(b'\x89PNG')
