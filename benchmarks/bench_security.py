"""Whether `dam_released` defends as the PyTorch code that it stands for.

  python -m benchmarks.bench_security --pool=PATH --fusion_bench_python=PYTHON \
    --folder=PATH

Merges a pool's experts with both, on the same dev images and for the same
number of steps and seeds, and measures both on the same test images and
triggers. FusionBench never merges the visual projection, so that all experts
get the base's here, for both. What the folder has is not computed again.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_dict
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import security_runs
from benchmarks.security_runs import OURS
from configs import pool as pool_config
from dam_jax import checkpoint

_POOL = flags.DEFINE_string('pool', '', 'folder of a pool')
_PEER = flags.DEFINE_string(
  'fusion_bench_python', '', 'a Python that has fusion-bench'
)
_FOLDER = flags.DEFINE_string('folder', '', 'where to write')
_BAD = flags.DEFINE_string(
  'bad', 'badmerging_cifar100,badmerging_gtsrb', 'backdoored checkpoints'
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'merges of each')
_STEPS = flags.DEFINE_integer('steps', 1000, 'of the mask')
_COEFFICIENT_STEPS = flags.DEFINE_integer(
  'coefficient_steps', 1000, 'of the coefficients after it'
)
_TEST = flags.DEFINE_integer('test', 0, 'test images a task; 0 is all')


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
  if not (_POOL.value and _PEER.value and _FOLDER.value):
    raise app.UsageError(
      '--pool, --fusion_bench_python and --folder are needed'
    )
  logging.set_verbosity(logging.WARNING)
  console, folder = Console(width=110), Path(_FOLDER.value)
  security_runs.share_projection(Path(_POOL.value), folder / 'pool')
  mine, peers = [], []
  for seed in range(_SEEDS.value):
    config = _config(folder / 'pool', seed)
    mine.append(security_runs.ours(config, folder / OURS / str(seed)))
    peer = folder / 'fusion_bench' / str(seed)
    peers.append(security_runs.theirs(config, _PEER.value, peer))
    console.print(f'seed {seed}: done')
  seconds = {
    name: float(np.mean([taken for _, taken in runs]))
    for name, runs in ((OURS, mine), ('FusionBench', peers))
  }
  found = security_runs.rows(
    [hits for hits, _ in mine], [hits for hits, _ in peers]
  )
  record = {
    'rows': found,
    'seconds': seconds,
    'steps': [_STEPS.value, _COEFFICIENT_STEPS.value],
    'versions': checkpoint.versions(),
  }
  checkpoint.write(folder / 'security.json', json.dumps(record, indent=2))
  console.print(_table(found, seconds))


if __name__ == '__main__':
  app.run(main)
