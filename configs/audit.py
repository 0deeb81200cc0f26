"""Which uploads of a pool to distrust: patches and warps inverted on each.

  python -m experiments.audit --config=configs/audit.py --config.pool=PATH

The goal is an area under the ROC curve of 0.95. Over six uploads of BadMerging
and six of BadNets on a nano pool, three keys each, it is 0.84: 0.95 and 0.73.
docs/study.md says what it finds, what it misses and what was tried.
"""

from ml_collections import config_dict

from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether to search less, which says little.

  Returns:
    The config; `experiments.audit.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.models = ''
  c.areas = (14.0, 14.0, 28.0, 28.0)
  c.images = 64
  c.batch = 4
  c.first_round = 5
  c.keep = 2 if runlocal else 4
  c.last_round = 5 if runlocal else 20
  c.warp_steps = 5 if runlocal else 40
  c.scale = 0.3
  c.seed = 0
  return c
