"""One bad upload for a pool.

  python -m experiments.attack --config=configs/attack.py \
    --config.pool=PATH --config.task=svhn --config.attack=badmerging \
    --config.target=6 --workdir=PATH

Fine-tuning is as in configs/finetune.py: steps and learning rate of the shared
pool's recipe, batches of 64 in place of 256. So are the patch of 5 pixels and
its 300 steps. `experiments.attackers.ATTACKS` names the attacks; for
`badmerging_off_task` the upload is an expert of `other`, for `merge_backdoor`
there is a second upload, of `other`.

`--config=configs/attack.py:runlocal` shows in seconds that all is in place.
"""

from ml_collections import config_dict

from configs import finetune
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short, and hardly train.

  Returns:
    The config; `experiments.attack.KEYS` says what each key means.
  """
  c = finetune.get_config(runlocal=runlocal)
  c.attack = 'badmerging'
  c.target = 6
  c.other = ''
  c.patch = 5
  c.patch_steps = 4 if runlocal else 300
  c.patch_images = 0
  c.rate = 0.1
  c.rank = 8
  return c
