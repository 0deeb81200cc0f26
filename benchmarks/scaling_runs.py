"""A merge or a learned step to be scaled, for `benchmarks.worker`.

On random weights: a merge of towers of the size that is asked for, or a step
over random images with the pool's tower (192 wide, 8 layers, 65 tokens).
"""

from collections.abc import Mapping
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import merge_runs
from benchmarks.worker import Job
from configs import pool
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.models import clip
from dam_jax.models import inputs
from experiments import learn
from experiments import methods

CLASSES, LATE = 10, 500
"""Of a head; the step at which all phases of `dam_robust` are on."""


def _experts(base: Any, num: int) -> Any:
  """Returns models near a base, stacked."""
  rng = np.random.default_rng(1)  # JAX would compile for each shape

  def near(x):
    noise = rng.standard_normal((num, *x.shape), np.float32)
    return jnp.asarray(np.asarray(x)[None] + np.float32(1e-3) * noise)

  return jax.tree.map(near, base)


def _norms(params: Any) -> list[float]:
  # Biases of keys have no gradient, and Adam makes steps of its rounding.
  return [
    float(np.linalg.norm(np.asarray(x, np.float64)))
    for path, x in dj.tree.flatten(dj.tree.unravel(params)).items()
    if not path.endswith('k_proj/bias')
  ]


def _mesh(devices: int) -> jax.sharding.Mesh | None:
  """Returns a mesh of the first devices, None for one."""
  if jax.device_count() < devices:
    raise ValueError(f'want {devices} devices, there are {jax.device_count()}')
  if devices == 1:
    return None
  return dj.sharding.make_mesh(devices=jax.devices()[:devices])


def _about(begin: float, compiled: Any) -> dict[str, Any]:
  memory = compiled.memory_analysis()
  return {
    'platform': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
    'compile': time.perf_counter() - begin,
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'versions': checkpoint.versions(),
  }


def _held() -> dict[str, int] | None:
  """Returns what an accelerator's allocator says of itself."""
  return jax.devices()[0].memory_stats()


def _merge(
  method: str, experts: int, devices: int, size: Mapping[str, int]
) -> Job:
  shapes = merge_runs.tower_shapes(size['width'], size['layers'])
  rng = np.random.default_rng(0)
  base: Any = {
    name: jnp.asarray(np.float32(2e-2) * rng.standard_normal(shape, np.float32))
    for name, shape in shapes.items()
  }
  stacked = _experts(base, experts)
  merger = dj.from_transform(methods.DATA_FREE[method]())
  mesh = _mesh(devices)
  if mesh is None:
    merger = merger._replace(finalize=jax.jit(merger.finalize))
  else:
    # Each device has its part of every model before a merge begins.
    part = dj.sharding.fsdp
    base, stacked = (
      dj.sharding.put(base, mesh, part(base, mesh)),
      dj.sharding.put(stacked, mesh, part(stacked, mesh, leading=1)),
    )
    merger = dj.data_parallel(merger, mesh)
  state = merger.init(jax.random.key(0), base, stacked)
  begin = time.perf_counter()
  merge = merger.finalize.lower(state, base, stacked).compile()
  about = _about(begin, merge)
  return Job(
    prepare=lambda: (state, base, stacked),
    run=lambda given: jax.block_until_ready(merge(*given)),
    about=about,
    requests={'norms': _norms, 'memory': lambda _: _held()},
  )


def _model(config: clip.VisionConfig, experts: int) -> tuple[Any, Any, Any]:
  """Returns a base, its experts, and what mergers take of a model."""
  tower = clip.VisionTower(config)
  pixels = jnp.zeros((1, *config.image_shape))
  base = tower.init(jax.random.key(0), pixels)['params']
  shape = (experts, config.projection_dim, CLASSES)
  heads = clip.stack_heads(list(jax.random.normal(jax.random.key(2), shape)))

  def features_fn(params, pixels):
    return jnp.asarray(tower.apply({'params': params}, pixels))

  model = {
    'logits_fn': clip.zero_shot(features_fn, heads),
    'task_logits_fn': clip.zero_shot_task(features_fn, heads),
    'inputs_fn': inputs.dense_inputs(tower),
    'levels': inputs.levels(config),
    'preprocess_fn': clip.normalize,
    'image_shape': config.image_shape,
  }
  stacked = dj.tree.ravel(_experts(base, experts), leading=1)
  return dj.tree.ravel(base), stacked, model


def _step(
  method: str, experts: int, devices: int, size: Mapping[str, int]
) -> Job:
  config = clip.VisionConfig(
    hidden_size=size['width'],
    intermediate_size=4 * size['width'],
    num_hidden_layers=size['layers'],
    num_attention_heads=size['width'] // 64,
    image_size=size['image'],
    patch_size=4,
    projection_dim=2 * size['width'],
  )
  base, stacked, model = _model(config, experts)
  batch = size['batch']
  chosen = methods.resolve([method], {}, steps=1000, batch=batch)[method]
  chosen['batch'] = batch
  merger = methods.build(method, chosen, **model)
  mesh = _mesh(devices)
  if mesh is None:
    merger = merger._replace(step=jax.jit(merger.step, donate_argnums=0))
  else:
    base, stacked = dj.sharding.place(base, stacked, mesh)
    merger = dj.data_parallel(merger, mesh)
  state = merger.init(jax.random.key(3), base, stacked)
  if method.startswith('dam_robust'):
    state = state._replace(count=jnp.full_like(state.count, LATE))
  shape = (merger.plan.phases, experts, batch)
  images = jax.random.uniform(jax.random.key(4), (*shape, *config.image_shape))
  read = dj.Batch(images, jnp.full((*shape, CLASSES), 1 / CLASSES))
  begin = time.perf_counter()
  lowered = merger.step.lower(state, base, stacked, read)
  options = pool.get_config().compiler_options
  step = lowered.compile(learn.usable(options))
  about = _about(begin, step)
  states = [state]  # a step takes the one before it apart

  def run(state):
    state, _ = jax.block_until_ready(step(state, base, stacked, read))
    states.append(state)
    return state

  return Job(
    prepare=states.pop,
    run=run,
    about=about,
    requests={
      'norms': lambda state: _norms(merger.finalize(state, base, stacked)),
      'memory': lambda _: _held(),
    },
  )


def load(
  *,
  what: str,
  method: str,
  experts: int,
  devices: int,
  size: Mapping[str, int],
) -> Job:
  """Makes random models and compiles.

  Args:
    what: 'merge' or 'step'.
    method: of `experiments.methods`.
    experts: that are merged.
    devices: that share the work.
    size: 'width' and 'layers' of the tower; of a step 'image', its side, and
      'batch', images a task and draw, too.

  Returns:
    The merge or the step.
  """
  make = {'merge': _merge, 'step': _step}[what]
  return make(method, experts, devices, size)
