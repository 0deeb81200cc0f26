"""Merges experts, some of them backdoored, and says what each merge is worth.

  python -m experiments.merge --config=configs/quickstart.py
  python -m experiments.merge --config=configs/pool.py --config.bad=4

Writes to the workdir: report.html, report.md, report.json, acc_asr.png, the
merged models in `models/`, learning curves in `curves/`. An interrupted run
goes on where it was when it is started again with the same --workdir; one that
is finished shows its table and does nothing.

Several hosts that share a disk run one merge together when each is started with
the same config and workdir, and with --coordinator (`dam_jax.distributed`).
Process 0 writes the files.
"""

from concurrent import futures
import contextlib
import functools
import json
import pathlib
import platform
import resource
import shlex
import sys
import time
from typing import Any

import jax
from ml_collections import config_dict
from rich import progress
from rich.console import Console

from dam_jax import checkpoint
from dam_jax import distributed
from experiments import command
from experiments import load
from experiments import measure
from experiments import merge_run
from experiments import pictures
from experiments import quickstart_pool
from experiments import report as report_lib


def run(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  console: Console,
  *,
  audits: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs all that a config asks for and writes the report.

  Args:
    config: see `experiments.load.KEYS`.
    workdir: where to write.
    console: to show progress and the table on.
    audits: where triggers found on experts are kept, which runs may share; the
      workdir's 'suspects' if None.

  Returns:
    What report.json holds.

  Raises:
    ValueError: where the config or a file makes no sense.
    FloatingPointError: where a loss is not finite.
  """
  begin = time.perf_counter()
  load.check_config(config)
  folder = pathlib.Path(config.pool)
  if not config.pool:
    folder = workdir / 'pool'
    if distributed.is_first():
      quickstart_pool.make_pool(folder, console=console, **config.make)
    distributed.wait('pool')
  setup = load.load(config, folder)
  distributed.check_agreement(
    {
      'config': config.to_dict(),
      'checkpoints': setup.hashes,
      'versions': checkpoint.versions(),
      'workdir': str(workdir),
    }
  )
  this = merge_run.Run(config, setup, workdir)
  names = [*this.controls(), *this.mergers]
  finished = workdir / 'report.json'
  if distributed.agreed(finished.exists()) and all(map(this.is_done, names)):
    report = json.loads(finished.read_text())
    console.print(report_lib.terminal(report, console.width))
    console.print(f'finished before, nothing to do: {finished}')
    return report
  results = {}
  executor = futures.ThreadPoolExecutor(max_workers=1)
  with contextlib.ExitStack() as stack:
    stack.callback(executor.shutdown, wait=False, cancel_futures=True)
    bars = stack.enter_context(_progress(console))
    if config.audit:
      bar = bars.add_task('triggers on experts', total=len(setup.tasks))
      advance = functools.partial(bars.advance, bar)
      this.audit(audits or workdir / 'suspects', advance)
      bars.remove_task(bar)
    this.compile_ahead(executor)
    total = bars.add_task('methods and controls', total=len(names))
    for name in names:
      steps = this.mergers[name].plan.steps if name in this.mergers else 0
      bar = bars.add_task(name, total=steps, visible=steps > 0)
      advance = functools.partial(bars.advance, bar)
      results[name] = this.result(name, advance)
      bars.remove_task(bar)
      bars.advance(total)
      console.print(_line(name, results[name]))
  report = _report(this, results, time.perf_counter() - begin)
  report['record']['suspects'] = this.suspicions()
  if distributed.is_first():
    _write_report(this, report)
  console.print(report_lib.terminal(report, console.width))
  console.print(report_lib.summary(report))
  console.print(f'\nreport: {workdir / "report.html"}')
  return report


def _progress(console: Console) -> progress.Progress:
  return progress.Progress(
    progress.TextColumn('{task.description}'),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
    console=console,
    transient=True,
  )


def _line(name: str, result: dict[str, Any]) -> str:
  means = {
    r['metric']: r['value'] for r in result['rows'] if r['task'] == 'mean'
  }
  text = f'{report_lib.CONTROLS.get(name, name)}: ACC {100 * means["acc"]:.1f}'
  if 'asr' in means:
    text += f', ASR {100 * means["asr"]:.1f}'
  seconds = result['seconds']
  return f'{text} ({seconds.get("total", 0.0):.0f} s + {seconds["test"]:.0f} s)'


def _report(
  this: merge_run.Run, results: dict[str, Any], seconds: float
) -> dict[str, Any]:
  """Puts together what report.json holds."""
  setup, config = this.setup, this.config
  merges = list(this.mergers)
  found = [r for name in [*merges, *results] for r in results[name]['rows']]
  found = list(
    {(r['method'], r['metric'], r['task']): r for r in found}.values()
  )
  if setup.attacked:
    for name in merges:
      found += measure.der_rows(found, name, merge_run.PLAIN)
  labels = {task.name: task.label_names for task in setup.pool.tasks}
  device = jax.devices()[0]
  record = {
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'config': config.to_dict(),
    'options': this.options,
    'seeds': {'merge': config.seed},
    'tasks': setup.tasks,
    'experts': {task: p.stem for task, p in setup.pool.experts.items()},
    'attacked': [
      {
        'model': name,
        'task': trigger.task,
        'target': trigger.target,
        'target_name': labels[trigger.task][trigger.target],
        'kind': trigger.kind,
      }
      for name, trigger in setup.pool.triggers.items()
    ],
    'hashes': setup.hashes,
    'versions': checkpoint.versions() | {'python': platform.python_version()},
    'device': f'{device.device_kind} x {jax.device_count()}',
    'peak_rss_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    'seconds': {name: r['seconds'] for name, r in results.items()},
    'seconds_total': seconds,
    'finished': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
    'transfer': {
      name: r['transfer'] for name, r in results.items() if r['transfer']
    },
  }
  return json.loads(json.dumps({'rows': found, 'record': record}))


def _write_report(this: merge_run.Run, report: dict[str, Any]) -> None:
  images = {'acc_asr': report_lib.scatter(report)}
  curves = {}
  if this.suspects:
    tasks = zip(this.setup.pool.tasks, this.suspects, strict=True)
    images['suspects'] = pictures.inversions(
      report['record']['suspects'],
      {this.setup.pool.experts[t.name].stem: s.own.picture for t, s in tasks},
    )
  for name in this.mergers:
    this.write_card(name, report_lib.security(report, name))
    for kind, into, key in (
      ('triggers', images, f'triggers/{name}'),
      ('curves', curves, name),
    ):
      path = this.workdir / kind / f'{name}.png'
      if path.exists():
        into[key] = path.read_bytes()
  checkpoint.write(this.workdir / 'acc_asr.png', images['acc_asr'])
  checkpoint.write(this.workdir / 'report.md', report_lib.markdown(report))
  checkpoint.write(
    this.workdir / 'report.html', report_lib.html(report, images, curves)
  )
  checkpoint.write(this.workdir / 'report.json', json.dumps(report, indent=2))


if __name__ == '__main__':
  command.start(run, 'configs/quickstart.py', hosts=True)
