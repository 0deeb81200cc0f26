"""Merges experts, some of them backdoored, and says what each merge is worth.

  python -m experiments.merge --config=configs/quickstart.py
  python -m experiments.merge --config=configs/pool.py --config.bad=4

Writes to the workdir: report.html, report.md, report.json, acc_asr.png, the
merged models in `models/`, learning curves in `curves/`. An interrupted run
goes on where it was when it is started again with the same --workdir.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import platform
import resource
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from rich import progress
from rich.console import Console

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax.data import pipeline
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import command
from experiments import learn
from experiments import load
from experiments import measure
from experiments import methods
from experiments import pictures
from experiments import quickstart_pool
from experiments import repairs
from experiments import report as report_lib
from experiments import suspects

PLAIN = 'task_arithmetic'
"""The merge without a defence that DER compares with."""

Advance = Callable[[int], None]


class Run:
  """The methods and controls of one run, and what is on disk of them."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    setup: load.Setup,
    workdir: pathlib.Path,
  ):
    """Settles and checks all methods before any work.

    Args:
      config: of the run.
      setup: what the merges share.
      workdir: where to write.

    Raises:
      ValueError: where a method or option is unknown or makes no sense, or the
        workdir holds another run.
    """
    self.config, self.setup, self.workdir = config, setup, workdir
    self._programs: dict[str, futures.Future[learn.Program]] = {}
    self.suspects: list[suspects.Suspect] = []
    named = methods.parse(config.methods, len(setup.tasks))
    repaired = any(name in methods.REPAIRS for name in named)
    if (setup.attacked or repaired) and PLAIN not in named:
      named = [PLAIN, *named]
    self.options = methods.resolve(
      named,
      config.options,
      steps=config.steps,
      batch=config.batch,
      images=min(self.sizes),
    )
    self.mergers = {
      name: self._build(name, chosen) for name, chosen in self.options.items()
    }
    for name, merger in self.mergers.items():
      if merger.plan.steps:
        learn.check_batch(merger, self.sizes, self.options[name]['batch'])
    self.predict = evaluate.predictor(
      setup.image_logits_fn, batch=config.test_batch
    )
    _claim(workdir, {'config': config.to_dict(), 'hashes': dict(setup.hashes)})

  def audit(self, folder: pathlib.Path, advance: Advance) -> None:
    """Searches triggers on the experts, from which `dam_robust` then starts.

    Args:
      folder: where they are kept.
      advance: told how many experts are done.
    """
    setup = self.setup
    paths = [setup.pool.experts[task.name] for task in setup.pool.tasks]
    self.suspects = suspects.find(
      setup.image_logits_fn,
      setup.experts,
      setup.pool.tasks,
      [setup.hashes[path.stem] for path in paths],
      folder=folder,
      seed=self.config.seed,
      advance=advance,
    )
    for name, chosen in self.options.items():
      if name.startswith('dam_robust'):
        self.mergers[name] = self._build(name, chosen)

  def suspicions(self) -> list[dict[str, Any]]:
    """Returns what the search found on experts, the most suspicious first."""
    pool = self.setup.pool
    rows = [
      {
        'model': pool.experts[task.name].stem,
        'task': task.name,
        'known': 'bad' if task.name in pool.bad else '',
        'suspicion': suspect.suspicion,
        'target_name': task.label_names[suspect.target],
        'success': suspect.success,
      }
      for task, suspect in zip(pool.tasks, self.suspects, strict=False)
    ]
    return sorted(rows, key=lambda row: -row['suspicion'])

  def _build(self, name: str, chosen: dict[str, Any]) -> dj.Merger:
    setup = self.setup
    if name in methods.REPAIRS:
      plain = dj.task_arithmetic(**self.options[PLAIN])
      return repairs.merger(name, setup, chosen, plain)
    return methods.build(
      name,
      chosen,
      logits_fn=setup.logits_fn,
      task_logits_fn=setup.task_logits_fn,
      preprocess_fn=clip.normalize,
      image_shape=setup.image_shape,
      inputs_fn=setup.inputs_fn,
      levels=setup.levels,
      seeds=suspects.seeds(self.suspects) if self.suspects else None,
    )

  @property
  def sizes(self) -> list[int]:
    """Number of dev images of each task."""
    return [len(task.dev.images) for task in self.setup.pool.tasks]

  @functools.cached_property
  def data(self) -> pipeline.Unlabelled:
    """The dev images of all tasks, with the experts' predictions if needed."""
    images = [task.dev.images for task in self.setup.pool.tasks]
    padded = jnp.asarray(pipeline.pad_images(images))
    references = None
    if any(merger.plan.references for merger in self.mergers.values()):
      references = pipeline.references(
        self.setup.image_logits_fn,
        self.setup.experts,
        padded,
        self.sizes,
        batch=self.config.test_batch,
      )
    return pipeline.Unlabelled(padded, references)

  def controls(self) -> dict[str, Callable[[], Any]]:
    """Returns points of reference: what makes models, stacked for 'single'."""
    setup = self.setup
    tx = dj.task_arithmetic(**self.options.get(PLAIN, {}))
    bad = setup.pool.bad
    good = [t for t, n in enumerate(setup.tasks) if n not in bad]

    @jax.jit
    def plain(experts):
      return dj.merge(tx, setup.base, experts).params

    out = {'base': lambda: setup.base, 'single': lambda: setup.experts}
    if setup.attacked and setup.clean is not None:
      out['clean_merge'] = lambda: plain(setup.clean)
    if setup.attacked and good:
      out['oracle'] = lambda: plain(
        jax.tree.map(lambda x: x[np.array(good)], setup.experts)
      )
    return out

  @functools.cached_property
  def raveled(self) -> tuple[dj.tree.Raveled, dj.tree.Raveled]:
    """Base and experts as vectors, which learned merges compute with."""
    setup = self.setup
    return dj.tree.ravel(setup.base), dj.tree.ravel(setup.experts, leading=1)

  def compile_ahead(self, executor: futures.Executor) -> None:
    """Has a thread compile what is still to be learned, method by method.

    Args:
      executor: of one thread.
    """
    for name, merger in self.mergers.items():
      if merger.plan.steps and not self._result(name).exists():
        self._programs[name] = executor.submit(
          learn.compile_steps,
          merger,
          *self.raveled,
          data=self.data,
          batch=self.options[name]['batch'],
          compiler_options=self.config.compiler_options,
        )

  def merge(self, name: str, advance: Advance) -> tuple[Any, dict[str, float]]:
    """Runs one method and writes its model, curves and pictures.

    Args:
      name: of the method.
      advance: told how many steps are done.

    Returns:
      The merged model, and seconds.
    """
    setup, merger = self.setup, self.mergers[name]
    begin = time.perf_counter()
    seconds: dict[str, float] = {'compile': 0.0, 'step': 0.0}
    if merger.plan.steps:
      learned = learn.learn(
        name,
        merger,
        self._programs.pop(name).result(),
        *self.raveled,
        data=self.data,
        sizes=self.sizes,
        tasks=setup.tasks,
        batch=self.options[name]['batch'],
        seed=self.config.seed,
        folder=self.workdir,
        advance=advance,
      )
      params, seconds = learned.params, learned.seconds
      self._draw(name, learned)
    else:
      key = jax.random.key(self.config.seed)
      state = merger.init(key, setup.base, setup.experts)
      # Not jitted: it runs once, and compiling takes longer.
      params = merger.finalize(state, setup.base, setup.experts)
    jax.block_until_ready(params)
    seconds |= {
      'steps': merger.plan.steps,
      'total': time.perf_counter() - begin,
    }
    self._save(name, params)
    return params, seconds

  def _save(self, name: str, params: Any) -> None:
    setup, base = self.setup, self.setup.pool.base.stem
    experts = [path.stem for path in setup.pool.experts.values()]
    record = checkpoint.MergeRecord(
      method=name,
      hyperparameters=self.options[name],
      seed=self.config.seed,
      base={base: setup.hashes[base]},
      experts={expert: setup.hashes[expert] for expert in experts},
    )
    folder = self.workdir / 'models' / name
    checkpoint.save_params(
      folder / 'model.safetensors',
      params,
      name_map=convert.clip_vision,
      metadata=record.metadata(),
    )
    checkpoint.write(folder / 'merge_record.json', record.to_json())
    checkpoint.write(folder / 'config.json', setup.pool.config.read_text())

  def write_card(self, name: str, security: dict[str, str]) -> None:
    """Writes the model card of a merge, with what was measured of it."""
    folder = self.workdir / 'models' / name
    text = (folder / 'merge_record.json').read_text()
    record = checkpoint.MergeRecord.from_json(text)
    record = dataclasses.replace(record, security=security)
    checkpoint.write(folder / 'README.md', checkpoint.model_card(record))

  def _draw(self, name: str, learned: learn.Learned) -> None:
    setup = self.setup
    per_task = {k: x for k, x in learned.metrics.items() if x.ndim == 2}
    curves = pictures.curves(per_task, setup.tasks)
    checkpoint.write(self.workdir / 'curves' / f'{name}.png', curves)
    if masks := getattr(learned.state, 'masks', None):
      layout = self.raveled[0].layout
      dropped = {
        mask: {
          leaf: float(np.mean(share))
          for leaf, share in dj.masks.sparsity(logits, layout).items()
        }
        for mask, logits in masks.items()
      }
      text = json.dumps(dropped, indent=2)
      checkpoint.write(self.workdir / 'masks' / f'{name}.json', text)
    patch = getattr(learned.state, 'adversary', None)
    if not isinstance(patch, dj.perturbations.SoftPatch):
      return
    opacity, pattern = np.asarray(patch.opacity()), np.asarray(patch.pattern())
    grey = jnp.full(setup.image_shape, 0.5)
    true = {
      trigger.task: np.asarray(attacks.apply_trigger(trigger, grey))
      for trigger in setup.pool.triggers.values()
    }
    found = pictures.found_triggers(
      setup.tasks,
      true,
      0.5 * (1 - opacity) + opacity * pattern,
      opacity=opacity.mean(axis=(-3, -2, -1)),
    )
    checkpoint.write(self.workdir / 'triggers' / f'{name}.png', found)

  def measure(self, name: str, params: Any) -> dict[str, Any]:
    """Measures a model, or the single experts each on its own task.

    Writes what each image counted to `results/<name>.npz`.

    Args:
      name: of the method or control.
      params: of the model; stacked for 'single'.

    Returns:
      The report's rows and the transfer of each trigger.
    """
    setup = self.setup

    def own(t):
      return jax.tree.map(lambda x: x[t], params)

    alone = name in ('base', 'single')
    measured = measure.measure(
      self.predict,
      own if name == 'single' else lambda t: params,
      setup.pool,
      transfer_test=0 if alone else self.config.transfer_test,
    )
    file, hits = io.BytesIO(), dict[str, Any](measured.hits)
    np.savez_compressed(file, **hits)
    checkpoint.write(self._result(name).with_suffix('.npz'), file.getvalue())
    return {
      'rows': measure.rows(name, measured, setup.attacked),
      'transfer': measure.transfers(measured),
    }

  def _result(self, name: str) -> pathlib.Path:
    return self.workdir / 'results' / f'{name}.json'

  def result(self, name: str, advance: Advance) -> dict[str, Any]:
    """Returns what a method or control is worth, from disk where it is there.

    Args:
      name: of the method or control.
      advance: told how many steps are done.

    Returns:
      'rows', 'transfer' and 'seconds'.
    """
    path = self._result(name)
    if not path.exists():
      if name in self.mergers:
        params, seconds = self.merge(name, advance)
      else:
        params = self.controls()[name]()
        seconds = dict.fromkeys(('steps', 'compile', 'step', 'total'), 0.0)
      begin = time.perf_counter()
      found = self.measure(name, params)
      seconds['test'] = time.perf_counter() - begin
      checkpoint.write(
        path, json.dumps({**found, 'seconds': seconds}, indent=2)
      )
    return json.loads(path.read_text())


def _claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Makes a workdir this run's, or raises where it is another's."""
  path, text = workdir / 'run.json', json.dumps(identity, indent=2)
  if not path.exists():
    checkpoint.write(path, text)
  elif path.read_text() != text:
    raise ValueError(
      f'{workdir} holds a run with another config or other checkpoints: '
      'choose another workdir'
    )


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
    quickstart_pool.make_pool(folder, console=console, **config.make)
  setup = load.load(config, folder)
  this = Run(config, setup, workdir)
  names = [*this.controls(), *this.mergers]
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
  this: Run, results: dict[str, Any], seconds: float
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
      found += measure.der_rows(found, name, PLAIN)
  labels = {task.name: task.label_names for task in setup.pool.tasks}
  device = jax.devices()[0]
  record = {
    'command': shlex.join(['python', '-m', 'experiments.merge', *sys.argv[1:]]),
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


def _write_report(this: Run, report: dict[str, Any]) -> None:
  images = {'acc_asr': report_lib.scatter(report)}
  curves = {}
  if this.suspects:
    tasks = zip(this.setup.pool.tasks, this.suspects, strict=True)
    images['suspects'] = pictures.inversions(
      report['record']['suspects'],
      {this.setup.pool.experts[t.name].stem: s.picture for t, s in tasks},
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
  command.start(run, 'configs/quickstart.py')
