"""Merges without data, against the reference's merged parameters."""

import itertools

import pytest

import dam_jax as dj

_TOLERANCE = {'float32': {'': 1e-6}, 'float64': {'': 1e-9}}
_META = {
  'linear': {'weights'},
  'slerp': set(),
  'ties': set(),
  'dare': {'scaling_factor'},
}


def _transform(words, options, meta):
  """Returns the merge that an array is named after, None if there is none."""
  match words, sorted(options):
    case ['simple_average'], []:
      return dj.average()
    case ['weighted_average'], ['normalize']:
      normalize = options['normalize'] == 'True'
      return dj.weighted_average(meta['weights'], normalize=normalize)
    case ['task_arithmetic', scale], []:
      return dj.task_arithmetic(float(scale))
    case ['task_arithmetic'], []:
      return dj.task_arithmetic(meta.get('scaling_factor', 0.3))
    case ['slerp'], ['t']:
      return dj.slerp(float(options['t']))
    case ['slerp'], ['DOT_THRESHOLD', 't']:
      parallel = float(options['DOT_THRESHOLD'])
      return dj.aggregators.slerp(float(options['t']), parallel=parallel)
    case ['ties', merge], ['scaling', 'threshold']:
      density = float(options['threshold']) / 100
      return dj.ties(density, float(options['scaling']), merge=merge)
  return None


def _merge(method, name, meta, uniforms):
  """Returns the merge of a name like `sum/threshold=20/scaling=0.5`."""
  parts = name.split('/')
  words = [part for part in parts if '=' not in part]
  options = dict(part.split('=') for part in parts if '=' in part)
  if method != 'dare':
    prefix = [] if method == 'linear' else [method]
    return _transform(prefix + words, options, meta)
  rate = float(options.pop('sparsity'))
  rescale = options.pop('rescale', 'True') == 'True'
  then = _transform(words, options, meta)
  leaves = itertools.cycle(uniforms)  # `chain` traces before it computes
  drop = dj.transforms.drop(
    rate, rescale=rescale, uniform_fn=lambda key, leaf: next(leaves)
  )
  return then and dj.chain(drop, then)


def test_every_merge_is_the_references(
  static_path, inputs, read, compare, quick_jit
):
  file = read(static_path)
  method = file.name.removesuffix('_f64')
  meta, merged = file.options(_META[method]), {}
  models = inputs.experts[:2] if method == 'slerp' else inputs.experts
  with file.precision():
    base = inputs.unflatten(inputs.base.astype(file.dtype))
    experts = inputs.unflatten(models.astype(file.dtype))
    uniform = dj.tree.flatten(inputs.unflatten(inputs.dare_uniform)).values()
    for name in file.arrays:
      tx = _merge(method, name, meta, uniform)
      if tx is None:
        pytest.fail(f'{file.name}: no test knows the merge {name}')
      merged[name] = inputs.flatten(dj.merge(tx, base, experts).params)
  compare(file, merged, _TOLERANCE[file.dtype.name])


def test_statistics(statistics_path):
  pytest.skip('not built yet')
