"""The largest differences between our merges and those of the PyTorch tools.

  python -m benchmarks.parity --fusion_bench_python=$(which python) \
    --mergekit_python=$(which python) --methods=ties,slerp

Makes random models, has each peer merge the files in its own environment (see
README.md here), merges the same files with ours and prints, for each row of
`benchmarks.parity_cases`, the largest `|ours - peer| / max|peer|` of any leaf
and model. Exits with 1 where one exceeds what float32 explains, or a known gap
has closed.
"""

import collections
from collections.abc import Sequence
import contextlib
from pathlib import Path
import sys
import tempfile

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Column
from rich.table import Table

from benchmarks import parity_runs
from benchmarks import records
from benchmarks import runs
from dam_jax import checkpoint

_FUSION_BENCH = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench; none: leave out'
)
_MERGEKIT = flags.DEFINE_string(
  'mergekit_python', '', 'a Python that has mergekit; none: leave it out'
)
_METHODS = flags.DEFINE_string('methods', 'all', 'names with commas')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'random models of each kind')
_FOLDER = flags.DEFINE_string('folder', '', 'keep the files here')
_QUICK = flags.DEFINE_bool('quick', False, 'one random model of each kind')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def _print(rows: Sequence[parity_runs.Row]) -> None:
  table = Table(
    *(Column(name, overflow='fold') for name in ('ours', 'peer')),
    'error',
    'verdict',
  )
  for case, said, worst in rows:
    table.add_row(
      parity_runs.describe(case.ours) if case.ours else '',
      f'{case.peer.name} {parity_runs.describe(case.peer)}',
      f'{worst.error:.1e}' if worst else '',
      f'{said}: {case.gap}' if case.gap else said,
    )
  counts = collections.Counter(row.verdict for row in rows)
  counts = ', '.join(f'{num} {name}' for name, num in counts.items())
  Console().print(table, f'{counts}; errors are relative')


def main(argv):
  """Compares and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(seeds=1)
  pythons = {
    name: python
    for name, python in (
      ('fusion_bench', _FUSION_BENCH.value),
      ('mergekit', _MERGEKIT.value),
    )
    if python
  }
  if not pythons:
    raise app.UsageError('give --fusion_bench_python or --mergekit_python')
  cases = parity_runs.select(_METHODS.value, pythons)
  with contextlib.ExitStack() as stack:
    folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
    rows, versions = parity_runs.compare(
      cases, pythons, Path(folder), _SEEDS.value
    )
  _print(rows)
  records.append(
    _OUT.value,
    'parity',
    [parity_runs.record(row) for row in rows],
    seeds=_SEEDS.value,
    versions={'dam_jax': checkpoint.versions(), **versions},
  )
  if any(row.verdict in parity_runs.FAILURES for row in rows):
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
