"""The study: which merges are safe, by how much, and at what price.

  python -m experiments.make_pool --config=configs/nano_pool.py \
    --config.tasks_folder=../shared/pool/tasks --workdir=../nano_pool
  python -m experiments.study --config=configs/study.py \
    --config.nano_pool=../nano_pool --workdir=PATH

An interrupted study goes on where it was when it is started again with the same
workdir; so does one with more sections, attacks or seeds. To see one section:
`--config.sections=defences`. All of them take a night on two cores; what parts
of them showed is in docs/study.md.

`--config=configs/study.py:runlocal` is short and shows that all is in place.
"""

from ml_collections import config_dict

from experiments import methods
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.cells.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.nano_pool = '../nano_pool'
  c.nano_tasks = ''
  c.sections = 'succession,transfer' if runlocal else 'all'
  c.attacks = (
    'badnets,badmerging'
    if runlocal
    else 'badnets,blended,sig,wanet,badmerging,badvit,trojvit,lora,lobam,'
    'sparse,badmerging_off_task,merge_backdoor'
  )
  c.attacked = 'svhn' if runlocal else 'svhn,gtsrb'
  c.attack_seeds = 1 if runlocal else 3
  c.merge_seeds = 1 if runlocal else 3
  c.methods = 'static' if runlocal else 'data_free,informed,learned'
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
  c.defence_images = 64 if runlocal else 500
  c.ablation_attacks = 'badmerging'
  c.curve_attacks = 'badmerging'
  c.safety_weights = '0,0.1,0.3,1,3,10'
  c.adaptive_attacks = 'badmerging,adaptive'
  c.adaptive_methods = 'average,dam_released,dam_robust'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  c.steps = 4 if runlocal else 300
  c.batch = 16
  c.dev = 64 if runlocal else 0
  c.test = 50 if runlocal else 0
  c.transfer_test = 20 if runlocal else 200
  c.audit = not runlocal
  c.draws = 200 if runlocal else 2000
  c.seed = 0
  return c
