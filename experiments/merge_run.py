"""The methods and controls of a merge, and what is on disk of them."""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import io
import json
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from ml_collections import config_dict
import numpy as np

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import distributed
from dam_jax import evaluate
from dam_jax.data import pipeline
from dam_jax.data.tasks import Task
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import learn
from experiments import load
from experiments import measure
from experiments import methods
from experiments import pictures
from experiments import repairs
from experiments import settings
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
    sizes = settings.mesh_sizes(config.mesh)
    self.mesh = dj.sharding.make_mesh(sizes) if sizes else None
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
        batch, mesh = self.options[name]['batch'], self.mesh_of(name)
        learn.check_batch(merger, self.sizes, batch)
        if mesh is not None:
          dj.sharding.check_images(batch, mesh.shape['data'])
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
      setup.base,
      setup.experts,
      setup.pool.tasks,
      [setup.hashes[path.stem] for path in paths],
      base_hash=setup.hashes[setup.pool.base.stem],
      folder=folder,
      seed=self.config.seed,
      compiler_options=learn.usable(self.config.compiler_options),
      advance=advance,
    )
    for name, chosen in self.options.items():
      if name.startswith('dam_robust'):
        self.mergers[name] = self._build(name, chosen)

  def suspicions(self) -> list[dict[str, Any]]:
    """Returns what the search found on experts, the most suspicious first."""
    pool = self.setup.pool
    names = [pool.experts[task.name].stem for task in pool.tasks]
    rows = []
    for task, name, suspect in zip(
      pool.tasks, names, self.suspects, strict=False
    ):
      row = {
        'model': name,
        'task': task.name,
        'known': 'bad' if task.name in pool.bad else '',
        **_summary(suspect.own, task),
        'company': {names[i]: x for i, x in suspect.company.items()},
        'trust': suspect.trust,
      }
      if suspect.others is not None:
        row['others'] = {
          **_summary(suspect.others.found, task),
          'planter': names[suspect.others.by],
        }
      rows.append(row)
    return sorted(rows, key=lambda row: -row['suspicion'])

  def _build(self, name: str, chosen: dict[str, Any]) -> dj.Merger:
    merger = self._build_alone(name, chosen)
    mesh = self.mesh_of(name)
    if mesh is None:
      return merger
    rules = dj.sharding.VIT if mesh.shape['model'] > 1 else None
    dtype = jnp.bfloat16 if self.config.compute == 'bfloat16' else None
    return dj.data_parallel(merger, mesh, rules, forward_dtype=dtype)

  def _build_alone(self, name: str, chosen: dict[str, Any]) -> dj.Merger:
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

  def mesh_of(self, name: str) -> jax.sharding.Mesh | None:
    """Returns the mesh that a merge runs on, None for one device."""
    return self.mesh if methods.spreads(name) else None

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

  def inputs(
    self, name: str
  ) -> tuple[dj.tree.Raveled, dj.tree.Raveled, pipeline.Unlabelled]:
    """Returns base, experts and data of a merge, where it reads them."""
    mesh = self.mesh_of(name)
    return (*self.raveled, self.data) if mesh is None else self._on(mesh)

  @functools.cache  # noqa: B019
  def _on(self, mesh: jax.sharding.Mesh):
    setup, copies = self.setup, NamedSharding(mesh, PartitionSpec())
    placed = dj.sharding.place(setup.base, setup.experts, mesh)
    return *placed, jax.device_put(self.data, copies)

  def compile_ahead(self, executor: futures.Executor) -> None:
    """Has a thread compile what is still to be learned, method by method.

    Args:
      executor: of one thread.
    """
    for name, merger in self.mergers.items():
      if merger.plan.steps and not self.is_done(name):
        self._programs[name] = executor.submit(
          learn.compile_steps,
          merger,
          *self.inputs(name),
          mesh=self.mesh_of(name),
          batch=self.options[name]['batch'],
          compiler_options=self.config.compiler_options,
          max_chunk=min(10, max(1, self.config.max_lost // 2)),
          saved=learn.saved_steps(self.workdir, name),
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
        *self.inputs(name),
        mesh=self.mesh_of(name),
        sizes=self.sizes,
        tasks=setup.tasks,
        batch=self.options[name]['batch'],
        seed=self.config.seed,
        folder=self.workdir,
        max_lost=self.config.max_lost,
        keep=checkpoint.Keep(
          last=self.config.keep_last, every=self.config.keep_every or None
        ),
        advance=advance,
      )
      seconds = learned.seconds
      params = self._here(learned.params)
      masks = self._here(getattr(learned.state, 'masks', None))
      if distributed.is_first():
        self._draw(name, learned, masks)
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
    if distributed.is_first():
      self._save(name, params)
    return params, seconds

  def _here(self, tree: Any) -> Any:
    """Brings what is spread over devices to one of this host."""
    if jax.process_count() > 1:
      tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(tree, jax.local_devices()[0])

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

  def _draw(self, name: str, learned: learn.Learned, masks: Any) -> None:
    setup = self.setup
    per_task = {k: x for k, x in learned.metrics.items() if x.ndim == 2}
    curves = pictures.curves(per_task, setup.tasks)
    checkpoint.write(self.workdir / 'curves' / f'{name}.png', curves)
    if masks:
      layout = self.inputs(name)[0].layout
      dropped = {}
      for mask, logits in masks.items():
        shares = dj.masks.sparsity(logits, layout)
        dropped[mask] = {
          leaf: float(np.mean(shares[leaf]))
          for leaf in sorted(shares, key=functools.partial(_depth, setup))
        }
      text = json.dumps(dropped, indent=2)
      checkpoint.write(self.workdir / 'masks' / f'{name}.json', text)
    patch = getattr(learned.state, 'adversary', None)
    if not isinstance(patch, dj.perturbations.SoftPatch):
      return
    opacity, pattern = np.asarray(patch.opacity()), np.asarray(patch.pattern())
    true = {
      trigger.task: pictures.shown(trigger, setup.image_shape)
      for trigger in setup.pool.triggers.values()
    }
    restarts = self.options[name]['restarts']
    names = [
      f'start {i + 1}' if i < restarts else f'seed {i + 1 - restarts}, moved'
      for i in range(len(opacity))
    ]
    found = pictures.found_triggers(
      setup.tasks,
      true,
      0.5 * (1 - opacity) + opacity * pattern,
      names=names,
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
    hosts = distributed.Hosts()
    found = measure.predictions(
      self.predict,
      own if name == 'single' else lambda t: params,
      setup.pool,
      only=setup.tasks[hosts.index :: hosts.count],
      transfer_test=0 if alone else self.config.transfer_test,
    )
    measured = measure.judge(distributed.gather(found), setup.pool)
    if distributed.is_first():
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
    if not self.is_done(name):
      self._work(name, advance)
      distributed.wait(name)
    return json.loads(path.read_text())

  def is_done(self, name: str) -> bool:
    """Whether process 0 finds a method's or control's result on disk.

    Args:
      name: of the method or control.
    """
    return distributed.agreed(self._result(name).exists())

  def _work(self, name: str, advance: Advance) -> None:
    seconds = dict.fromkeys(('steps', 'compile', 'step', 'total'), 0.0)
    if name not in self.mergers:
      params = self.controls()[name]()
    elif self.mesh_of(name) is not None:
      params, seconds = self.merge(name, advance)
    else:
      params = None
      if distributed.is_first():
        params, seconds = self.merge(name, advance)
      params = distributed.from_first(self.setup.base, params)
    begin = time.perf_counter()
    found = self.measure(name, params)
    seconds['test'] = time.perf_counter() - begin
    if distributed.is_first():
      checkpoint.write(
        self._result(name), json.dumps({**found, 'seconds': seconds}, indent=2)
      )


def _summary(found: suspects.Finding, task: Task) -> dict[str, Any]:
  return {
    'suspicion': found.suspicion,
    'target_name': task.label_names[found.target],
    'success': found.success,
  }


def _claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Makes a workdir this run's, or raises where it is another's."""
  path = workdir / 'run.json'
  if distributed.is_first() and not path.exists():
    checkpoint.write(path, json.dumps(identity, indent=2))
  distributed.wait('workdir')
  if not path.exists():
    raise ValueError(
      f'{path}, which process 0 wrote, is not there for process '
      f'{jax.process_index()}: take a workdir on a disk that all share'
    )
  if _fixed(json.loads(path.read_text())) != _fixed(identity):
    raise ValueError(
      f'{workdir} holds a run with another config or other checkpoints: '
      'choose another workdir'
    )


def _fixed(identity: dict[str, Any]) -> dict[str, Any]:
  """Returns what may not change between two starts of a run."""
  config = json.loads(json.dumps(identity['config']))
  kept = {key: x for key, x in config.items() if key not in load.OPEN}
  return {**identity, 'config': kept}


def _depth(setup: load.Setup, leaf: str) -> int:
  """Returns which of the tower's levels a leaf is of, from the lowest."""
  levels = enumerate(setup.levels)
  return next((i for i, x in levels if re.fullmatch(x, leaf)), -1)
