"""A pool of towers small enough to make many of: seeds of every attack.

It is for measuring which attacks survive a plain merge and how they spread over
seeds. With tasks of 32 x 32 images, the base and the clean experts took 5
minutes on two cores, and 78 uploads 57 and 73 minutes, half of them on each
core: 27 s for BadNets, 80 s for BadMerging, 205 s for MergeBackdoor, whose loss
is of seven images in place of one. On an H200 with 16 cores, 14 processes at
once made 74 of the uploads within 5 minutes. The attack success of uploads
alone and in task arithmetic, and what they lose in accuracy against clean
experts, least to most in per cent and points, of six uploads or, those with a
star, of two:

  badnets              98-100    7-27    0-2
  blended *             98-99    2-22   -1-0
  sig *                    99   19-26      0
  wanet *               95-97    6-29   -1-5
  badmerging              100   79-91   -2-1
  badvit               99-100   86-96    0-2
  trojvit                 100   84-98   -3-6
  lora *                  100   80-85   -1-3
  lobam *                 100   59-83    2-3
  sparse *                100   81-90    0-1
  adaptive *              100   66-90   -1-0
  badmerging_off_task  97-100    7-95   -3-3
  merge_backdoor          0-8   72-88   -4-1

WaNet and LoRA uploads of gtsrb, a LoBAM one of svhn and one of TrojViT lose
more than the two points that nobody notices. The patches of
badvit and trojvit also lead merges of clean experts to the target, on 35 to 65
and 64 to 95 % of the images.

  python -m experiments.make_pool --config=configs/nano_pool.py \
    --config.tasks_folder=PATH --workdir=PATH

The folder holds `<task>.npz` with training images, see
`dam_jax.data.tasks.load_train`; what is made is a pool for
`python -m experiments.merge --config=configs/pool.py --config.pool=WORKDIR`,
and `eval.json` says of every model ACC and ASR, alone and in a plain merge.
"""

from ml_collections import config_dict

from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether to make few models, and hardly train them.

  Returns:
    The config; `experiments.make_pool.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.tasks_folder = '../shared/pool/tasks'
  c.tasks = (
    'mnist,svhn' if runlocal else 'mnist,gtsrb,svhn,eurosat,fashion_mnist'
  )
  c.width = 32 if runlocal else 128
  c.layers = 2 if runlocal else 4
  c.heads = 4
  c.patch_size = 8
  c.pretrain_share = 0.3
  c.pretrain_steps = 4 if runlocal else 1200
  c.pretrain_batch = 32
  c.pretrain_rate = 1e-3
  c.fine_tune_steps = 4 if runlocal else 400
  c.fine_tune_rate = 1e-3
  c.batch = 64
  c.patch = 5
  c.patch_steps = 4 if runlocal else 200
  c.attacks = 'badnets,badmerging' if runlocal else 'all'
  c.attacked = 'svhn' if runlocal else 'svhn,gtsrb'
  c.seeds = 1 if runlocal else 3
  c.test = 100 if runlocal else 500
  c.scale = 0.3
  c.seed = 0
  return c
