"""A clean expert for one task of a pool.

  python -m experiments.finetune --config=configs/finetune.py \
    --config.pool=PATH --config.task=svhn --workdir=PATH

The pool is a folder as `dam_jax.data.tasks` describes, whose tasks have
training images. Steps and learning rate are those of the shared pool's recipe.
Its batch is 256 images, with shifts and flips; here it is 64 without, since 256
takes four times as long on a CPU (`--config.batch=256`).

`--config=configs/finetune.py:runlocal` shows in seconds that all is in place.
"""

from ml_collections import config_dict

from experiments import settings


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal', which hardly trains.

  Returns:
    The config; `experiments.finetune.KEYS` says what each key means.
  """
  local = settings.is_local(arg)
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.task = 'svhn'
  c.name = ''
  c.steps = 4 if local else 400
  c.learning_rate = 3e-4
  c.warmup = 0
  c.weight_decay = 0.01
  c.batch = 16 if local else 64
  c.compute = 'float32'
  c.mesh = ''
  c.rank = 0
  c.test = 100 if local else 0
  c.seed = 0
  return c
