"""Which uploads of a pool to distrust: triggers inverted on each alone.

  python -m experiments.audit --config=configs/audit.py --config.pool=PATH

The goal is an area under the ROC curve of 0.95 over clean and backdoored
uploads. Over 5 clean and 30 bad uploads of configs/nano_pool.py it was 0.94,
and 0.87 for a search that does not ask the base:

               | BadMerging | BadNets | Blended | LoBAM | WaNet
  this search  | 1.00       | 0.97    | 1.00    | 0.93  | 0.80
  without base | 0.93       | 0.87    | 1.00    | 0.93  | 0.60

It named the attacker's class of 22 of the 24 uploads that have a patch. Only
the search without the base was tried on other attacks, where it got at least
0.9 for LoRA and sparse vectors, 0.8 for BadViT and the adaptive attacker, 0.57
to 0.67 for TrojViT, MergeBackdoor and SIG, and no better than chance for
BadMerging on another's task, whose target is none of the expert's classes; and
on 8 clean and 4 BadMerging experts of a tower of 3.7 million parameters, 1.00.

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
