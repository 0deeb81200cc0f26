"""All methods on experts trained on the spot, two of them backdoored.

Claim: a plain merge inherits the backdoor that was made to survive merging,
and `dam_robust` takes it away, at no cost in accuracy.

  python -m experiments.merge --config=configs/quickstart.py
"""

from ml_collections import config_dict

from experiments import methods


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    arg: '' or 'runlocal', which is the same but shorter.

  Returns:
    The config; `experiments.load.KEYS` says what each key means.
  """
  if arg not in ('', 'runlocal'):
    raise ValueError(
      f"the config's argument is 'runlocal' or none, got {arg!r}"
    )
  local = arg == 'runlocal'
  c = config_dict.ConfigDict()
  c.pool = ''
  c.make = config_dict.ConfigDict()
  c.make.badnets = 'rotation'
  c.make.badmerging = 'mnist'
  c.make.pretrain_steps = 20 if local else 220
  c.make.fine_tune_steps = 10 if local else 150
  c.tasks = ''
  c.usual_tasks = 'mnist,digits,rotation,position,colour'
  c.bad = '2'
  c.usual_bad = 'badmerging_mnist,badnets_rotation'
  c.triggers = ''
  c.methods = 'static,dam_robust' if local else 'all'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  if not local:
    c.options.dam_robust.steps = 150
  for name in methods.ALL:
    if name.startswith('dam_robust'):
      # A tower this small obeys any large patch: weigh accuracy higher.
      c.options[name].safety_weight = 0.1
      c.options[name].batch = 8
  c.steps = 4 if local else 20
  c.batch = 16
  c.compute = 'float32'
  c.scan_layers = False
  c.dev = 0
  c.test = 40 if local else 0
  c.transfer_test = 40 if local else 300
  c.test_batch = 250
  c.seed = 0
  return c
