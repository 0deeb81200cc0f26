"""One process of several that learn a merge together; see test_distributed.

python -m tests.distributed_worker ADDRESS COUNT INDEX FOLDER
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import distributed
from dam_jax import sharding

SHAPE, TASKS, BATCH, STEPS = (4, 4, 3), 3, 16, 3


def problem():
  """Returns a merge of DAM's, a base and its experts, all on the host."""
  rng = np.random.default_rng(0)
  base = {
    'kernel': rng.normal(size=(48, 8)).astype(np.float32) / 4,
    'bias': np.zeros(7, np.float32),
  }
  experts = {
    name: x[None] + rng.normal(size=(TASKS, *x.shape)).astype(np.float32) / 4
    for name, x in base.items()
  }
  heads = rng.normal(size=(TASKS, 8, 5)).astype(np.float32)

  def logits_fn(params, images):
    x = images.reshape(*images.shape[:2], -1) @ params['kernel']
    x = jnp.tanh(x + jnp.pad(params['bias'], (0, 1))[None, None])
    return jnp.einsum('tbd,tdl->tbl', x, heads)

  merger = dj.dam_paper(
    logits_fn,
    image_shape=SHAPE,
    tx=optax.adam(1e-2),
    steps=STEPS,
    coefficient_steps=0,
  )
  return merger, base, experts


def images(step, phases, places):
  """Returns a step's images, of which this host looks at some alone."""
  shape = (phases, TASKS, BATCH, *SHAPE)
  drawn = np.random.default_rng(step).uniform(size=shape).astype(np.float32)
  return dj.Batch(drawn[:, :, places])


def learn(mesh):
  """Takes all steps; returns the state, the merged model and all losses."""
  merger, base, experts = problem()
  phases, places = merger.plan.phases, distributed.local_images(mesh, BATCH)
  merger = dj.data_parallel(merger, mesh)
  base, experts = sharding.place(base, experts, mesh)
  state, measured = merger.init(jax.random.key(1), base, experts), []
  for step in range(STEPS):
    batch = distributed.global_batch(images(step, phases, places), mesh)
    state, metrics = merger.step(state, base, experts, batch)
    measured.append(np.asarray(metrics['clean/loss']))
  return state, merger.finalize(state, base, experts), np.stack(measured)


def main(address, count, index, folder):
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8 // int(count))
  assert distributed.initialize(address, int(count), int(index))
  folder = pathlib.Path(folder)
  distributed.check_agreement({'config': [SHAPE, TASKS]})
  try:
    distributed.check_agreement({'config': 1, 'seed': index})
  except ValueError as e:
    (folder / f'error_{index}').write_text(str(e))
  mesh = sharding.make_mesh({'data': 4, 'model': 2})
  state, merged, losses = learn(mesh)
  checkpoint.save_state(folder / 'state', state)
  if distributed.is_first():
    np.savez(folder / 'merged.npz', losses=losses, **merged)


if __name__ == '__main__':
  main(*sys.argv[1:])
