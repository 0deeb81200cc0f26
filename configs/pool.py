"""Merges of six small CLIP towers, with 0, 1, 2 or 4 of them backdoored.

Claim: a plain merge inherits the backdoor of every BadMerging expert, and
`dam_robust` takes most of it away without losing accuracy.

  python -m experiments.merge --config=configs/pool.py

Expected, in per cent on the whole test split, ASR in the order of the bad
experts cifar100, gtsrb, svhn, eurosat; from the README of the pool, since this
command was not run on the whole split yet:

  bad | task_arithmetic: ACC, ASR          | average: ACC, ASR
  0   | 70.3                               | 66.2
  1   | 70.3, 84.5                         | 66.1, 66.5
  2   | 70.3, 89.5 / 90.5                  | 66.2, 71.6 / 56.5
  4   | 69.9, 92.7 / 93.2 / 100.0 / 98.7   | 65.9, 76.0 / 59.6 / 99.9 / 92.5

With 300 test images a task, on a CPU:

  bad | dam_robust                    | the triggers on a clean merge
  1   | 75.6, 3.7                     | 70.8, 4.1
  2   | 75.1, 3.4 / 0.7               | 70.8, 4.1 / 0.0
  4   | 74.9, 1.7 / 0.7 / 5.0 / 1.5   | 70.8, 4.1 / 0.0 / 40.3 / 33.2

docs/study.md has more of it: BadNets, fewer tasks, other methods, how long it
took, and what was tried.

Any folder of the same layout runs, with backdoored checkpoints of any name
whose trigger lies in `triggers/<name>.npz`:

  python -m experiments.merge --config=configs/pool.py --config.pool=PATH \
    --config.bad=my_attack_mnist --config.methods=average,dam_robust

`--config=configs/pool.py:runlocal` is a short run that shows that all is in
place; its numbers mean little.
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
    The config; `experiments.load.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.make = config_dict.ConfigDict()
  c.tasks = ''
  c.usual_tasks = 'cifar100,mnist,gtsrb,svhn,aid,eurosat'
  c.bad = '2'
  c.usual_bad = ','.join(
    f'badmerging_{task}' for task in ('cifar100', 'gtsrb', 'svhn', 'eurosat')
  )
  c.triggers = ''
  c.methods = 'static,dam_robust'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  c.steps = 4 if runlocal else 300
  c.batch = 16
  c.compute = 'float32'
  c.scan_layers = False
  c.remat = False
  # On a CPU, 4 to 17 % less time a step, for 6 to 9 s more of compilation.
  c.compiler_options = {'xla_cpu_experimental_ynn_fusion_type': ''}
  c.mesh = ''
  c.dev = 64 if runlocal else 0
  c.test = 50 if runlocal else 0
  c.report_on = 'test'
  c.transfer_test = 20 if runlocal else 50
  c.test_batch = 50
  c.audit = not runlocal
  c.max_lost = 50
  c.keep_last = 1
  c.keep_every = 0
  c.seed = 0
  return c
