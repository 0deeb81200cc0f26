"""Defences that prune units: fine-pruning, and by channel Lipschitzness.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.ones((4, 16)).at[:, 3].set(50.)  # a unit that shouts
  >>> params = {'mlp': {'fc1': {'kernel': kernel, 'bias': jnp.ones(16)}}}
  >>> repaired = clp()(params, None, NoData())
  >>> repaired['mlp']['fc1']['bias'].tolist()[:5]
  [1.0, 1.0, 1.0, 0.0, 1.0]

A unit is an output of a layer with its kernel `[..., in, out]`: what has one
index on the last axis, and its bias. A rule that names kernels is a regular
expression which matches the whole path of a leaf, and tells of floating-point
leaves only.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import losses
from dam_jax import tree
from dam_jax.defences.descent import check_at_least
from dam_jax.defences.descent import descend
from dam_jax.defences.interface import Defence
from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.meta import identity
from dam_jax.transforms import check_finite
from dam_jax.transforms import check_share
from dam_jax.typing import InputsFn, LogitsFn, PreprocessFn


def matching(params: Any, rule: str) -> list[str]:
  """Returns the paths of floating-point leaves that a rule matches.

  Raises:
    ValueError: where there is none.
  """
  leaves = tree.flatten(params)
  paths = [
    path
    for path, x in leaves.items()
    if tree.is_float(x) and re.fullmatch(rule, path)
  ]
  if not paths:
    raise ValueError(
      f'{rule!r} matches no floating-point leaf among {len(leaves)}'
    )
  return paths


def biases(params: Any, kernels: list[str]) -> dict[str, str]:
  """Returns the paths of biases `[out]` by their kernels', where they exist."""
  leaves = tree.flatten(params)
  beside = {
    path: path.removesuffix('kernel') + 'bias'
    for path in kernels
    if path.endswith('kernel')
  }
  return {kernel: bias for kernel, bias in beside.items() if bias in leaves}


def multiply(params: Any, factors: Mapping[str, jax.Array]) -> Any:
  """Multiplies leaves, in their own dtypes.

  Args:
    params: of a model.
    factors: by path, what broadcasts to the leaf.
  """

  def scale(x, factor):
    wide = np.promote_types(x.dtype, np.float32)
    factor = jnp.expand_dims(factor, tuple(range(x.ndim - factor.ndim)))
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)

  leaves = [
    scale(x, factors[path]) if path in factors else x
    for path, x in tree.flatten(params).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def keeps_accuracy(
  params: Any,
  apply_fn: LogitsFn,
  data: Labelled,
  *,
  max_drop: float,
  batch: int,
) -> Callable[[Any], bool]:
  """Makes a test that a model classifies clean images as well as another.

  Args:
    params: of the other.
    apply_fn: maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    data: all of it is read.
    max_drop: how far accuracy, the mean over tasks, may fall; 0.1 are 10
      points.
    batch: images a task in a forward pass.

  Returns:
    `params -> bool`.
  """
  num = data.labels.shape[1]
  batch = min(batch, num)
  chunks = jnp.arange(-(-num // batch) * batch).reshape(-1, batch)

  @jax.jit
  def count(params, data):
    def hits(at):
      rows = jnp.minimum(at, num - 1)
      predicted = jnp.argmax(apply_fn(params, data.images[:, rows]), axis=-1)
      right = predicted.astype(data.labels.dtype) == data.labels[:, rows]
      return jnp.sum(right & (at < num)[None])

    return jnp.sum(jax.lax.map(hits, chunks))

  # Counts, since 0.8 - 0.7 > 0.1 in floating point.
  least = int(count(params, data)) - max_drop * data.labels.size - 1e-6
  return lambda params: int(count(params, data)) >= least


def mean_activations(
  inputs_fn: InputsFn, params: Any, data: Labelled, kernels: list[str], batch
) -> dict[str, jax.Array]:
  """Returns the mean magnitude of each input of layers, over all images.

  Args:
    inputs_fn: what a forward pass gives to each layer, of images in [0, 1].
    params: of the model.
    data: clean images of all tasks.
    kernels: paths of the layers' kernels `[in, out]`.
    batch: images in a forward pass.

  Returns:
    `[in]` by path, float32.
  """

  @jax.jit
  def total(params, task, images):
    found = inputs_fn(params, task, images)
    if missing := [path for path in kernels if path not in found]:
      raise ValueError(f'inputs_fn gives no inputs of {", ".join(missing)}')
    magnitudes = {k: jnp.abs(found[k].astype(jnp.float32)) for k in kernels}
    return {k: (jnp.sum(x, axis=0), len(x)) for k, x in magnitudes.items()}

  tasks, num = data.labels.shape
  parts = [
    total(params, jnp.int32(task), data.images[task, start : start + batch])
    for task in range(tasks)
    for start in range(0, num, batch)
  ]
  sums = jax.tree.map(lambda *x: sum(x), *parts)
  return {path: x / rows for path, (x, rows) in sums.items()}


def fine_pruning(
  inputs_fn: InputsFn,
  *,
  kernels: str = r'(.*/)?mlp/fc2/kernel',
  share: float = 0.01,
  max_drop: float = 0.1,
  tx: optax.GradientTransformation = optax.adam(1e-5),
  steps: int = 1000,
  batch: int = 128,
  preprocess_fn: PreprocessFn = identity,
  seed: int = 0,
) -> Defence:
  """Prunes what is dormant on clean images, and fine-tunes what is left.

  A step prunes the next `share` of hidden units of each layer, in the order of
  their mean magnitude on clean images (for a ReLU, the paper's mean
  activation). The last step whose accuracy on the same images fell by
  `max_drop` at most is kept. What is pruned stays zero in the fine-tuning.

  Args:
    inputs_fn: what a forward pass gives to each linear layer.
    kernels: rule for the kernels `[in, out]` that read hidden units; a pruned
      unit's row is zeroed. The paper prunes the last layer only.
    share: of a layer's units, pruned in a step.
    max_drop: how far accuracy, the mean over tasks, may fall; 0.1 are 10
      points.
    tx: of all floating-point leaves in the fine-tuning.
    steps: of it; 0 only prunes.
    batch: images a task and step.
    preprocess_fn: from images in [0, 1] to what `inputs_fn` reads.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled` images. It raises ValueError where the rule
    matches no leaf, or one of which `inputs_fn` gives no inputs.

  Raises:
    ValueError: where a number makes no sense.

  References:
    Liu et al., `Fine-Pruning: Defending Against Backdooring Attacks on Deep
    Neural Networks <https://arxiv.org/abs/1805.12185>`_, 2018
  """
  check_share('share', share, zero=False, one=True)
  check_share('max_drop', max_drop, zero=True, one=True)
  check_at_least(1, batch=batch)
  check_at_least(0, steps=steps)

  def read(params, task, images):
    return inputs_fn(params, task, preprocess_fn(images))

  def repair(params, apply_fn, data):
    paths = matching(params, kernels)
    activity = mean_activations(read, params, data, paths, batch)
    good_fn = keeps_accuracy(
      params, apply_fn, data, max_drop=max_drop, batch=batch
    )
    kept = _prune_dormant(params, activity, share, good_fn)
    keys = jax.random.split(jax.random.key(seed), steps)
    return _fine_tune(params, kept, apply_fn, data, tx, keys, batch)

  return Defence(Labelled, repair)


def _prune_dormant(params, activity, share, good_fn):
  """Returns factors of rows, 0 for as many units as a model does without."""
  ranks = {path: jnp.argsort(jnp.argsort(x)) for path, x in activity.items()}
  kept = {path: jnp.ones((len(x), 1), bool) for path, x in ranks.items()}
  before = dict.fromkeys(ranks, 0)
  for step in range(1, int(1 / share + 1e-9) + 1):
    counts = {k: int(step * share * len(x) + 1e-9) for k, x in ranks.items()}
    if counts == before:
      continue
    fewer = {k: x[:, None] >= counts[k] for k, x in ranks.items()}
    if not good_fn(multiply(params, fewer)):
      break
    kept, before = fewer, counts
  return kept


def _fine_tune(params, kept, apply_fn, data, tx, keys, batch):
  """Returns a pruned model after a step a key."""

  @jax.jit
  def run(params, kept, data, keys):
    flat = tree.ravel(params)

    def loss_fn(vector, key):
      images, labels = data.draw(key, batch)
      logits = apply_fn(multiply(flat.unravel(vector), kept), images)
      return jnp.mean(losses.cross_entropy(logits, labels))

    vector, _ = descend(jax.grad(loss_fn), tx, flat.vector, keys)
    return multiply(flat.unravel(vector), kept)

  return run(params, kept, data, keys)


def lipschitz_bounds(kernel: jax.Array) -> jax.Array:
  """Returns how much each unit of a layer can amplify its input, `[out]`.

  Args:
    kernel: `[in, out]`, the bound is the L2 norm of a unit's weights; or
      `[..., in, out]` of a convolution, it is the spectral norm of these as a
      matrix from places to channels.

  Examples:
    >>> lipschitz_bounds(jnp.array([[3., 0.], [4., 1.]])).tolist()
    [5.0, 1.0]
  """
  kernel = kernel.astype(np.promote_types(kernel.dtype, np.float32))
  if kernel.ndim <= 2:
    return jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
  matrices = kernel.reshape(-1, *kernel.shape[-2:])
  return jnp.linalg.norm(matrices, ord=2, axis=(0, 1))


def clp(
  kernels: str = r'(.*/)?(mlp|self_attn)/\w+/kernel',
  *,
  deviations: float = 3.0,
) -> Defence:
  """Prunes units whose Lipschitz bound stands out in their layer.

  A trigger is small, so that a unit which answers to it must amplify much. Of
  each layer, units with a bound above `mean + deviations * std` are zeroed with
  their bias; the standard deviation is the sample's.

  Args:
    kernels: rule for the layers' kernels; that of the default are MLPs and
      projections of the attention, as `dam_jax.models.clip` names them.
    deviations: `u` in the paper. No unit of a layer of `n` can stand out by
      more than `(n - 1) / sqrt(n)`.

  Returns:
    A defence that reads `NoData`; `apply_fn` may be None. It raises ValueError
    where the rule matches no leaf.

  Raises:
    ValueError: where `deviations` is negative or not finite.

  References:
    Zheng et al., `Data-free Backdoor Removal based on Channel Lipschitzness
    <https://arxiv.org/abs/2208.03111>`_, 2022
  """
  check_finite('deviations', deviations)
  check_at_least(0, deviations=deviations)

  def repair(params, apply_fn, data):
    del apply_fn, data
    paths = matching(params, kernels)
    leaves = tree.flatten(params)
    bounds = {path: lipschitz_bounds(leaves[path]) for path in paths}
    kept = {
      # Not <=: one unit has no deviation, and NaN must keep it.
      path: ~(x > jnp.mean(x) + deviations * jnp.std(x, ddof=1))
      for path, x in bounds.items()
    }
    beside = biases(params, paths)
    return multiply(
      params, kept | {bias: kept[kernel] for kernel, bias in beside.items()}
    )

  return Defence(NoData, repair)
