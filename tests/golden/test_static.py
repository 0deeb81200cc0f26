"""Closed forms, without data and with, against the reference's arrays."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest

import dam_jax as dj
from dam_jax.models import clip
from dam_jax.models import convert
from dam_jax.models import inputs as inputs_lib

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


# Inverses of unscaled Grams, of condition 2e4, in float32.
_STATISTICS_TOLERANCE = {
  'float32': {'merged/reduce=1': 1e-3, '': 1e-5},
  'float64': {'': 1e-9},
}
_STATISTICS_META = {
  'batch_size',
  'data',
  'minimal_fisher_weight',
  'num_fisher_examples',
  'num_regmean_examples',
}


def _batches(file, inputs):
  """Returns the images of each batch, `[K, B, H, W, C]`."""
  meta = file.options(_STATISTICS_META)
  draws = re.search(r'images\[t, ?(\d+):(\d+)\]', meta['data'])
  if not draws:
    pytest.fail(f'{file.name}: no test knows the data {meta["data"]!r}')
  images = inputs.images[slice(*map(int, draws.groups()))]
  images = np.concatenate(images.astype(file.dtype), axis=1)
  size = meta.get('batch_size', images.shape[1])
  for name in ('num_fisher_examples', 'num_regmean_examples'):
    wanted = -(-meta.get(name, images.shape[1]) // size) * size
    if wanted != images.shape[1]:
      pytest.fail(
        f'{file.name}: {name} {meta[name]} in batches of {size} are not the '
        f'{images.shape[1]} images of {meta["data"]!r}'
      )
  return [images[:, i : i + size] for i in range(0, images.shape[1], size)]


def _fisher(file, inputs):
  """Returns the accumulator, and from its statistics all arrays by name."""
  heads = clip.stack_heads(inputs.heads, scale=inputs.scale)
  epsilon = file.meta.get('minimal_fisher_weight', 1e-6)

  def arrays(fishers, merge):
    yield (
      'fisher_weights',
      np.stack([inputs.flatten(f) for f in dj.tree.unstack(fishers)]),
    )
    for name in file.arrays:
      match = re.fullmatch(
        r'merged/normalize=(True|False)(?:/minimal=([\d.e-]+))?', name
      )
      if match:
        tx = dj.weighted.precision_weighted(
          fishers,
          normalize=match[1] == 'True',
          epsilon=float(match[2] or epsilon),
        )
        yield name, merge(tx)

  task_logits_fn = clip.zero_shot_task(inputs.tower, heads)
  return (
    dj.statistics.diagonal_fisher(task_logits_fn, labels='fusion_bench'),
    arrays,
  )


def _regmean(file, inputs):
  """Returns the accumulator, and from its statistics all arrays by name."""
  dense_fn = inputs_lib.dense_inputs(clip.VisionTower(inputs.config))

  def inputs_fn(params, task, images):
    found = dense_fn(inputs.with_projection(params), task, images)
    return {k: x for k, x in found.items() if k in dj.tree.names(params)}

  def arrays(grams, merge):
    for name in file.arrays:
      kind, *rest = name.split('/')
      if kind == 'gram':
        path = convert.clip_vision.to_path(f'{rest[1]}.weight')
        yield name, grams[path][int(rest[0])]
      elif match := re.fullmatch(r'reduce=([\d.]+)', '/'.join(rest)):
        scale = float(match[1])
        yield name, merge(dj.weighted.gram_weighted(grams, scale=scale))

  return dj.statistics.input_grams(inputs_fn), arrays


def test_statistics(statistics_path, inputs, read, compare, quick_jit):
  file = read(statistics_path)
  method = file.name.removesuffix('_f64')
  make = {'fisher': _fisher, 'regmean': _regmean}[method]
  with file.precision():
    base, experts = (
      inputs.unflatten(x.astype(file.dtype))
      for x in (inputs.base, inputs.experts)
    )
    batches, (accumulator, arrays) = _batches(file, inputs), make(file, inputs)
    carry = accumulator.init(jax.random.key(0), experts, batches[0])
    update_fn = quick_jit(accumulator.update)
    for images in batches:
      carry = update_fn(carry, experts, images)

    def merge(tx):
      merged = quick_jit(functools.partial(dj.merge, tx))(base, experts)
      return inputs.flatten(merged.params)

    ours = dict(arrays(accumulator.finalize(carry), merge))
  compare(file, ours, _STATISTICS_TOLERANCE[file.dtype.name])
