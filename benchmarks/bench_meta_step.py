"""Seconds a step of each learned merge, beside a plain pass of the tower.

  python -m benchmarks.bench_meta_step --methods=dam_robust,dam_released

On random weights of the pool's tower (192 wide, 8 layers, 65 tokens), six
experts, 16 images a task. `passes` is how many times one forward and backward
pass over one draw of images, measured in the same run, fits into a step: a
number that travels better between machines than seconds.
"""

import json
import platform
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from configs import pool
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.models import clip
from dam_jax.models import inputs
from experiments import learn
from experiments import methods

_METHODS = flags.DEFINE_string('methods', 'learned', 'names with commas')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'steps to time')
_JSON = flags.DEFINE_string('json', '', 'file to append one line to')

CONFIG = clip.VisionConfig(
  hidden_size=192,
  intermediate_size=768,
  num_hidden_layers=8,
  num_attention_heads=3,
  image_size=32,
  patch_size=4,
  projection_dim=384,
)
EXPERTS, BATCH, CLASSES = 6, 16, 100
OPTIONS = pool.get_config().compiler_options


def _seconds(fn, repeats):
  """Returns the least of some wall-clock times of a function."""
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    times.append(time.perf_counter() - begin)
  return min(times)


def _problem():
  """Returns base and experts, raveled, and what methods take of a model."""
  tower = clip.VisionTower(CONFIG)
  pixels = jnp.zeros((1, *CONFIG.image_shape))
  base = tower.init(jax.random.key(0), pixels)['params']
  keys = jax.random.split(jax.random.key(1), EXPERTS)
  noise = jax.vmap(
    lambda key: jax.tree.map(
      lambda x: 1e-2 * jax.random.normal(key, x.shape), base
    )
  )(keys)
  experts = jax.tree.map(lambda b, n: b[None] + n, base, noise)
  heads = clip.stack_heads(
    list(jax.random.normal(keys[0], (EXPERTS, CONFIG.projection_dim, CLASSES)))
  )

  def features_fn(params, pixels):
    return jnp.asarray(tower.apply({'params': params}, pixels))

  model = {
    'logits_fn': clip.zero_shot(features_fn, heads),
    'task_logits_fn': clip.zero_shot_task(features_fn, heads),
    'inputs_fn': inputs.dense_inputs(tower),
    'levels': inputs.levels(CONFIG),
  }
  return dj.tree.ravel(base), dj.tree.ravel(experts, leading=1), model


def _batch(phases, batch):
  shape = (phases, EXPERTS, batch)
  images = jax.random.uniform(jax.random.key(2), (*shape, *CONFIG.image_shape))
  return dj.Batch(images, jnp.full((*shape, CLASSES), 1 / CLASSES))


def measure(name, repeats, base, experts, model):
  """Returns seconds to compile and a step of one method, all phases on."""
  chosen = methods.resolve([name], {}, steps=1000, batch=BATCH)[name]
  merger = methods.build(
    name,
    chosen,
    **model,
    preprocess_fn=clip.normalize,
    image_shape=CONFIG.image_shape,
  )
  state = merger.init(jax.random.key(3), base, experts)
  if name.startswith('dam_robust'):
    state = state._replace(count=jnp.full_like(state.count, 500))
  batch = _batch(merger.plan.phases, chosen['batch'])
  begin = time.perf_counter()
  lowered = jax.jit(merger.step).lower(state, base, experts, batch)
  step = learn.compile_lowered(lowered, OPTIONS)
  compiled = time.perf_counter() - begin
  jax.block_until_ready(step(state, base, experts, batch))
  seconds = _seconds(lambda: step(state, base, experts, batch), repeats)
  return {'compile': compiled, 'step': seconds}


def main(argv):
  """Measures and prints."""
  del argv
  base, experts, model = _problem()
  logits_fn = model['logits_fn']
  images = _batch(1, BATCH).images[0]

  @jax.jit
  def plain(params):
    return jax.grad(lambda p: jnp.sum(dj.losses.entropy(logits_fn(p, images))))(
      params
    )

  params = base.unravel()
  plain = learn.compile_lowered(plain.lower(params), OPTIONS)
  jax.block_until_ready(plain(params))
  one = _seconds(lambda: plain(params), _REPEATS.value)
  table = Table('method', 'compile, s', 'step, s', 'passes')
  found = {}
  for name in methods.parse(_METHODS.value, EXPERTS):
    found[name] = measure(name, _REPEATS.value, base, experts, model)
    table.add_row(
      name,
      f'{found[name]["compile"]:.1f}',
      f'{found[name]["step"]:.2f}',
      f'{found[name]["step"] / one:.1f}',
    )
  Console().print(table, f'one pass: {one:.2f} s')
  if _JSON.value:
    record = {
      'pass': one,
      'methods': found,
      'device': jax.devices()[0].device_kind,
      'machine': platform.processor() or platform.machine(),
      'versions': checkpoint.versions(),
    }
    with open(_JSON.value, 'a', encoding='utf-8') as file:
      file.write(json.dumps(record) + '\n')


if __name__ == '__main__':
  app.run(main)
