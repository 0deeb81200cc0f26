"""Time and memory against the number of experts and of devices.

  python -m benchmarks.bench_scaling --picture=scaling.png --out=FILE

Of merges without data, on random models with the shapes of CLIP's ViT-B/32, and
of steps of learned merges, on random weights of the pool's tower (192 wide, 8
layers, 65 tokens). Each is a process of its own, so that its memory is, too.
`fixed + marginal K` is fitted to the medians over the numbers of experts, with
R^2. Where there is no accelerator the devices are parts of the host, which
share its cores: what more of them cost then is seen, and not what they save.
What devices compute together is compared with what one computes, before it is
timed. Linux only.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import os
from pathlib import Path
import statistics
import sys
from typing import Any

from absl import app
from absl import flags
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import pictures
from benchmarks import records
from benchmarks import runs
from benchmarks import scaling_fits

_MERGES = flags.DEFINE_list('merges', 'task_arithmetic,ties', 'without data')
_STEPS = flags.DEFINE_list('steps', 'dam_paper,dam_robust', 'that learn')
_EXPERTS = flags.DEFINE_list('experts', '2,4,6,8', 'numbers of experts')
_DEVICES = flags.DEFINE_list('devices', '1,2', 'numbers of devices')
_FIXED = flags.DEFINE_integer(
  'fixed_experts', 4, 'experts where the number of devices changes'
)
_LAYERS = flags.DEFINE_integer('layers', 12, "of the merges' tower")
_WIDTH = flags.DEFINE_integer('width', 768, "of the merges' tower")
_STEP_LAYERS = flags.DEFINE_integer('step_layers', 8, "of the steps' tower")
_STEP_WIDTH = flags.DEFINE_integer('step_width', 192, "of the steps' tower")
_IMAGE = flags.DEFINE_integer('image', 32, 'side of the images of steps')
_BATCH = flags.DEFINE_integer('batch', 16, 'images a task and draw')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'of each at most')
_SECONDS = flags.DEFINE_float('seconds', 60, 'after which repeating stops')
_PICTURE = flags.DEFINE_string('picture', '', 'PNG file to write')
_QUICK = flags.DEFINE_bool('quick', False, 'small towers, few runs')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')

TOLERANCE = 1e-4
"""Of a leaf's norm, relative, between one device and several."""


def sizes() -> dict[str, dict[str, int]]:
  """Returns what is asked of the towers, by 'merge' and 'step'."""
  return {
    'merge': {'width': _WIDTH.value, 'layers': _LAYERS.value},
    'step': {
      **{'width': _STEP_WIDTH.value, 'layers': _STEP_LAYERS.value},
      **{'image': _IMAGE.value, 'batch': _BATCH.value},
    },
  }


def measure(
  what: str, method: str, experts: int, devices: int
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the row of one process, and norms of what came out first.

  The norms are of leaves that are not zero everywhere.
  """
  size = sizes()[what]
  options = {
    **{'what': what, 'method': method, 'experts': experts},
    **{'devices': devices, 'size': size},
  }
  env = {'JAX_NUM_CPU_DEVICES': str(devices)}
  with runs.Worker(sys.executable, 'scaling_runs', options, env) as worker:
    first, norms = worker.ask('first'), np.array(worker.ask('norms'))

    def run():
      return worker.ask('run')

    [times] = runs.alternate([run], _REPEATS.value, _SECONDS.value)
    memory = worker.ask('memory')
  about = worker.about
  row = {
    **{key: options[key] for key in ('what', 'method', 'experts', 'devices')},
    'shared_cores': about['platform'] == 'cpu',
    'first': first,
    'runs': times,
    # An accelerator's allocator knows; of the host the operating system does.
    'peak': memory['peak_bytes_in_use']
    if memory
    else first['held'] + first['peak'],
    **size,
    **about,
  }
  return row, norms[norms > 0]


def measure_all() -> Iterator[dict[str, Any]]:
  """Yields a row for each process, twice where it is on both axes.

  Raises:
    ValueError: where several devices compute something else than one.
  """
  experts = [int(num) for num in _EXPERTS.value]
  devices = [int(num) for num in _DEVICES.value]
  each = {'merge': _MERGES.value, 'step': _STEPS.value}
  for what, names in each.items():
    for method in filter(None, names):
      found = functools.cache(functools.partial(measure, what, method))
      for num in experts:
        yield {'axis': 'experts', **found(num, 1)[0]}
      want = found(_FIXED.value, 1)[1]
      for num in devices:
        row, norms = found(_FIXED.value, num)
        error = float(np.max(np.abs(np.subtract(norms, want)) / want))
        if not error <= TOLERANCE:
          raise ValueError(f'{method}: {num} devices differ by {error:.1e}')
        yield {'axis': 'devices', **row, 'difference': error}


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
  table = Table(
    *('against', '', 'method', 'K', 'devices', 'compile, s', 'seconds', 'CPU'),
    *('memory, MB', 'beyond inputs', 'error'),
  )
  for row in rows:
    times = [x['seconds'] for x in row['runs']]
    table.add_row(
      *(row['axis'], row['what'], row['method']),
      *(str(row['experts']), str(row['devices']), f'{row["compile"]:.1f}'),
      f'{pictures.median(row["runs"]):.3g} ({min(times):.3g}-{max(times):.3g})',
      f'{statistics.median(x["cpu"] for x in row["runs"]):.3g}',
      f'{row["peak"] / 1e6:.0f}',
      f'{row["first"]["peak"] / 1e6:.0f}',
      f'{row["difference"]:.0e}' if 'difference' in row else '',
    )
  return table


def _fit_table(found: Sequence[Mapping[str, Any]]) -> Table:
  table = Table('', 'method', 'of', 'fixed', 'each expert', 'R^2')
  for row in found:
    unit, name = (1, 's') if row['of'] == 'seconds' else (1e6, 'MB')
    table.add_row(
      *(row['what'], row['method'], row['of']),
      f'{row["fixed"] / unit:.3g} {name}',
      f'{row["marginal"] / unit:.3g} {name}',
      f'{row["r2"]:.3f}',
    )
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(
      **{'layers': 1, 'width': 384, 'step_layers': 1, 'step_width': 64},
      **{'image': 16, 'batch': 4, 'experts': ['2', '3', '4']},
      **{'fixed_experts': 2, 'repeats': 9, 'seconds': 5.0},
      merges=['ties'],
      steps=['dam_paper'],
    )
  load, rows = os.getloadavg(), []
  for row in measure_all():
    rows.append(row)
    records.append(_OUT.value, 'scaling', [row], load=load)
  found = scaling_fits.fits(rows)
  records.append(_OUT.value, 'scaling', found, load=load)
  console = Console(width=None if sys.stdout.isatty() else 150)
  console.print(_table(rows), _fit_table(found))
  if any(row['shared_cores'] for row in rows):
    console.print('Devices are parts of the host and share its cores.')
  console.print(f'load before: {load[0]:.1f}')
  if _PICTURE.value:
    Path(_PICTURE.value).write_bytes(pictures.scaling([*rows, *found]))


if __name__ == '__main__':
  app.run(main)
