"""Our steps of a learned merge, for `benchmarks.worker`."""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
from pathlib import Path
import time
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import runs
from benchmarks import step_counts as counts
from benchmarks import step_problem as problem
from benchmarks.worker import Job
from configs import pool
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import masks as masks_lib
from dam_jax import meta
from dam_jax.layout import Layout
from dam_jax.meta_spec import MetaSpec
from dam_jax.models import clip
from dam_jax.models import convert
from dam_jax.models import inputs
from experiments import command
from experiments import learn
from experiments import methods

OPTIONS = pool.get_config().compiler_options


def raveled(model: str, num: int) -> tuple[dj.tree.Raveled, dj.tree.Raveled]:
  """Draws a base and its experts, in our names and layouts."""
  base, experts = {}, {}
  for name, shape in problem.shapes(model).items():
    leaf, stacked = problem.leaf(name, shape, num)
    path = convert.clip_vision.to_path(name)
    axes = convert.clip_vision.axes(path) or range(leaf.ndim)
    base[path] = leaf.transpose(axes)
    experts[path] = stacked.transpose(0, *(axis + 1 for axis in axes))
  nest = functools.partial(traverse_util.unflatten_dict, sep='/')
  return dj.tree.ravel(nest(base)), dj.tree.ravel(nest(experts), leading=1)


def prefixes(spec: MetaSpec) -> dict[str, MetaSpec]:
  """Returns by phase the step that ends after it; the last is all of it."""
  if not spec.mask_steps:
    return {'coefficients': spec}
  early = dataclasses.replace(spec, coefficient_steps=0, coefficient_safety=0.0)
  found = {}
  if spec.coefficients.inner_tx is not None:
    found['inner'] = dataclasses.replace(early, adversary=None, updates=())
  if spec.adversary is not None:
    found['perturbation'] = dataclasses.replace(early, updates=())
  return {**found, 'masks': spec}


def phases(spec: MetaSpec, num: int) -> dict[str, counts.Phase]:
  """Returns what each phase of a step does."""
  if not spec.mask_steps:
    return {'coefficients': counts.Phase(weights=1, merges=1, pulls=1)}
  found = {}
  if spec.coefficients.inner_tx is not None:
    found['inner'] = counts.Phase(weights=1, merges=1, pulls=1)
  if spec.adversary is not None:
    ascents = spec.adversary.ascents
    found['perturbation'] = counts.Phase(
      forward=ascents if spec.labels == 'prediction' else 0,
      inputs=ascents,
      merges=1,
    )
  clean = [
    bool(c) or spec.safety_loss == 'consistency' for _, c, _ in spec.updates
  ]
  safety = [bool(safety) for *_, safety in spec.updates]
  found['masks'] = counts.Phase(
    weights=sum(clean) + sum(safety),
    merges=len(spec.updates),
    pulls=len(spec.updates),
    adam=sum(
      _size(spec, name, num) for names, _, _ in spec.updates for name in names
    ),
  )
  return found


def _size(spec: MetaSpec, name: str, num: int) -> int:
  return num if spec.masks[name].per_task else 1


def _batch(
  model: str, plan: dj.Plan, num: int, batch: int, step: int
) -> dj.Batch:
  lead = (plan.phases, num, batch)
  references = problem.references(*lead, step) if plan.references else None
  draws = dj.Batch(problem.images(model, *lead, step), references)
  return jax.block_until_ready(jax.tree.map(jnp.asarray, draws))


class _Program:
  """A merger's step, compiled, and the state that it has come to."""

  def __init__(
    self,
    merger: dj.Merger,
    spec: MetaSpec,
    models: tuple[dj.tree.Raveled, dj.tree.Raveled],
    batch: dj.Batch,
  ):
    self._models = models
    state = merger.init(jax.random.key(0), *models)
    # Steps in which patches move alone are not those that most of them are.
    count = jnp.full_like(state.count, spec.warmup_steps)
    self.state = state._replace(count=count)
    begin = time.perf_counter()
    step = jax.jit(merger.step, donate_argnums=0)
    lowered = step.lower(self.state, *models, batch)
    self._step = lowered.compile(learn.usable(OPTIONS))
    self.seconds = time.perf_counter() - begin

  def run(self, batch):
    state, metrics = self._step(self.state, *self._models, batch)
    self.state = jax.block_until_ready(state)
    return state, jax.block_until_ready(metrics)

  def analysis(self) -> dict[str, Any]:
    """Returns what XLA says of the program."""
    costs = self._step.cost_analysis() or {}
    found = {
      'flops': costs.get('flops'),
      'bytes': costs.get('bytes accessed'),
    }
    memory = self._step.memory_analysis()
    for name in ('argument', 'temp', 'output', 'alias'):
      found[name] = getattr(memory, f'{name}_size_in_bytes', None)
    return found


class Learner(NamedTuple):
  """A method on a problem.

  Attributes:
    merger: what steps.
    spec: which parts its step has.
    functions: what its step computes with.
    batch: images a task and draw.
  """

  merger: dj.Merger
  spec: MetaSpec
  functions: dict[str, Any]
  batch: int


def make_learner(
  model: str,
  method: str,
  num: int,
  batch: int,
  compute: str,
  scan: bool = False,
  remat: bool = False,
) -> Learner:
  """Makes a method on a problem; see `load` for the arguments."""
  [name] = methods.parse(method, num)
  config = clip.VisionConfig(**problem.SIZES[model])
  tower = clip.VisionTower(
    config, dtype=jnp.dtype(compute), scan_layers=scan, remat=remat
  )
  heads = clip.stack_heads(list(problem.heads(model, num)))

  def features_fn(params, pixels):
    return jnp.asarray(tower.apply({'params': params}, pixels))

  functions = {
    'logits_fn': clip.zero_shot(features_fn, heads),
    'task_logits_fn': clip.zero_shot_task(features_fn, heads),
    'preprocess_fn': clip.normalize,
  }
  chosen = methods.resolve([name], {}, steps=1000, batch=batch)[name]
  merger = methods.build(
    name,
    chosen,
    **functions,
    image_shape=config.image_shape,
    inputs_fn=inputs.dense_inputs(tower),
    levels=inputs.levels(config),
  )
  # The functions of a learned merger are methods of what has its spec.
  spec = merger.step.__self__.spec
  return Learner(merger, spec, functions, chosen['batch'])


def load(
  *,
  model: str,
  method: str,
  num: int,
  batch: int,
  compute: str,
  threads: int,
  scan: bool = False,
  remat: bool = False,
) -> Job:
  """Makes a problem and compiles a step.

  Args:
    model: one of `step_problem.SIZES`.
    method: a learned one of `experiments.methods`.
    num: of experts and tasks.
    batch: images a task and draw, unless the method has a number of its own.
    compute: dtype of the forward and backward passes; all else is float32.
    threads: that the process was given.
    scan: compile one block of the tower and loop over it.
    remat: let gradients compute the blocks again.

  Returns:
    The step.
  """
  command.spare_gpus()
  learner = make_learner(model, method, num, batch, compute, scan, remat)
  spec, models = learner.spec, raveled(model, num)
  draw = functools.partial(
    _batch, model, learner.merger.plan, num, learner.batch
  )
  first = draw(0)
  program = _Program(learner.merger, spec, models, first)
  steps = itertools.chain([first], map(draw, itertools.count(1)))
  counted = {
    name: counts.count(
      model,
      phase,
      num=num,
      batch=learner.batch,
      masks=sum(_size(spec, mask, num) for mask in spec.masks),
      itemsize=jnp.dtype(compute).itemsize,
    )
    for name, phase in phases(spec, num).items()
  }

  def time_phases(result, repeats: int, seconds: float):
    del result
    parts = prefixes(spec)
    mergers = [
      meta.meta_merger(spec=part, **learner.functions)
      for part in list(parts.values())[:-1]
    ]
    programs = [
      *(
        _Program(merger, part, models, first)
        for merger, part in zip(mergers, parts.values(), strict=False)
      ),
      program,
    ]
    for one in programs:
      one.run(next(steps))
    turns = [functools.partial(_timed, one, steps) for one in programs]
    found = runs.alternate(turns, repeats, seconds)
    return dict(zip(parts, found, strict=True))

  return Job(
    prepare=lambda: next(steps),
    run=program.run,
    about={
      'platform': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
      'threads': threads,
      'versions': checkpoint.versions(),
      'compile': program.seconds,
      'batch': learner.batch,
      'counted': counted,
      'xla': program.analysis(),
    },
    requests={
      'check': functools.partial(_check, spec, models[0].layout),
      'draws': functools.partial(_write_draws, spec, models[0]),
      'phases': time_phases,
      'machine': functools.partial(_machine, compute),
      'memory': _device_memory,
      'merges': functools.partial(_time_merges, spec, models),
    },
  )


def _time_merges(
  spec: MetaSpec,
  models: tuple[dj.tree.Raveled, dj.tree.Raveled],
  result,
  repeats: int,
) -> list[float]:
  """Returns seconds of merges under masks that are there already."""
  state, _ = result

  @jax.jit
  def merge(base, experts, coefficients, masks):
    deltas = experts.vector - base.vector[None]
    return base.vector + masks_lib.masked_sum(
      deltas, base.layout, coefficients, spec.masks, masks
    )

  expected = jax.jit(lambda logits: jax.tree.map(masks_lib.expected, logits))
  args = *models, state.coefficients, expected(state.masks)
  jax.block_until_ready(merge(*args))
  found = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(merge(*args))
    found.append(time.perf_counter() - begin)
  return found


def _timed(program: _Program, steps: Iterator[dj.Batch]) -> dict[str, float]:
  batch = next(steps)
  begin = time.perf_counter()
  program.run(batch)
  return {'seconds': time.perf_counter() - begin}


def _write_draws(
  spec: MetaSpec, base: dj.tree.Raveled, result, folder: str
) -> None:
  """Writes what the masks of the first step were drawn from."""
  state, _ = result
  for i, (name, mask) in enumerate(spec.masks.items()):
    key = jax.random.fold_in(state.key, i)
    uniform = mask.uniform_fn(
      key, jnp.zeros([], jnp.int32), state.masks[name], base.layout
    )
    checkpoint.save_params(
      Path(folder) / f'{name}.safetensors',
      base.unravel(uniform),
      name_map=convert.clip_vision,
    )


def _check(spec: MetaSpec, layout: Layout, result) -> dict[str, Any]:
  """Returns losses, summed over tasks, and gradients of the first step.

  Adam's first moment stands for a gradient: after one step it is a tenth.
  """
  state, metrics = result
  found = {
    name: float(jnp.sum(x))
    for name, x in metrics.items()
    if name.endswith('/loss') and bool(jnp.isfinite(x).all())
  }
  if spec.updates:
    found['masks/loss'] = sum(
      weight * found[name]
      for _, *weights in spec.updates
      for name, weight in zip(
        ('clean/loss', 'safety/loss'), weights, strict=True
      )
      if weight
    )
  states = dict(state.mask_states)
  if state.adversary is not None:
    states['perturbation'] = state.adversary_state
  for name, own in states.items():
    norm = optax.tree.norm(optax.tree.get(own, 'mu'))
    found[f'{name}/gradient'] = float(norm)
  own = state.inner_state if spec.mask_steps else state.coefficient_state
  moved = optax.tree.get(own, 'mu')
  if moved is None:
    moved = state.coefficients - spec.coefficients.init
  if moved.ndim == 2:
    names = map(convert.clip_vision.to_name, layout.names)
    columns = np.asarray(moved).T.tolist()
    found['coefficients'] = dict(zip(names, columns, strict=True))
  return found


@functools.partial(jax.jit, static_argnums=2)
def _products(x: jax.Array, weights: jax.Array, num: int) -> jax.Array:
  """Multiplies by a matrix and by its transpose, `num` times each."""

  def both(i, x):
    del i
    return jax.nn.relu(x @ weights) @ weights.T

  return jax.lax.fori_loop(0, num, both, x)


@functools.partial(jax.jit, donate_argnums=0)
def _added(x: jax.Array) -> jax.Array:
  return x + 1


def _machine(compute: str, result) -> dict[str, float]:
  """Measures operations and bytes a second of a product and of a copy."""
  del result
  rows, inputs, outputs = problem.PRODUCT
  rng, dtype = np.random.default_rng(0), jnp.dtype(compute)
  # A chip takes microseconds for one, less than it takes to ask it to.
  num = 1 if jax.default_backend() == 'cpu' else 200
  x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
  weights = jnp.asarray(rng.normal(size=(inputs, outputs)) / 1e2, dtype)
  entries = _added(jnp.ones(problem.COPIED))
  jax.block_until_ready((_products(x, weights, num), entries))
  begin = time.perf_counter()
  jax.block_until_ready(_products(x, weights, num))
  product = time.perf_counter() - begin
  begin = time.perf_counter()
  jax.block_until_ready(_added(entries))
  copy = time.perf_counter() - begin
  return {
    'flops': 4 * num * rows * inputs * outputs / product,
    'bytes': 8 * problem.COPIED / copy,
  }


def _device_memory(result) -> int | None:
  """Returns the peak of an accelerator's memory in bytes."""
  del result
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
