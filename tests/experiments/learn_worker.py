"""A small learned merge in a process of its own, to be stopped and started.

Every function is called in a fresh process that has imported this module, but
in which JAX has not looked at a device yet; see test_learn.
"""

import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import pipeline
from experiments import learn
from experiments import preemption

NAME, SHAPE, TASKS, STEPS = 'concrete', (4, 4, 3), 3, 60
MAX_LOST = 10


def run(folder, then=lambda steps: None, max_lost=MAX_LOST):
  """Learns, or goes on; notes each start, and what was done at the end.

  Args:
    folder: to write to.
    then: called with the number of steps that are done, after each chunk.
    max_lost: steps that a kill may lose.
  """
  folder = pathlib.Path(folder)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 1)
  jax.config.update('jax_compilation_cache_dir', str(folder.parent / 'cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

  heads = draw(TASKS, 8, 5)

  def logits_fn(params, images):
    x = images.reshape(*images.shape[:2], -1) @ params['kernel']
    return jnp.einsum('tbd,tdl->tbl', jnp.tanh(x), heads)

  merger = dj.concrete(logits_fn, steps=STEPS, coefficient_steps=0)
  base = dj.tree.ravel({'kernel': draw(48, 8)})
  experts = dj.tree.ravel({'kernel': draw(TASKS, 48, 8)}, leading=1)
  images = rng.integers(0, 256, (TASKS, 40, *SHAPE), np.uint8)
  data = pipeline.Unlabelled(jnp.asarray(images))
  program = learn.compile_steps(
    merger,
    base,
    experts,
    data,
    batch=4,
    compiler_options={},
    max_chunk=max_lost // 2,
    saved=learn.saved_steps(folder, NAME),
  )
  done = []

  def advance(steps):
    done.append(steps)
    with (folder / 'done').open('a') as file:
      file.write(f'{sum(done)}\n')
    then(sum(done))

  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'done').open('a') as file:
    file.write('start\n')
  learned = learn.learn(
    NAME,
    merger,
    program,
    base,
    experts,
    data,
    sizes=[40] * TASKS,
    tasks=[str(t) for t in range(TASKS)],
    batch=4,
    seed=0,
    folder=folder,
    max_lost=max_lost,
    advance=advance,
  )
  checkpoint.save_params(folder / 'merged.safetensors', learned.params)
  np.savez(folder / 'metrics.npz', **learned.metrics)


def run_slowly(folder, started):
  """Learns with a pause after each chunk, and says when it begins."""

  def then(_):
    started.set()
    time.sleep(0.02)

  run(folder, then)


def run_until_asked(folder, started, asked):
  """Takes a chunk and waits; SIGTERM has it save and exit with the code."""

  def then(steps):
    if steps:
      started.set()
      asked.wait()

  preemption.exit_at_once()
  run(folder, then)


def run_on_a_full_disk(folder):
  """Learns where no file may grow beyond a page, and notes the error."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
  try:
    run(folder)
  except OSError as e:
    pathlib.Path(folder, 'error').write_text(str(e))
