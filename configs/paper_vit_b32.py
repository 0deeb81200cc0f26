"""Defense-Aware Merging's experiment on CLIP ViT-B/32, from data to table.

Claim, of arXiv 2410.13910 (ICLR 2025): merging six experts (CIFAR-100, MNIST,
GTSRB, SVHN, RESISC45, EuroSAT) of which some carry BadMerging's backdoor passes
the backdoor on, whatever the merge; DAM takes most of it away at little cost in
accuracy.

  python -m experiments.paper --config=configs/paper_vit_b32.py --workdir=PATH

docs/paper.md says what to install and to place first.

Numbers. The paper has them, in tables that were not at hand here: neither its
ACC nor its ASR are repeated, and nobody has run this config yet, so it has no
measured ones. Published by FusionBench are mean accuracies of clean merges,
with other experts, on eight tasks that are not these six: zero-shot 48.2,
single experts 90.3, average 66.5, Fisher 70.6, RegMean 82.4, task arithmetic
68.0, TIES 72.2, Concrete task arithmetic 77.6, AdaMerging 68.7 by task and 82.6
by layer, Concrete AdaMerging by layer 84.4. By BadMerging, of CIFAR-100 with
its own experts: ASR 98.1 after task arithmetic, 99.3 TIES, 96.7 RegMean, 99.5
AdaMerging. With `--config.bad=0` a run should come near the order of the
former, with one bad expert near the latter.

Settings. Known, from released code: AdamW, a rate of 1e-5, weight decay 0.1,
500 steps of warm-up, cosine, clipping at 1; BadMerging's patch of 1 % of the
pixels (22 x 22) in the corner, on up to 2,000 images, its loss and its weight
of 5; the merges' steps, rates and quirks. Unknown, so ours: 2,000 steps of 128
images, Adam's b2 of 0.98, the target classes, Adam 0.05 for 300 steps in place
of the patch's gradient ascent, which tasks are attacked (those of
configs/pool.py), and dev images that are not those reported on, where the
authors' code adapts on the test images. `dam_released` runs at one image a task
and draw, as the released code does in spite of its 16.

Cost. Estimated from operations at 20 TFLOP/s in float32, not measured: 6
minutes a clean expert and 11 a bad one, so an hour and a half; ten minutes a
learned merge, ten of them, so two hours; the audit that `dam_robust` starts
from perhaps half an hour, and more memory than the rest: a GPU of 80 GB, or
without it (`--config.merge.audit=False`) one of 40. Less time and memory take
`--config.merge.compute=bfloat16`, `.finetune.compute` and `.attack.compute`.

  --config.bad=0,1,2,4             a table for each number of bad experts
  --config.attack.attack=badnets   another attack, in another workdir
  --config.merge.methods=...       `experiments.methods`
  --config.finetune.rank=16        experts by LoRA

`--config=configs/paper_vit_b32.py:runlocal` is the same, from preparing sets to
the table, with a tiny CLIP, three built-in sets of which two are attacked, and
six of the merges. It ran whole in 29 minutes on two cores that had much else to
do, 4.8 minutes of processor time. ACC and ASR of that run, which say nothing of
CLIP, nor, after 20 steps, of merges that learn: task_arithmetic 70.3, 98.3;
ties 59.0, 99.7; adamerging_layer_wise 70.0, 98.6; dam_released 70.2, 98.3;
dam_robust 79.3, 94.0; the triggers on a merge of clean experts 80.2, 53.5.
"""

from ml_collections import config_dict

from configs import attack
from configs import finetune
from configs import pool
from configs import prepare
from experiments import settings

METHODS = (
  'average,task_arithmetic,ties,dare,fisher,regmean,'
  'adamerging_task_wise,adamerging_layer_wise,'
  'concrete_task_arithmetic,concrete_task_wise,concrete_layer_wise,'
  'dam_released_task_arithmetic,dam_released_task_wise,dam_released,'
  'dam_paper,dam_robust,repo_awm,repo_sau'
)
"""The paper's merges, baselines and defences, and this library's own."""

LOCAL_METHODS = (
  'average,task_arithmetic,ties,adamerging_layer_wise,dam_released,dam_robust'
)
"""One of each kind: most of a short run is compiling."""


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.paper.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.prepare = prepare.get_config(runlocal=runlocal)
  c.finetune = _tuning(finetune.get_config(runlocal=runlocal), runlocal)
  c.attack = _tuning(attack.get_config(runlocal=runlocal), runlocal)
  c.attack.patch = 5 if runlocal else 22
  c.attack.patch_steps = 100 if runlocal else 300
  c.attack.patch_images = 2000
  c.attacked = 'cifar100,gtsrb,svhn_cropped,eurosat'
  c.targets = '0,0,0,0'
  c.bad = '4'
  c.merge = pool.get_config(runlocal=runlocal)
  c.merge.methods = METHODS
  for name in c.merge.options:
    if name.startswith('dam_released'):
      c.merge.options[name].batch = 1
  c.merge.steps = 0
  c.merge.dev = 0
  c.merge.test = 0
  c.merge.transfer_test = 200
  c.merge.compiler_options = {}
  if runlocal:
    c.attacked = 'mnist,colour'
    c.targets = '7,1'
    c.bad = '2'
    c.merge.methods = LOCAL_METHODS
    c.merge.steps = 20
    # Twenty steps of a tower this small take less time than compiling them
    # well.
    c.merge.compiler_options = {'xla_backend_optimization_level': 0}
  return c


def _tuning(c: config_dict.ConfigDict, local: bool) -> config_dict.ConfigDict:
  """Sets what BadMerging's code sets, or what a tiny tower takes."""
  c.steps = 100 if local else 2000
  c.learning_rate = 5e-4 if local else 1e-5
  c.warmup = 10 if local else 500
  c.weight_decay = 0.1
  c.batch = 32 if local else 128
  c.test = 0
  return c
