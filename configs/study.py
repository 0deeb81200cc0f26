"""The study: which merges are safe, by how much, and at what price.

  python -m experiments.make_pool --config=configs/nano_pool.py \
    --config.tasks_folder=../shared/pool/tasks --workdir=../nano_pool
  python -m experiments.study --config=configs/study.py \
    --config.nano_pool=../nano_pool --workdir=PATH

An interrupted study goes on where it was when it is started again with the same
workdir; so does one with more sections, attacks or seeds. To see one section:
`--config.sections=defences`. All of them take a night on two cores, and have
not been run together yet.

Of the section succession on a nano pool, with 150 steps and 300 test images,
mean ASR of three uploads on each of svhn and gtsrb, all with audits that did
not ask the base yet; merge_backdoor with safety_weight=1:

                 | task_arithmetic | dam_robust | clean merge
  badmerging     | 86.0            | 3.6        | 11.9
  badnets        | 19.4            | 1.7        | 2.3
  lobam          | 67.0            | 15.6       | 10.2
  merge_backdoor | 76.1            | 54.1       | 5.6

So `dam_robust` undoes BadMerging and BadNets, five of six LoBAM uploads, the
sixth kept 60.8, and not MergeBackdoor, whose trigger neither upload alone
knows. ACC is 60 to 64, and 59 to 62 for task_arithmetic.

Of the sections ablation and curve, as above but with badmerging_svhn_0 alone;
intervals are 5 wide in ACC and 4 to 11 in ASR:

                             | ACC  | ASR
  task_arithmetic            | 61.5 | 87.1
    of clean experts         | 60.8 | 21.9
  dam_paper, both in turn    | 61.5 | 89.2
    M1 only                  | 59.6 | 90.6
    M2 only                  | 62.5 | 83.8
    joint                    | 61.3 | 90.6
    exact gradient           | 61.7 | 89.2
  dam_released               | 61.1 | 85.3
  dam_robust                 | 63.7 | 7.2
    with safety_weight=0     | 63.7 | 74.5
    with safety_weight=0.1   | 63.9 | 21.2
    with safety_weight=1     | 60.9 | 5.4
    with safety_weight=3     | 56.6 | 2.2

`--config=configs/study.py:runlocal` is short and shows that all is in place.
"""

from ml_collections import config_dict

from experiments import methods
from experiments import settings


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal'.

  Returns:
    The config; `experiments.cells.KEYS` says what each key means.
  """
  local = settings.is_local(arg)
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.nano_pool = '../nano_pool'
  c.nano_tasks = ''
  c.sections = 'succession,transfer' if local else 'all'
  c.attacks = (
    'badnets,badmerging'
    if local
    else 'badnets,blended,sig,wanet,badmerging,badvit,trojvit,lora,lobam,'
    'sparse,badmerging_off_task,merge_backdoor'
  )
  c.attacked = 'svhn' if local else 'svhn,gtsrb'
  c.attack_seeds = 1 if local else 3
  c.merge_seeds = 1 if local else 3
  c.methods = 'static' if local else 'data_free,informed,learned'
  c.tasks = 'cifar100,mnist,gtsrb,svhn,aid,eurosat'
  c.bad = ','.join(
    f'badmerging_{task}' for task in ('cifar100', 'gtsrb', 'svhn', 'eurosat')
  )
  c.bad_counts = '0,1,2,4'
  c.bad_rotations = 1
  c.task_counts = '2,4,6,8'
  c.task_order = 'svhn,mnist,gtsrb,cifar100,aid,eurosat,fashion_mnist'
  c.task_order += ',emnist_letters'
  c.task_bad = 'badmerging_svhn'
  c.number_methods = 'average,ties,dam_robust'
  c.defences = 'repairs,dam_robust'
  c.defence_attacks = 'badnets,badmerging'
  c.defence_images = 64 if local else 500
  c.ablation_attacks = 'badmerging'
  c.curve_attacks = 'badmerging'
  c.safety_weights = '0,0.1,0.3,1,3,10'
  c.adaptive_attacks = 'badmerging,adaptive'
  c.adaptive_methods = 'average,dam_released,dam_robust'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  c.steps = 4 if local else 300
  c.batch = 16
  c.dev = 64 if local else 0
  c.test = 50 if local else 0
  c.transfer_test = 20 if local else 200
  c.audit = not local
  c.draws = 200 if local else 2000
  c.seed = 0
  return c
