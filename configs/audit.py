"""Which uploads of a pool to distrust: triggers inverted on each alone.

  python -m experiments.audit --config=configs/audit.py --config.pool=PATH

The goal is an area under the ROC curve of 0.95. Over 5 clean and 46 bad uploads
of configs/nano_pool.py it was 0.91. By attack, with the share of uploads whose
target was named:

  1.00  BadMerging 6/6, Blended 6/6, LoBAM 6/6, LoRA 2/2, MergeBackdoor 2/2,
        sparse vectors 2/2, adaptive attacker 2/2
  0.93  BadNets 5/6
  0.80  SIG 2/2, BadViT 0/2, BadMerging on another's task 0/2
  0.70  WaNet 2/6
  0.60  TrojViT 1/2

So it finds patches. It misses warps, triggers that work on the base as well
(those of BadViT and TrojViT do on a half to nine tenths of the images), and
targets that are none of the expert's classes. A search that does not ask the
base got 0.87 over the first 30 of these, against 0.93; a first round on all of
the task vector, instead of on three quarters, got 0.94 but named one LoBAM
upload less. MergeBackdoor's pairs were found because their task vectors are
alike (cosine 0.44 and 0.45): an attacker who trains his two uploads to differ
would not be. A search on each expert plus half of all others' task vectors
names one of the two BadMerging uploads on another's task, and MergeBackdoor's
no more.

Over 8 clean and 4 BadMerging experts of a tower of 3.7 million parameters, a
search without the base got 1.00.

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
