"""Named merges that weigh experts by statistics of data: Fisher, RegMean.

They read unlabelled images, and nothing is learned: a step adds a batch to the
statistics, and the merge is a closed form at the end. They run as

  merger = dj.regmean(inputs_fn, image_shape=(32, 32, 3))
  state = merger.init(key, base, experts)
  for batch in batches:  # merger.plan.steps of them
    state, metrics = merger.step(state, base, experts, batch)
  params = merger.finalize(state, base, experts)

Expert `t` sees the images of task `t` alone. A step whose statistics are not
finite leaves the state as it was, and its metric `finite` is False.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from dam_jax import aggregators
from dam_jax import statistics
from dam_jax import tree
from dam_jax import weighted
from dam_jax.base import Merger
from dam_jax.base import Plan
from dam_jax.base import merge
from dam_jax.meta import identity
from dam_jax.typing import (
  Batch,
  InputsFn,
  Params,
  PreprocessFn,
  TaskLogitsFn,
)


def _images(experts: Params, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
  """Returns one image a task, as accumulators need to know it."""
  leaves = jax.tree.leaves(experts)
  wide = jnp.float64 in [x.dtype for x in leaves]
  dtype = jnp.float64 if wide else jnp.float32
  return jax.ShapeDtypeStruct((leaves[0].shape[0], 1, *shape), dtype)


def _check_steps(steps: int) -> None:
  if steps < 1:
    raise ValueError(f'steps must be positive, got {steps}')


def _check_shape(image_shape: Sequence[int]) -> None:
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(f'image_shape must be (H, W, C), got {image_shape}')


def _checked(name: str, old: Any, new: Any, traces: Sequence[Any]) -> Any:
  """Returns the state to go on with, and what a step measured."""
  trace = functools.reduce(jnp.add, traces)
  finite = jnp.all(jnp.isfinite(trace))
  kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  return kept, {f'{name}/trace': trace, 'finite': finite}


def fisher(
  task_logits_fn: TaskLogitsFn,
  *,
  labels: str = 'sampled',
  normalize: bool = True,
  epsilon: float = 1e-6,
  microbatch: int = 1,
  steps: int = 16,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """Fisher merging: each parameter's mean, by the experts' Fisher information.

  `theta = sum_t F_t theta_t / sum_t F_t`, where `F_t` is the diagonal of expert
  `t`'s Fisher information on its own task.

  A step costs a forward and a backward pass for the images of each task
  ('expected': one of those a class), and the state holds `K` models.

  Args:
    task_logits_fn: one forward pass for one task.
    labels: 'sampled' from the experts' predictions; 'expected' over all
      classes, exactly; 'true', for which `Batch.references` must be one-hot
      labels; or 'fusion_bench', which squares whole batches as FusionBench
      does. `dam_jax.statistics.diagonal_fisher` says more.
    normalize: give all experts Fisher information of equal norm, as the
      authors' code and FusionBench do.
    epsilon: added to the Fisher information before that, as in FusionBench;
      what matters to no expert becomes the plain mean.
    microbatch: images whose gradients are held at once, each a model in size.
    steps: batches that are read.
    preprocess_fn: from images in [0, 1] to what `task_logits_fn` reads.

  Returns:
    A merger that reads one draw of images a step.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Matena and Raffel, `Merging Models with Fisher-Weighted Averaging
    <https://arxiv.org/abs/2111.09832>`_, 2022
  """
  _check_steps(steps)
  weighted.check_epsilon(epsilon)

  def logits_fn(params, task, images):
    return task_logits_fn(params, task, preprocess_fn(images))

  accumulator = statistics.diagonal_fisher(
    logits_fn, labels=labels, microbatch=microbatch
  )

  def init_fn(key, base, experts):
    del base
    return accumulator.init(key, tree.unravel(experts), None)

  def step_fn(state, base, experts, batch: Batch):
    del base
    images, references = jax.tree.map(lambda x: x[0], batch)
    new = accumulator.update(state, tree.unravel(experts), images, references)
    traces = [
      jnp.sum(x, axis=tuple(range(1, x.ndim)))
      for x in jax.tree.leaves(accumulator.finalize(new))
    ]
    return _checked('fisher', state, new, traces)

  def finalize_fn(state, base, experts):
    tx = weighted.precision_weighted(
      accumulator.finalize(state), epsilon=epsilon, normalize=normalize
    )
    return merge(tx, tree.unravel(base), tree.unravel(experts)).params

  plan = Plan(steps=steps, phases=1, references=labels == 'true')
  return Merger(init_fn, step_fn, finalize_fn, plan)


def _traces(grams: Any) -> list[jax.Array]:
  """Returns each layer's mean squared inputs, summed, `[K]`."""
  return [jnp.trace(g, axis1=1, axis2=2) for g in jax.tree.leaves(grams)]


def regmean(
  inputs_fn: InputsFn,
  *,
  image_shape: tuple[int, int, int],
  scale: float = 0.9,
  steps: int = 16,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """RegMean: linear layers whose outputs are nearest to the experts'.

  `W = (sum_t G_t)^-1 sum_t G_t W_t` with `G_t = X_t^T X_t` of the inputs `X_t`
  of each linear layer in expert `t` on its own task, entries off the diagonal
  scaled. Other leaves, biases too, are averaged.

  A step costs a forward pass for the images of each task and about as much
  again for the Grams. The state holds `K` Grams `[in, in]` a layer.

  Args:
    inputs_fn: what a forward pass gives to each linear layer, such as
      `dam_jax.models.clip.dense_inputs`.
    image_shape: `(H, W, C)`.
    scale: of the Grams' entries off the diagonal, in [0, 1].
    steps: batches that are read.
    preprocess_fn: from images in [0, 1] to what `inputs_fn` reads.

  Returns:
    A merger that reads one draw of images a step.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
    <https://arxiv.org/abs/2212.09849>`_, 2023
  """
  _check_steps(steps)
  _check_shape(image_shape)
  weighted.check_scale(scale)

  def pixels_fn(params, task, images):
    return inputs_fn(params, task, preprocess_fn(images))

  accumulator = statistics.input_grams(pixels_fn)

  def init_fn(key, base, experts):
    del base
    experts = tree.unravel(experts)
    return accumulator.init(key, experts, _images(experts, image_shape))

  def step_fn(state, base, experts, batch: Batch):
    del base
    new = accumulator.update(state, tree.unravel(experts), batch.images[0])
    return _checked('grams', state, new, _traces(accumulator.finalize(new)))

  def finalize_fn(state, base, experts):
    tx = weighted.gram_weighted(accumulator.finalize(state), scale=scale)
    return merge(tx, tree.unravel(base), tree.unravel(experts)).params

  return Merger(init_fn, step_fn, finalize_fn, Plan(steps=steps, phases=1))


class LevelsState(NamedTuple):
  """State of RegMean++.

  Attributes:
    count: [] steps taken.
    grams: of all layers, each filled while its level is merged.
    merged: leaves by path; those of a level and above it are still plain means
      while that level is merged.
  """

  count: jax.Array
  grams: statistics.Carry
  merged: dict[str, jax.Array]


def regmean_plus_plus(
  inputs_fn: InputsFn,
  *,
  image_shape: tuple[int, int, int],
  levels: Sequence[str],
  scale: float = 0.9,
  steps: int = 16,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """RegMean++: RegMean level by level, on inputs from what is merged below.

  Leaves have a level, in the order of a forward pass. To merge a level, each
  expert's own leaves of that level read what the merged leaves below it make of
  its images; then `W = (sum_t G_t)^-1 sum_t G_t W_t` as in RegMean. Leaves of
  no level are averaged before all others.

  It takes one pass over the images a level. A step costs a whole forward pass
  for the images of each task and one level's Grams; the state holds all Grams
  and a merged model. FusionBench leaves what comes after the last block as it
  is in the base; here it is merged as any other level, or averaged.

  Args:
    inputs_fn: what a forward pass gives to each linear layer, such as
      `dam_jax.models.clip.dense_inputs`.
    image_shape: `(H, W, C)`.
    levels: a regular expression a level, the lowest first; a leaf is of the
      first that matches its whole path. `dam_jax.models.clip.levels` has them.
    scale: of the Grams' entries off the diagonal, in [0, 1].
    steps: batches that are read in each pass.
    preprocess_fn: from images in [0, 1] to what `inputs_fn` reads.

  Returns:
    A merger that reads one draw of images a step.

  Raises:
    ValueError: where an option is not one of those above; at init, where a
      level has no linear layer, or one that `inputs_fn` gives has no level.

  References:
    Nguyen et al., `RegMean++: Enhancing Effectiveness and Generalization of
    Regression Mean for Model Merging <https://arxiv.org/abs/2508.03121>`_, 2025
  """
  _check_steps(steps)
  _check_shape(image_shape)
  weighted.check_scale(scale)
  if not levels:
    raise ValueError('levels must name at least one level, got none')

  def pixels_fn(params, task, images):
    return inputs_fn(params, task, preprocess_fn(images))

  engine = _Levels(pixels_fn, tuple(levels), image_shape, scale, steps)
  plan = Plan(steps=steps * len(levels), phases=1)
  return Merger(engine.init, engine.step, engine.finalize, plan)


@dataclasses.dataclass(frozen=True)
class _Levels:
  """The pure functions of `regmean_plus_plus`; see there."""

  inputs_fn: InputsFn
  levels: tuple[str, ...]
  image_shape: tuple[int, int, int]
  scale: float
  steps: int

  def init(self, key: jax.Array, base: Any, experts: Any) -> LevelsState:
    """Returns the state before the first step."""
    base, experts = tree.unravel(base), tree.unravel(experts)
    mean = merge(aggregators.mean(), base, experts).params
    merged, levels = tree.flatten(jax.tree.map(jnp.copy, mean)), self._of(base)
    count = jnp.zeros([], jnp.int32)
    grams = self._grams(merged, count, levels).init(
      key, experts, _images(experts, self.image_shape)
    )
    self._check(levels, grams.total)
    return LevelsState(count, grams, merged)

  def step(self, state: LevelsState, base, experts, batch: Batch):
    """Returns the state after one step, and what it measured."""
    base, experts = tree.unravel(base), tree.unravel(experts)
    level, levels = state.count // self.steps, self._of(base)
    grams = self._grams(state.merged, level, levels).update(
      state.grams, experts, batch.images[0]
    )

    def merge_level(i, merged):
      own = [path for path, at in levels.items() if at == i]
      tx = weighted.gram_weighted(
        {path: grams.total[path] for path in own if path in grams.total},
        scale=self.scale,
      )
      flat = [tree.flatten(x) for x in (base, experts)]
      parts = [{path: leaves[path] for path in own} for leaves in flat]
      return merged | tree.flatten(merge(tx, *parts).params)

    merged = lax.cond(
      (state.count + 1) % self.steps == 0,
      lambda merged: lax.switch(level, self._each(merge_level), merged),
      lambda merged: merged,
      state.merged,
    )
    new = LevelsState(state.count + 1, grams, merged)
    return _checked('grams', state, new, _traces(grams.total))

  def finalize(self, state: LevelsState, base, experts) -> Params:
    """Returns the merged model, like the base."""
    del experts
    base = tree.unravel(base)
    leaves = [state.merged[path] for path in tree.names(base)]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)

  def _of(self, base: Params) -> dict[str, int]:
    """Returns the level of each leaf by path, -1 before all others."""
    rules = [(rule, str(i)) for i, rule in enumerate(self.levels)]
    labels = tree.flatten(tree.label_by_path(base, rules, default='-1'))
    return {path: int(label) for path, label in labels.items()}

  def _each(self, branch: Any) -> list[Any]:
    return [functools.partial(branch, i) for i in range(len(self.levels))]

  def _grams(self, merged, level, levels) -> statistics.Accumulator:
    """Adds up the Grams of one level, the merged leaves below it."""

    def mixed_fn(params, task, images):
      leaves = [
        jnp.where(levels[path] < level, merged[path], x)
        for path, x in tree.flatten(params).items()
      ]
      mixed = jax.tree.unflatten(jax.tree.structure(params), leaves)
      return self.inputs_fn(mixed, task, images)

    def grams_fn(inputs):
      def branch(i, inputs):
        grams = statistics.grams(inputs)
        return {
          path: g if levels.get(path) == i else jnp.zeros_like(g)
          for path, g in grams.items()
        }

      return lax.switch(level, self._each(branch), inputs)

    return statistics.input_grams(mixed_fn, grams_fn=grams_fn)

  def _check(self, levels: dict[str, int], grams: dict[str, Any]) -> None:
    lines = [
      f'{path}: inputs_fn gives its inputs, but no level has it'
      for path in grams
      if levels.get(path, -1) < 0
    ]
    filled = {levels.get(path) for path in grams}
    lines += [
      f'level {rule!r} has no layer that inputs_fn gives inputs of'
      for i, rule in enumerate(self.levels)
      if i not in filled
    ]
    if lines:
      raise ValueError('\n  '.join(['levels:', *lines]))
