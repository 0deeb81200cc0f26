"""Whether `dam_released` defends as the PyTorch code that it stands for.

  python -m benchmarks.bench_security --pool=PATH --fusion_bench_python=PYTHON \
    --folder=PATH --out=FILE

Merges a pool's experts with both, on the same dev images and for the same
number of steps and seeds, and measures both on the same test images and
triggers. FusionBench never merges the visual projection, so that all experts
get the base's here, for both. What the folder has is not computed again.
"""

from collections.abc import Mapping, Sequence
import contextlib
from pathlib import Path
import tempfile

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_dict
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks import runs
from benchmarks import security_runs
from benchmarks.security_runs import OURS
from configs import pool as pool_config
from dam_jax import checkpoint

_POOL = flags.DEFINE_string('pool', '', 'folder of a pool')
_PEER = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench'
)
_FOLDER = flags.DEFINE_string(
  'folder', '', 'where to write, and to go on from; empty is a temporary one'
)
_BAD = flags.DEFINE_string(
  'bad', 'badmerging_cifar100,badmerging_gtsrb', 'backdoored checkpoints'
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'merges of each')
_STEPS = flags.DEFINE_integer('steps', 1000, 'of the mask')
_COEFFICIENT_STEPS = flags.DEFINE_integer(
  'coefficient_steps', 1000, 'of the coefficients after it'
)
_TEST = flags.DEFINE_integer('test', 0, 'test images a task; 0 is all')
_QUICK = flags.DEFINE_bool(
  'quick', False, 'one seed, few steps and images: whether it works at all'
)
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def _config(pool: Path, seed: int) -> config_dict.ConfigDict:
  config = pool_config.get_config()
  config.pool, config.bad, config.methods = str(pool), _BAD.value, OURS
  config.test, config.seed, config.audit = _TEST.value, seed, False
  config.transfer_test = 0
  # FusionBench reads one image a task and draw.
  config.options[OURS].batch = 1
  config.options[OURS].steps = _STEPS.value
  config.options[OURS].coefficient_steps = _COEFFICIENT_STEPS.value
  return config


def _table(found: Sequence[Mapping], seconds: Mapping[str, float]) -> Table:
  title = ', '.join(f'{name}: {x:.0f} s' for name, x in seconds.items())
  table = Table(title=title)
  for name in ('metric', 'task'):
    table.add_column(name)
  for name in (OURS, 'FusionBench', 'difference'):
    table.add_column(name, justify='right')
  for row in found:
    cells = [
      '{:.1f} ({:.1f} to {:.1f})'.format(*(100 * x for x in row[name]))
      for name in ('ours', 'peer', 'difference')
    ]
    table.add_row(row['metric'].upper(), row['task'], *cells)
  return table


def main(argv):
  """Merges, compares and prints."""
  del argv
  if not (_POOL.value and _PEER.value):
    raise app.UsageError('--pool and --fusion_bench_python are needed')
  if _QUICK.value:
    runs.set_defaults(seeds=1, steps=4, coefficient_steps=2, test=20)
  logging.set_verbosity(logging.WARNING)
  with contextlib.ExitStack() as stack:
    folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
    _compare(Path(folder), Console(width=110))


def _compare(folder: Path, console: Console) -> None:
  security_runs.share_projection(Path(_POOL.value), folder / 'pool')
  mine, peers = [], []
  for seed in range(_SEEDS.value):
    config = _config(folder / 'pool', seed)
    mine.append(security_runs.ours(config, folder / OURS / str(seed)))
    peer = folder / 'fusion_bench' / str(seed)
    peers.append(security_runs.theirs(config, _PEER.value, peer))
    console.print(f'seed {seed}: done')
  seconds = {
    name: float(np.mean([taken for _, taken in merges]))
    for name, merges in ((OURS, mine), ('FusionBench', peers))
  }
  found = security_runs.rows(
    [hits for hits, _ in mine], [hits for hits, _ in peers]
  )
  records.append(
    _OUT.value,
    'security',
    found,
    seconds=seconds,
    seeds=_SEEDS.value,
    steps=[_STEPS.value, _COEFFICIENT_STEPS.value],
    test=_TEST.value,
    bad=_BAD.value.split(','),
    versions=checkpoint.versions(),
  )
  console.print(_table(found, seconds))


if __name__ == '__main__':
  app.run(main)
