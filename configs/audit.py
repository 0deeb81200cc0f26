"""Which uploads of a pool to distrust: triggers inverted on each alone.

  python -m experiments.audit --config=configs/audit.py --config.pool=PATH

The goal is an area under the ROC curve of 0.95 over clean and backdoored
uploads. It was 1.00 over 8 clean and 4 BadMerging experts of a tower of 3.7
million parameters, 23 to 80 s each on two cores; over 5 clean and 78 bad ones
of configs/nano_pool.py 0.77: at least 0.9 for Blended, LoRA, LoBAM, BadMerging
and sparse vectors, 0.8 for BadNets, BadViT and the adaptive attacker, 0.57 to
0.67 for TrojViT, MergeBackdoor, SIG and WaNet, and no better than chance for
BadMerging on another's task, whose target is none of the expert's classes.

What `dam_robust` then takes from an expert is no evidence: of six task vectors
with two or four bad among them, its masks kept 0.99 to 1.02 of the L1 norm and
as much of the L2 norm, of bad and clean ones alike. It redirects few entries.
"""

from ml_collections import config_dict

from experiments import settings


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal', which searches less and says little.

  Returns:
    The config; `experiments.audit.KEYS` says what each key means.
  """
  local = settings.is_local(arg)
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.models = ''
  c.area = 20.0
  c.images = 64
  c.batch = 6
  c.first_round = 1
  c.last_round = 1 if local else 4
  c.keep = 4 if local else 8
  c.scale = 0.3
  c.seed = 0
  return c
