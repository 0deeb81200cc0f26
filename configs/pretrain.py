"""A small base, pretrained on several tasks with frozen heads.

  python -m experiments.pretrain --config=configs/pretrain.py \
    --config.tasks_folder=PATH --workdir=PATH

The tower and its pretraining are those of configs/nano_pool.py, which goes on
to experts and bad uploads. The folder holds `<task>.npz` with training images,
as `experiments.prepare` leaves them in a pool's `tasks/`; heads are theirs.

`--config=configs/pretrain.py:runlocal` hardly trains.
"""

from ml_collections import config_dict

from configs import nano_pool
from experiments import pretrain
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.pretrain.KEYS` says what each key means.
  """
  whole = nano_pool.get_config(runlocal=runlocal)
  return config_dict.ConfigDict({key: whole[key] for key in pretrain.KEYS})
