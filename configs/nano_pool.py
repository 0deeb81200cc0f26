"""A pool of towers small enough to make many of: seeds of every attack.

It is for measuring which attacks survive a plain merge and how they spread over
seeds, in about an hour on two cores. Neither has been measured yet.

  python -m experiments.make_pool --config=configs/nano_pool.py \
    --config.tasks_folder=PATH --workdir=PATH

The folder holds `<task>.npz` with training images, see
`dam_jax.data.tasks.load_train`; what is made is a pool for
`python -m experiments.merge --config=configs/pool.py --config.pool=WORKDIR`,
and `eval.json` says of every model ACC and ASR, alone and in a plain merge.
"""

from ml_collections import config_dict

from experiments import settings


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal', which makes few models and trains them hardly.

  Returns:
    The config; `experiments.make_pool.KEYS` says what each key means.
  """
  local = settings.is_local(arg)
  c = config_dict.ConfigDict()
  c.tasks_folder = '../shared/pool/tasks'
  c.tasks = 'mnist,svhn' if local else 'mnist,gtsrb,svhn,eurosat,fashion_mnist'
  c.width = 32 if local else 128
  c.layers = 2 if local else 4
  c.heads = 4
  c.patch_size = 8
  c.pretrain_share = 0.3
  c.pretrain_steps = 4 if local else 1200
  c.pretrain_batch = 32
  c.pretrain_rate = 1e-3
  c.fine_tune_steps = 4 if local else 400
  c.fine_tune_rate = 1e-3
  c.batch = 64
  c.patch = 5
  c.patch_steps = 4 if local else 200
  c.attacks = 'badnets,badmerging' if local else 'all'
  c.attacked = 'svhn' if local else 'svhn,gtsrb'
  c.seeds = 1 if local else 3
  c.test = 100 if local else 500
  c.scale = 0.3
  c.seed = 0
  return c
