"""What models of a pool's shape are worth on its tasks and triggers.

  python -m experiments.evaluate --config=configs/evaluate.py \
    --config.pool=PATH --config.models=PATH,PATH --workdir=PATH

`--config=configs/evaluate.py:runlocal` measures on 100 test images a task.
"""

from ml_collections import config_dict

from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.evaluate.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.models = '../shared/pool/checkpoints/base.safetensors'
  c.tasks = ''
  c.triggers = 'all'
  c.test = 100 if runlocal else 0
  c.compute = 'float32'
  return c
