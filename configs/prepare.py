"""The paper's six data sets and CLIP ViT-B/32, as a pool without experts.

  python -m experiments.prepare --config=configs/prepare.py --workdir=PATH

Needs a network, and once what docs/data.md says for sets that cannot be
downloaded or want TensorFlow; `--config.data_dir` is where prepared sets lie or
are put. Estimated, not measured: 1 GB for the CLIP, 2 GB to download, 5 to 10
GB in the workdir.

`--config=configs/prepare.py:runlocal` makes a tiny CLIP and prepares built-in
sets by the same code, without a network.
"""

from ml_collections import config_dict

from dam_jax.data import sets
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.prepare.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.data_dir = '' if runlocal else 'data'
  c.sets = 'arrays/mnist,arrays/digits,arrays/colour' if runlocal else ''
  c.sets = c.sets or ','.join(sets.PAPER)
  c.clip = '' if runlocal else 'openai/clip-vit-base-patch32'
  c.revision = ''
  c.make = config_dict.ConfigDict()
  c.make.layers = 2
  c.make.steps = 150
  c.train = 1000 if runlocal else 10_000
  c.dev = 64 if runlocal else 500
  c.test = 200 if runlocal else 2000
  c.seed = 0
  return c
