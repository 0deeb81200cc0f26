"""The largest differences between our CLIP and transformers', in PyTorch.

  python -m benchmarks.clip_parity --torch_python=$(which python) --pool=POOL

In its own environment transformers makes CLIPs of true sizes, writes them, and
computes features, logits and gradients of CLIP's loss; ours opens the same
files. Then transformers opens what ours wrote. Prints the largest
`|ours - theirs| / max|theirs|` of any tensor, and how far bfloat16 is from
float32 in both. Exits with 1 where one exceeds its limit.
"""

import contextlib
from pathlib import Path
import sys
import tempfile

from absl import app
from absl import flags
from rich.console import Console
from rich.table import Column
from rich.table import Table

from benchmarks import clip_problem as problem
from benchmarks import clip_runs
from benchmarks import records
from benchmarks import runs
from dam_jax import checkpoint

_TORCH = flags.DEFINE_string(
  'torch_python', '', 'a Python that has torch and transformers'
)
_MODELS = flags.DEFINE_list('models', 'vit_b32', ', '.join(problem.SIZES))
_POOL = flags.DEFINE_string('pool', '', 'folder of a pool; none: leave it out')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'folder of a tokenizer; none: one of a few words'
)
_NUM = flags.DEFINE_integer('num', 4, 'images, and texts')
_SCAN = flags.DEFINE_bool(
  'scan_layers', False, 'compile one block of ours and loop over it'
)
_FOLDER = flags.DEFINE_string('folder', '', 'keep the files here')
_QUICK = flags.DEFINE_bool('quick', False, 'a tiny CLIP')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def _rows(folder: Path):
  python = _TORCH.value
  source = Path(_TOKENIZER.value) if _TOKENIZER.value else None
  yield from clip_runs.tokenizer(python, folder / 'tokenizer', source)
  if _POOL.value:
    pool = Path(_POOL.value)
    yield from clip_runs.tower(pool, python, folder / 'pool', _NUM.value)
  for name in _MODELS.value:
    yield from clip_runs.whole(
      *(name, python, folder / name, _NUM.value), scan_layers=_SCAN.value
    )


def main(argv):
  """Compares and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(models=['tiny'])
  if not _TORCH.value:
    raise app.UsageError('give --torch_python')
  if unknown := sorted({*_MODELS.value} - {*problem.SIZES}):
    there = ', '.join(problem.SIZES)
    raise app.UsageError(f'unknown: {", ".join(unknown)}; there are {there}')
  with contextlib.ExitStack() as stack:
    folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
    rows = list(_rows(Path(folder)))
    versions = clip_runs.versions(Path(folder))
  table = Table(
    *('model', Column('compared', overflow='fold'), 'error', 'limit', 'verdict')
  )
  for row in rows:
    limit = '' if row.limit is None else f'{row.limit:.0e}'
    table.add_row(
      *(row.model, row.what, f'{row.error:.1e}', limit, row.verdict)
    )
  Console().print(table)
  records.append(
    _OUT.value,
    'clip_parity',
    [{**row._asdict(), 'verdict': row.verdict} for row in rows],
    num=_NUM.value,
    versions={'dam_jax': checkpoint.versions(), 'transformers': versions},
  )
  if any(row.verdict == 'DIFFERS' for row in rows):
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
