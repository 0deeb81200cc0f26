"""All methods on experts trained on the spot, two of them backdoored.

Claim: a plain merge inherits both backdoors, and `dam_robust` takes away most
of one and a part of the other, at a small cost in accuracy.

Expected, in per cent: task_arithmetic ACC 76.0, ASR 98.5 (BadMerging on mnist)
and 47.3 (BadNets on rotation); dam_robust 75.7, 19.0 and 33.1; clean experts,
merged, 77.5, 54.4 and 13.3. The other learned merges take 20 steps here, of the
1000 or more that their authors gave them: enough to see them run, not to judge
them.

The options of dam_robust were chosen among twenty-two on dev images
(`--config.report_on=dev`), those of the training while looking at test images.
Where its updates fade, as after an audit, it has 76.6, 49.7 and 49.9: the last
patches are not learned against.

  python -m experiments.merge --config=configs/quickstart.py
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
  c.pool = ''
  c.make = config_dict.ConfigDict()
  c.make.badnets = 'rotation'
  c.make.badmerging = 'mnist'
  c.make.pretrain_steps = 20 if runlocal else 220
  c.make.fine_tune_steps = 10 if runlocal else 150
  c.tasks = ''
  c.usual_tasks = 'mnist,digits,rotation,position,colour'
  c.bad = '2'
  c.usual_bad = 'badmerging_mnist,badnets_rotation'
  c.triggers = ''
  c.methods = 'static,dam_robust' if runlocal else 'static,learned'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  if not runlocal:
    c.options.dam_robust.steps = 150
  for name in methods.ALL:
    if name.startswith('dam_robust'):
      # A tower this small obeys any large patch: weigh accuracy higher.
      c.options[name].safety_weight = 0.1
      c.options[name].restarts = 2
      c.options[name].warmup_ascents = 20
      c.options[name].batch = 8
  c.steps = 4 if runlocal else 20
  c.batch = 16
  c.compute = 'float32'
  c.scan_layers = False
  c.remat = False
  # Twenty steps of a tower this small take less time than compiling them well.
  c.compiler_options = {'xla_backend_optimization_level': 0}
  c.mesh = ''
  c.dev = 0
  c.test = 40 if runlocal else 0
  c.report_on = 'test'
  c.transfer_test = 40 if runlocal else 300
  c.test_batch = 250
  c.audit = False
  c.max_lost = 50
  c.keep_last = 1
  c.keep_every = 0
  c.seed = 0
  return c
