"""Defense-Aware Merging's experiment on CLIP ViT-L/14, from data to table.

  python -m experiments.paper --config=configs/paper_vit_l14.py --workdir=PATH

Claim, settings and what is unknown are those of configs/paper_vit_b32.py. The
tower has 304 million parameters in place of 88, and reads 257 tokens in place
of 50. FusionBench published mean accuracies on eight tasks, zero-shot 64.6 and
single experts 94.3; BadMerging, that its ASR is 8 to 10 points lower than on
ViT-B/32. The paper has its own; nobody has run this config yet.

Towers compute in bfloat16; weights, masks and optimisers are float32. Estimated
from operations, not measured: 18 times the work of ViT-B/32, at 3 to 5 times
its speed for bfloat16, so 15 to 25 hours on one GPU of 80 GB;
`--config.merge.mesh=data=4` spreads learned merges over four. The audit is off,
and `dam_robust` starts without it: on one GPU it does not fit.

`--config=configs/paper_vit_l14.py:runlocal` is that of ViT-B/32 with towers of
four layers, in bfloat16, 4.6 minutes on two cores that had much else to do.
"""

from ml_collections import config_dict

from configs import paper_vit_b32
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.paper.KEYS` says what each key means.
  """
  c = paper_vit_b32.get_config(runlocal=runlocal)
  if c.prepare.clip:
    c.prepare.clip = 'openai/clip-vit-large-patch14'
  else:
    c.prepare.make.layers = 4
  for part in (c.finetune, c.attack, c.merge):
    part.compute = 'bfloat16'
  c.merge.audit = False
  return c
