"""Says with intervals which merges are safe: attacks, defences, ablations.

  python -m experiments.study --config=configs/study.py --workdir=PATH

Writes to the workdir: study.html, study.md, study.json, pictures/, and a folder
a cell in cells/, which is a run of `experiments.merge`. A study that is started
again with the same workdir runs what is missing or has failed.
"""

import collections
import json
import pathlib
import platform
import shlex
import sys
import time
import traceback
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console

from dam_jax import checkpoint
from experiments import cells as cells_lib
from experiments import command
from experiments import merge
from experiments import study_report


class _Hashes(collections.UserDict):
  """SHA-256 of files by path, each read once."""

  def __missing__(self, path: pathlib.Path) -> str | None:
    self[path] = checkpoint.file_hash(path) if path.exists() else None
    return self[path]


def _plain(config: config_dict.ConfigDict) -> Any:
  return json.loads(json.dumps(config.to_dict()))


def _state(
  folder: pathlib.Path, config: config_dict.ConfigDict, hashes: _Hashes
) -> str:
  """Says of a cell's folder: 'done', 'open', or 'other' for another run."""
  if not (folder / 'run.json').exists():
    return 'open'
  identity = json.loads((folder / 'run.json').read_text())
  checkpoints = pathlib.Path(config.pool) / 'checkpoints'
  same = identity['config'] == _plain(config) and all(
    hashes[checkpoints / f'{name}.safetensors'] == known
    for name, known in identity['hashes'].items()
  )
  if not same:
    return 'other'
  return 'done' if (folder / 'report.json').exists() else 'open'


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Runs what is missing of a study, and writes its report.

  Args:
    config: see `experiments.cells.KEYS`.
    workdir: where to write.
    console: to show progress on.

  Returns:
    What study.json holds.

  Raises:
    ValueError: where the config or a file makes no sense, or the workdir holds
      a cell of another study. A cell that fails is reported and no more.
  """
  cells = cells_lib.make(config)
  configs = [cells_lib.merge_config(config, cell) for cell in cells]
  folders = [workdir / 'cells' / cell.name for cell in cells]
  hashes = _Hashes()
  states = [
    _state(folder, own, hashes)
    for folder, own in zip(folders, configs, strict=True)
  ]
  if others := [
    str(f) for f, s in zip(folders, states, strict=True) if s == 'other'
  ]:
    raise ValueError(
      '\n  '.join(
        [
          'these hold runs with another config or other checkpoints, choose '
          'another workdir:',
          *others,
        ]
      )
    )
  if jax.config.values['jax_compilation_cache_dir'] is None:
    # Cells of other seeds are the same programs.
    cache = str((workdir / 'compiled').resolve())
    jax.config.update('jax_compilation_cache_dir', cache)
  failed = []
  for i, (cell, own, state) in enumerate(
    zip(cells, configs, states, strict=True)
  ):
    if state == 'done':
      continue
    begin = time.perf_counter()
    error = _run_cell(own, folders[i], workdir / 'suspects', console)
    seconds = time.perf_counter() - begin
    console.print(
      f'{i + 1}/{len(cells)} {cell.name}: {error or f"{seconds:.0f} s"}',
      highlight=False,
    )
    if error:
      failed.append({'cell': cell.name, 'error': error})
    command.forget_programs()
  study = _sum_up(config, cells, workdir, failed)
  _write(study, cells, workdir)
  console.print(f'\nreport: {workdir / "study.html"}')
  return study


def _run_cell(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  audits: pathlib.Path,
  console: Console,
) -> str:
  """Runs a cell and returns what went wrong, if anything."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'log.txt').open('a') as file, console.status(folder.name):
    try:
      merge.run(config, folder, Console(file=file, width=160), audits=audits)
    except (ArithmeticError, OSError, RuntimeError, ValueError) as e:
      traceback.print_exc(file=file)
      return f'{type(e).__name__}: {e}'
  return ''


def _sum_up(config, cells, workdir, failed) -> dict[str, Any]:
  """Puts together what study.json holds."""
  rows, runs = [], []
  for cell in cells:
    folder = workdir / 'cells' / cell.name
    runs += study_report.read(cell, folder)
    if (folder / 'report.json').exists():
      report = json.loads((folder / 'report.json').read_text())
      rows += [{'cell': cell.name, **row} for row in report['rows']]
  tables = study_report.tables(
    runs, cells_lib.sections(config), seed=config.seed, draws=config.draws
  )
  device = jax.devices()[0]
  record = {
    'command': shlex.join(['python', '-m', 'experiments.study', *sys.argv[1:]]),
    'config': config.to_dict(),
    'cells': len(cells),
    'versions': checkpoint.versions() | {'python': platform.python_version()},
    'device': f'{device.device_kind} x {jax.device_count()}',
    'finished': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
  }
  found = {'tables': tables, 'rows': rows, 'failed': failed, 'record': record}
  return json.loads(json.dumps(found))


def _write(study, cells, workdir) -> None:
  images = study_report.images(study, cells, workdir / 'cells')
  files: dict[str, str | bytes] = {
    'study.json': json.dumps(study, indent=2),
    'study.md': study_report.markdown(study),
    'study.html': study_report.html(study, images),
  }
  for section, found in images.items():
    for i, png in enumerate(found.values()):
      files[f'pictures/{section}_{i}.png'] = png
  for name, content in files.items():
    checkpoint.write(workdir / name, content)


if __name__ == '__main__':
  command.start(run, 'configs/study.py')
