"""A clean expert for one task of a pool.

  python -m experiments.finetune --config=configs/finetune.py \
    --config.pool=PATH --config.task=svhn --workdir=PATH

The pool is a folder as `dam_jax.data.tasks` describes, whose tasks have
training images. Steps and learning rate are those of the shared pool's recipe.
Its batch is 256 images, with shifts and flips; here it is 64 without, since 256
takes four times as long on a CPU (`--config.batch=256`).

`--config=configs/finetune.py:runlocal` shows in seconds that all is in place.
"""

from collections.abc import Callable

from ml_collections import config_dict

from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short, and hardly train.

  Returns:
    The config; `experiments.finetune.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.task = 'svhn'
  c.name = ''
  c.steps = 4 if runlocal else 400
  c.learning_rate = 3e-4
  c.warmup = 0
  c.weight_decay = 0.01
  c.batch = 16 if runlocal else 64
  c.accumulate = 1
  c.crop = 1.0
  c.mirrored = ''
  c.compute = 'float32'
  c.mesh = ''
  c.rank = 0
  c.test = 100 if runlocal else 0
  c.max_lost = 500
  c.seed = 0
  return c


def sweep(add: Callable[..., None]) -> None:
  """Learning rates and seeds, for `python -m experiments.sweep`."""
  for learning_rate in (1e-4, 3e-4, 1e-3):
    for seed in range(3):
      add(learning_rate=learning_rate, seed=seed)
