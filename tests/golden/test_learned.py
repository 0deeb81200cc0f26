"""Every event of the learned merges, in the reference's order.

Losses and what Adam is given come from the library's own steps. What happens
inside of one (masks, merged parameters, logits, labels) is made again from the
states before and after it, by the library's public functions.
"""

import collections
import dataclasses
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj
from dam_jax.meta_spec import Shared

_NAME = (
  r'(?P<method>adamerging|concrete|dam|post_defense_(?:awm|sau))'
  r'(?:_(?P<granularity>task_arithmetic|task_wise|layer_wise))?'
  r'(?:_adamerging)?(?:_f64)?'
)
_GRANULARITIES = {
  'task_arithmetic': 'arithmetic',
  'task_wise': 'task',
  'layer_wise': 'leaf',
}
_USED = {
  'adamerging_lr',
  'adv_lr',
  'adv_weight',
  'base_lr',
  'batch_size',
  'beta1',
  'beta2',
  'init_values',
  'initial_logits',
  'lr',
  'max_adamerging_steps',
  'max_steps',
  'scaling_factor',
  'shared_weight',
  'temperature',
}
_FIXED = {
  'clamp_weights': False,
  'eval_mask_type': 'continuous',
  'mask_checkpoint': None,
  'merge_dtype': None,
  'optimizer': 'adam',
  'skip_training': False,
  'weights': None,
}
# How the reference stores and loads, and an option that it never reads.
_WITHOUT_EFFECT = {
  'num_workers',
  'save_interval',
  'save_merging_weights',
  'strict',
  'tie_weights',
  'trigger_norm',
}
_MOVED = {
  'adam_mask_logits_after': 'adam_mask_logits',
  'adam_merge_weight_after': 'adam_merge_weight',
  'adam_perturb_after': 'adam_perturb',
  'mask_raw': 'adam_mask_logits',
  'merge_weight_used': 'adam_merge_weight',
}
"""What Adam moves, and which of them."""
_WITHOUT_INNER = re.compile(
  r'(mask_raw|ce|ce_labels|adam_perturb_.*|adam_mask_logits_.*|final_params)'
  r'(/\d+)?'
)
"""Events that an inner step of learning rate zero leaves as they are."""


def _tolerance(file, inner):
  if file.dtype == np.float64:
    return {'': 1e-9}
  if inner:
    # Adam's inner steps are as large as the coefficients: what one gradient
    # was rounded by is in all that follows.
    return {'adam_merge_weight_grad/0': 1e-4, '': 2e-3}
  return {'mask_raw': 1e-3, '': 1e-4}


def _options(file, inputs):
  """Returns the hyper-parameters, or fails where the library has no such."""
  options = file.options(_USED | set(_FIXED) | _WITHOUT_EFFECT)
  lines = [
    f'{file.name}: no test knows {key}={options[key]!r}, only {value!r}'
    for key, value in _FIXED.items()
    if options.get(key, value) != value
  ]
  batch = inputs.images.shape[2]
  if options.get('batch_size', batch) != batch:
    lines.append(
      f'{file.name}: batch_size {options["batch_size"]}, images have {batch}'
    )
  if lines:
    pytest.fail('\n'.join(lines), pytrace=False)
  return options


def _merger(method, granularity, o, inputs, mask):
  """Makes the library's merger of a file's hyper-parameters."""
  options = {'logits_fn': inputs.logits_fn, 'steps': o['max_steps']}
  if method == 'adamerging':
    tx, init = optax.adam(o['lr']), float(np.float32(o['init_values']))
    return dj.adamerging(granularity=granularity, init=init, tx=tx, **options)
  options['mask'] = mask
  adversary = {
    'image_shape': inputs.config.image_shape,
    'adversary_tx': optax.adam(o['adv_lr']),
    'safety_weight': o['adv_weight'],
  }
  if method.startswith('post_defense'):
    options |= {'num_tasks': len(inputs.heads), **adversary}
    if method == 'post_defense_awm':
      return dj.repo_awm(**options)
    weights = Shared(
      weight=o['shared_weight'], untargeted=o['beta1'], divergence=o['beta2']
    )
    return dj.repo_sau(shared=weights, **options)
  options |= {
    'granularity': granularity,
    # The reference makes its coefficients in float32.
    'init': float(np.float32(o['scaling_factor'])),
    'tx': optax.adam(o['adamerging_lr']),
    'coefficient_steps': o['max_adamerging_steps'],
  }
  if method == 'concrete':
    return dj.concrete(inner_tx=optax.adam(o['base_lr']), **options)
  return dj.dam_released(
    inner_learning_rate=o['base_lr'], **adversary, **options
  )


class _Step(NamedTuple):
  """One step of the library: the states around it and what it saw."""

  before: Any
  after: Any
  metrics: Any
  images: np.ndarray


def _run(merger, models, images, jit, *, mask_steps, unread):
  """Returns all steps, and the merged parameters.

  Before each step of the mask, `unread` draws of images go unread.
  """
  steps, draw, phases = [], 0, merger.plan.phases
  state = jit(merger.init)(jax.random.key(0), *models)
  step_fn = jit(merger.step)
  # The steps after the mask's read one draw, and are given as many.
  padded = np.concatenate([images, images[:phases]])
  for s in range(merger.plan.steps):
    draw += unread if s < mask_steps else 0
    batch = dj.Batch(padded[draw : draw + phases])
    draw += phases if s < mask_steps else 1
    after, metrics = step_fn(state, *models, batch)
    seen = (state._replace(key=None), after._replace(key=None), metrics)
    steps.append(_Step(*jax.device_get(seen), batch.images))
    state = after
  if draw > len(images):
    pytest.fail(f'{draw} draws of images are needed, there are {len(images)}')
  return steps, jit(merger.finalize)(state, *models)


class _Events(dict):
  """The reference's events by name, `<what>/<n>` for the n-th, in order.

  Attributes:
    scales: how exactly Adam could move each entry, in [0, 1], by optimiser.
    weights: how much the entries count, by name; others count alike.
  """

  def __init__(self, inputs, base, experts, mask, jit):
    super().__init__()
    self.weights, self.scales = {}, {}
    self._count, self._inputs = collections.Counter(), inputs
    deltas = experts.vector - base.vector[None]

    def combine(w, values):
      masked = dj.masks.masked_sum(
        deltas, base.layout, w, {'shared': mask}, values
      )
      return base.vector + masked

    def predict(theta, pixels):
      return inputs.logits_fn(base.unravel(theta), pixels)

    self.combine, self.predict = jit(combine), jit(predict)

  def add(self, what, value):
    """Adds an event."""
    name = f'{what}/{self._count[what]}'
    self._count[what] += 1
    self[name] = np.asarray(value)
    if _MOVED.get(what) in self.scales:
      self.weights[name] = self.scales[_MOVED[what]]

  def merge(self, w, values):
    """Adds one use of the coefficients; returns the merged vector."""
    theta = self.combine(w, values)
    self.add('merge_weight_used', self._inputs.by_leaf(w))
    self.add('merged', self._inputs.flat(theta))
    return theta

  def entropies(self, theta, *views, backward=False):
    """Adds a loss `[T]` for each `(pixels, loss)`, task by task."""
    logits = [self.predict(theta, pixels) for pixels, _ in views]
    for t, head in enumerate(self._inputs.heads):
      for own, (_, loss) in zip(logits, views, strict=True):
        self.add('logits_entropy', own[t, :, : head.shape[1]])
        self.add('entropy', loss[t])
        if backward:
          self.add('backward_loss', loss[t])

  def adam(self, what, before, after, value, lr, order):
    """Adds a step of Adam; its gradient is what its first moment took in."""
    old, new = optax.tree.get(before, 'mu'), optax.tree.get(after, 'mu')
    # Adam divides by this, and so multiplies rounding where it is small; a step
    # of noise stays in the values from then on.
    scale = np.sqrt(order(optax.tree.get(after, 'nu')))
    scale = scale / scale.max() if scale.any() else np.ones_like(scale)
    self.scales[what] = np.minimum(self.scales.get(what, scale), scale)
    self.add(f'{what}_grad', order((new - 0.9 * old) / 0.1))
    self.add(f'{what}_after', order(value))
    self.add(f'{what}_lr', lr)


def _mask_step(events, o, inputs, step, values, *, post):
  """Adds the events of one step of the mask."""
  before, after, metrics, images = step
  images, loss = iter(images), metrics['clean/loss'].sum()
  if 'inner/loss' in metrics:
    theta = events.merge(before.coefficients, values)
    events.entropies(theta, (next(images), metrics['inner/loss']))
    events.add('backward_loss', metrics['inner/loss'].sum())
    events.adam(
      'adam_merge_weight',
      before.inner_state,
      after.inner_state,
      after.coefficients,
      o['base_lr'],
      inputs.by_leaf,
    )
  combine = events.combine if post else events.merge
  theta, views = combine(after.coefficients, values), []
  if after.adversary is not None:
    pixels = next(images)
    labels = np.argmax(events.predict(theta, pixels), axis=-1)
    logits = events.predict(theta, pixels + before.adversary[0, :, None])
    ce = dj.losses.cross_entropy(logits, labels).mean(-1)
    for t in range(len(inputs.heads)):
      events.add('ce', ce[t])
      events.add('ce_labels', labels[t])
    events.add('backward_loss', metrics['perturbation/loss'].sum())
    events.adam(
      'adam_perturb',
      before.adversary_state,
      after.adversary_state,
      after.adversary,
      o['adv_lr'],
      lambda x: x[0].transpose(0, 3, 1, 2),
    )
  pixels = next(images)
  if after.adversary is not None:
    perturbed = np.clip(pixels + after.adversary[0, :, None], 0, 1)
    views.append((perturbed, metrics['safety/loss']))
    loss += o['adv_weight'] * metrics['safety/loss'].sum()
  if 'shared/loss' in metrics:
    loss += o['shared_weight'] * metrics['shared/loss'].sum()
  views.insert(0 if post else 1, (pixels, metrics['clean/loss']))
  events.entropies(theta, *views)
  events.add('backward_loss', loss)
  events.adam(
    'adam_mask_logits',
    before.mask_states['shared'],
    after.mask_states['shared'],
    after.masks['shared'],
    o['lr'],
    inputs.flat,
  )


def _coefficient_steps(events, o, inputs, steps, w, values):
  """Adds the events of the steps that learn coefficients, from `w`."""
  alone = not values  # AdaMerging takes each task's gradient by itself.
  earlier = set(events)
  for before, after, metrics, images in steps:
    theta, loss = events.merge(w, values), metrics['coefficients/loss']
    events.entropies(theta, (images[0], loss), backward=alone)
    if not alone:
      events.add('backward_loss', loss.sum())
    events.adam(
      'adam_merge_weight',
      before.coefficient_state,
      after.coefficient_state,
      after.coefficients,
      o['lr' if alone else 'adamerging_lr'],
      inputs.by_leaf,
    )
    w = after.coefficients
  # The reference wrote its uses down as views of what Adam went on to move.
  for name in set(events) - earlier:
    if name.startswith('merge_weight_used/'):
      events[name] = inputs.by_leaf(w)
      events.weights[name] = events.scales['adam_merge_weight']
  for _ in range(2 if alone else 1):
    events.merge(w, values)


def _events(file, method, granularity, o, inputs, jit, unread):
  """Returns the library's events under a file's hyper-parameters."""
  post, dtype = method.startswith('post_defense'), file.dtype
  uniform, mask, mask_steps = inputs.ravel(inputs.uniform), None, 0
  if method != 'adamerging':
    mask_steps = o['max_steps']
    if len(uniform) <= mask_steps:
      pytest.fail(f'{file.name}: noise has {len(uniform)} samples')
    uniform = jnp.asarray(uniform, dtype)
    mask = dj.masks.Mask(
      init=o['initial_logits'],
      temperature=o['temperature'],
      tx=optax.adam(o['lr']),
      uniform_fn=lambda key, step, like, layout: uniform[step],
    )
  experts = file.arrays['merge_params'][None] if post else inputs.experts
  base, experts = jit(
    lambda b, e: (dj.tree.ravel(b), dj.tree.ravel(e, leading=1))
  )(*[inputs.unflatten(x.astype(dtype)) for x in (inputs.base, experts)])
  merger = _merger(method, granularity, o, inputs, mask)
  steps, final = _run(
    merger,
    (base, experts),
    inputs.images.astype(dtype),
    jit,
    mask_steps=mask_steps,
    unread=unread,
  )
  events = _Events(inputs, base, experts, mask, jit)
  value_fn = jit(lambda *arrays: dj.masks.value(mask, *arrays))

  def value(state, u):
    m = value_fn(state.masks['shared'], u)
    events.add('mask_raw', inputs.flat(m))
    return {'shared': m}

  for step, u in zip(steps[:mask_steps], uniform, strict=False):
    values = value(step.before, u)
    _mask_step(events, o, inputs, step, values, post=post)
  values = value(steps[-1].after, uniform[mask_steps]) if mask else {}
  if not post:
    start, late = steps[0].before.coefficients, steps[mask_steps:]
    _coefficient_steps(events, o, inputs, late, start, values)
  events['final_params'] = inputs.flatten(final)
  return events


def _comparable(inputs, arrays, weights):
  """Weighs what Adam moved, and leaves out what it makes of k_proj's biases.

  Softmax does not see those biases, so their gradients are zero but for
  rounding, which Adam makes full steps of. Nothing that the model computes
  depends on them.
  """
  kept = {}
  for name, x in arrays.items():
    if name in weights:
      x = x * weights[name].astype(x.dtype)
    elif name.startswith(('merged/', 'final_params')):
      x = x[~inputs.dead]
    kept[name] = x
  return kept


def test_every_event_is_the_references(
  learned_path, inputs, read, compare, quick_jit
):
  file = read(learned_path)
  match = re.fullmatch(_NAME, file.name)
  if not match:
    pytest.fail(f'{file.name}: no test knows this method', pytrace=False)
  method, granularity = match['method'], _GRANULARITIES.get(match[2])
  options, arrays = _options(file, inputs), dict(file.arrays)
  names = arrays.pop('events').tolist()
  arrays.pop('merge_params', None)  # what a post-defence starts from
  inner = 'adam_merge_weight_grad/0' in names and method != 'adamerging'
  # The reference's task arithmetic takes inner steps of learning rate zero.
  runs = ['task'] if granularity == 'arithmetic' and inner else []
  for run in [*runs, granularity]:
    unread = int(run == 'arithmetic' and (inner or method == 'dam'))
    with file.precision():
      events = _events(file, method, run, options, inputs, quick_jit, unread)
    wanted, suffix = arrays, ''
    if run == 'arithmetic' and inner:
      wanted = {k: x for k, x in arrays.items() if _WITHOUT_INNER.fullmatch(k)}
      suffix = ' (no inner step)'
    elif list(events)[:-1] != names:
      pairs = itertools.zip_longest(names, list(events)[:-1])
      theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
      pytest.fail(f'{file.name}: the event {theirs} is {ours} here')
    theirs = dataclasses.replace(
      file,
      name=file.name + suffix,
      arrays=_comparable(inputs, wanted, events.weights),
    )
    ours = _comparable(inputs, events, events.weights)
    compare(theirs, ours, _tolerance(file, inner and options['base_lr']))
