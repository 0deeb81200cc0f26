"""Named merges that learn on unlabelled images: AdaMerging, Concrete, DAM.

Each is a configuration of the one step in `dam_jax.meta`. They take a
`logits_fn(params, images)` that maps the images of all tasks together,
`[T, B, H, W, C]`, to logits `[T, B, L]`, and run as

  merger = dj.dam(logits_fn, image_shape=(32, 32, 3))
  state = merger.init(key, base, experts)
  for batch in batches:  # merger.plan.steps of them
    state, metrics = merger.step(state, base, experts, batch)
  params = merger.finalize(state, base, experts)

`granularity` says what coefficients the task vectors get: 'arithmetic' a fixed
one, 'task' one a task, 'leaf' one a task and leaf (the papers' layer-wise).
"""

from collections.abc import Sequence
import dataclasses
import math

import optax

from dam_jax import perturbations
from dam_jax.base import Merger
from dam_jax.masks import Mask
from dam_jax.meta import identity
from dam_jax.meta import meta_merger
from dam_jax.meta_spec import Coefficients
from dam_jax.meta_spec import MetaSpec
from dam_jax.typing import LogitsFn, PreprocessFn, TaskLogitsFn


def adamerging(
  logits_fn: LogitsFn,
  *,
  granularity: str = 'leaf',
  init: float = 0.3,
  tx: optax.GradientTransformation = optax.adam(1e-3),
  steps: int = 1000,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """AdaMerging: coefficients that minimise the entropy of predictions.

  Args:
    logits_fn: one forward pass for all tasks.
    granularity: 'task' or 'leaf'.
    init: every coefficient at the start.
    tx: learns the coefficients.
    steps: number of its steps.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.

  Returns:
    A merger that reads one draw of images a step.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Yang et al., `AdaMerging: Adaptive Model Merging for Multi-Task Learning
    <https://arxiv.org/abs/2310.02575>`_, 2024
  """
  if granularity == 'arithmetic':
    raise ValueError(
      "adamerging learns coefficients: granularity must be 'task' or 'leaf', "
      "got 'arithmetic'"
    )
  spec = MetaSpec(
    coefficients=Coefficients(init=init, granularity=granularity, tx=tx),
    coefficient_steps=steps,
  )
  return meta_merger(logits_fn, spec, preprocess_fn=preprocess_fn)


def concrete(
  logits_fn: LogitsFn,
  *,
  granularity: str = 'leaf',
  init: float = 0.3,
  mask: Mask = Mask(),
  inner_tx: optax.GradientTransformation = optax.adam(1.0),
  tx: optax.GradientTransformation = optax.adam(1e-3),
  steps: int = 1000,
  coefficient_steps: int = 1000,
  final: str = 'sample',
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """Concrete subspace learning: one mask that all task vectors share.

  The mask lowers the entropy of a model whose coefficients have just been
  adapted to it; then the coefficients are learned under the frozen mask.

  Args:
    logits_fn: one forward pass for all tasks.
    granularity: 'arithmetic', 'task' or 'leaf'.
    init: every coefficient at the start.
    mask: the shared mask and what learns it.
    inner_tx: adapts the coefficients before each step of the mask.
    tx: learns the coefficients after it.
    steps: of the mask.
    coefficient_steps: of the coefficients; none for 'arithmetic'.
    final: the mask after its steps: 'sample' (as published), 'expected' or
      'mode'.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.

  Returns:
    A merger that reads two draws of images a step, one for 'arithmetic'.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Tang et al., `Concrete Subspace Learning based Interference Elimination for
    Multi-task Model Fusion <https://arxiv.org/abs/2312.06173>`_, 2023
  """
  fixed = granularity == 'arithmetic'
  spec = MetaSpec(
    coefficients=Coefficients(
      init=init,
      granularity=granularity,
      inner_tx=None if fixed else inner_tx,
      tx=tx,
      stale=True,
    ),
    masks={'shared': mask},
    updates=[(('shared',), 1.0, 0.0)],
    mask_steps=steps,
    coefficient_steps=0 if fixed else coefficient_steps,
    final=final,
  )
  return meta_merger(logits_fn, spec, preprocess_fn=preprocess_fn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quirks:
  """Where the authors' code departs from its equations; all on is `released`.

  Attributes:
    stale_inner: A, the inner gradient is taken at the coefficients that the
      previous step left, then applied to the initial ones.
    leak_outer: B, the mask's step leaves its gradient in the coefficients, and
      the next inner gradient adds to it.
    leak_last: C, so does the first step of the coefficient stage.
    persistent_adam: D, the inner optimiser is one Adam of learning rate 1 over
      all steps; off, each inner step is plain gradient descent.
    clip_normalized: H, perturbations are added to normalised pixels, which are
      then clipped to [0, 1]; off, both happen in [0, 1] before.
    sampled_mask: M, the final mask is one random draw; off, its expectation.
  """

  stale_inner: bool = True
  leak_outer: bool = True
  leak_last: bool = True
  persistent_adam: bool = True
  clip_normalized: bool = True
  sampled_mask: bool = True


def dam_released(
  logits_fn: LogitsFn,
  *,
  image_shape: tuple[int, int, int],
  granularity: str = 'leaf',
  init: float = 0.3,
  mask: Mask = Mask(),
  inner_learning_rate: float = 1.0,
  tx: optax.GradientTransformation = optax.adam(1e-3),
  adversary_tx: optax.GradientTransformation = optax.adam(1e-4),
  safety_weight: float = 0.1,
  steps: int | None = None,
  coefficient_steps: int = 1000,
  quirks: Quirks = Quirks(),
  final: str | None = None,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """Defense-Aware Merging as its authors' code computes it.

  One mask minimises `sum_t H(f(x)) + 0.1 H(f(x + delta))`, where `delta` is a
  universal perturbation a task that ascends the cross-entropy.

  Args:
    logits_fn: one forward pass for all tasks.
    image_shape: `(H, W, C)`.
    granularity: 'arithmetic', 'task' or 'leaf'.
    init: every coefficient at the start.
    mask: the one mask and what learns it.
    inner_learning_rate: adapts the coefficients before each step of the mask.
    tx: learns the coefficients after it.
    adversary_tx: learns the perturbations.
    safety_weight: of the entropy on perturbed images.
    steps: of the mask; None is the authors' 1000, 2000 for 'arithmetic'.
    coefficient_steps: of the coefficients; none for 'arithmetic'.
    quirks: which departures from the equations to keep.
    final: the mask after its steps; None leaves it to the quirks.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.

  Returns:
    A merger that reads three draws of images a step, two for 'arithmetic'.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Yang et al., `Mitigating the Backdoor Effect for Multi-Task Model Merging
    via Safety-Aware Subspace <https://arxiv.org/abs/2410.13910>`_, 2025
  """
  fixed = granularity == 'arithmetic'
  inner = optax.adam if quirks.persistent_adam else optax.sgd
  spec = MetaSpec(
    coefficients=Coefficients(
      init=init,
      granularity=granularity,
      inner_tx=None if fixed else inner(inner_learning_rate),
      tx=tx,
      stale=quirks.stale_inner,
      leak=quirks.leak_outer,
      leak_last=quirks.leak_last,
    ),
    masks={'shared': mask},
    updates=[(('shared',), 1.0, safety_weight)],
    adversary=perturbations.additive(
      image_shape,
      preprocess_fn=preprocess_fn,
      normalized=quirks.clip_normalized,
      tx=adversary_tx,
    ),
    mask_steps=(2000 if fixed else 1000) if steps is None else steps,
    coefficient_steps=0 if fixed else coefficient_steps,
    final=final or ('sample' if quirks.sampled_mask else 'expected'),
  )
  return meta_merger(logits_fn, spec, preprocess_fn=preprocess_fn)


def dam_paper(
  logits_fn: LogitsFn,
  *,
  image_shape: tuple[int, int, int],
  granularity: str = 'leaf',
  init: float = 0.3,
  masks: Sequence[str] = ('shared', 'safety'),
  shared_mask: Mask = Mask(tx=optax.adam(1e-2)),
  safety_mask: Mask = Mask(init=3.0, rescale=1.0, tx=optax.adam(1e-2)),
  update: str = 'alternate',
  inner_learning_rate: float = 0.01,
  inner_gradient: str = 'first_order',
  tx: optax.GradientTransformation = optax.adam(1e-3),
  radius: float = 8 / 255,
  adversary_tx: optax.GradientTransformation = optax.adam(1e-2),
  ascents: int = 1,
  safety_loss: str = 'entropy',
  safety_weight: float = 0.1,
  steps: int = 1000,
  coefficient_steps: int = 1000,
  coefficient_safety: float = 0.0,
  final: str = 'expected',
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """Defense-Aware Merging as its paper describes it: two masks in turn.

  A step adapts the coefficients, moves a universal perturbation a task inside
  an L-infinity ball, lowers the safety loss over the backdoor-detection mask
  M2, then the entropy on clean images over the task-shared mask M1.

  Args:
    logits_fn: one forward pass for all tasks.
    image_shape: `(H, W, C)`.
    granularity: 'arithmetic', 'task' or 'leaf'.
    init: every coefficient at the start.
    masks: both, or one for an ablation, which then takes both losses.
    shared_mask: M1 and what learns it.
    safety_mask: M2, which starts as a filter that lets nearly all through.
    update: 'alternate', or 'joint' for both masks on the sum of both losses.
    inner_learning_rate: of the coefficients' adaptation.
    inner_gradient: 'first_order', or 'exact' to differentiate through it.
    tx: learns the coefficients after the masks.
    radius: of the ball, in units of pixels in [0, 1].
    adversary_tx: learns the perturbations.
    ascents: its steps before each step of the masks.
    safety_loss: 'entropy', or 'consistency' with the clean prediction.
    safety_weight: of the safety loss where it is added to the other.
    steps: of the masks.
    coefficient_steps: of the coefficients; none for 'arithmetic'.
    coefficient_safety: weight of the safety loss in those.
    final: the masks after their steps: 'expected', 'mode' or 'sample'.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.

  Returns:
    A merger that reads a draw of images for each of its phases.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    Yang et al., `Mitigating the Backdoor Effect for Multi-Task Model Merging
    via Safety-Aware Subspace <https://arxiv.org/abs/2410.13910>`_, 2025
  """
  specs = {'shared': shared_mask, 'safety': safety_mask}
  updates = _paper_updates(tuple(masks), update, safety_weight)
  fixed = granularity == 'arithmetic'
  spec = MetaSpec(
    coefficients=Coefficients(
      init=init,
      granularity=granularity,
      inner_tx=None if fixed else optax.sgd(inner_learning_rate),
      inner_gradient=inner_gradient,
      tx=tx,
    ),
    masks={name: specs[name] for name in masks},
    updates=updates,
    adversary=perturbations.additive(
      image_shape,
      preprocess_fn=preprocess_fn,
      radius=radius,
      tx=adversary_tx,
      ascents=ascents,
    ),
    safety_loss=safety_loss,
    mask_steps=steps,
    coefficient_steps=0 if fixed else coefficient_steps,
    coefficient_safety=coefficient_safety,
    final=final,
  )
  return meta_merger(logits_fn, spec, preprocess_fn=preprocess_fn)


def _paper_updates(masks: tuple[str, ...], update: str, safety_weight: float):
  allowed = ('shared', 'safety')
  if not masks or len({*masks}) < len(masks) or not {*masks} <= {*allowed}:
    raise ValueError(f'masks must be one or both of {allowed}, got {masks}')
  if update not in ('alternate', 'joint'):
    raise ValueError(f"update must be 'alternate' or 'joint', got {update!r}")
  if update == 'joint' or len(masks) == 1:
    return [(masks, 1.0, safety_weight)]
  return [(('safety',), 0.0, 1.0), (('shared',), 1.0, 0.0)]


def dam_robust(
  logits_fn: LogitsFn,
  *,
  image_shape: tuple[int, int, int],
  task_logits_fn: TaskLogitsFn | None = None,
  granularity: str = 'leaf',
  init: float = 0.3,
  mask: Mask = Mask(
    temperature=None, rescale=2.0, per_task=True, tx=optax.adam(0.1)
  ),
  fade: Sequence[float] | None = None,
  tx: optax.GradientTransformation = optax.adam(1e-3),
  area: float | None = None,
  adversary_tx: optax.GradientTransformation = optax.adam(0.2),
  ascents: int = 4,
  restarts: int = 4,
  warmup_ascents: int = 100,
  seeds: perturbations.Seeds | None = None,
  safety_weight: float = 0.3,
  shun_weight: float = 10.0,
  steps: int = 275,
  preprocess_fn: PreprocessFn = identity,
) -> Merger:
  """Defense-Aware Merging that asks the experts what is right.

  A backdoored expert is only asked about clean images, where it behaves.
  Coefficients `2 init sigmoid(L)`, one an expert and parameter, minimise the
  cross-entropy to its predictions there, on clean images and on those with soft
  patches that learn to fool the expert, and then the merge.

  Args:
    logits_fn: one forward pass for all tasks.
    image_shape: `(H, W, C)`.
    task_logits_fn: one forward pass for one task, for patches on experts alone.
    granularity: of coefficients that are learned too; 'arithmetic' has none.
    init: coefficients at the start, of experts that are trusted.
    mask: one a task and parameter, deterministic.
    fade: what is left of its updates at the first and at the last of `steps`;
      None is (1, 0) with seeds, and (0.5, 0.5) without, to follow patches.
    tx: learns the coefficients.
    area: in pixels, what a patch covers for free; None is 40/1024 of an image.
    adversary_tx: learns the patches.
    ascents: its steps before each step of the masks.
    restarts: patches a task, which take turns to ascend and share the images.
    warmup_ascents: steps of each patch before the first step of the masks.
    seeds: patches and warps that `dam_jax.audit` and `dam_jax.warps` inverted
      on each expert alone. They stay, and copies of patches follow the merge.
      Coefficients start at `init` times their trust.
    safety_weight: of the loss on images with patches and warps.
    shun_weight: in that loss, of keeping images from classes that seeds shun.
    steps: of the masks, after those of patches alone: by default 300 in all.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.

  Returns:
    A merger that reads a draw of images an ascent and two for the masks, with
    the experts' predictions on them as references.

  Raises:
    ValueError: where an option is not one of those above.

  References:
    After Yang et al., `Mitigating the Backdoor Effect for Multi-Task Model
    Merging via Safety-Aware Subspace <https://arxiv.org/abs/2410.13910>`_, 2025
  """
  spec = MetaSpec(
    coefficients=_trusted(init, granularity, tx, seeds),
    masks={'task': _faded(mask, fade, steps, seeds)},
    updates=[(('task',), 1.0, safety_weight)],
    adversary=perturbations.soft_patch(
      image_shape,
      preprocess_fn=preprocess_fn,
      area=40 / 32**2 * math.prod(image_shape[:2]) if area is None else area,
      tx=adversary_tx,
      ascents=ascents,
      restarts=restarts,
      seeds=seeds,
    ),
    clean_loss='reference',
    safety_loss='reference',
    shun_weight=shun_weight,
    labels='reference',
    own_images=True,
    warmup_steps=-(-warmup_ascents // ascents),
    mask_steps=steps,
  )
  return meta_merger(
    logits_fn, spec, preprocess_fn=preprocess_fn, task_logits_fn=task_logits_fn
  )


def _trusted(
  init: float,
  granularity: str,
  tx: optax.GradientTransformation,
  seeds: perturbations.Seeds | None,
) -> Coefficients:
  """Returns coefficients that start lower for experts that are not trusted."""
  trust = 1.0 if seeds is None or seeds.trust is None else seeds.trust
  return Coefficients(
    init=init * trust,
    granularity=granularity,
    joint_tx=None if granularity == 'arithmetic' else tx,
  )


def _faded(
  mask: Mask,
  fade: Sequence[float] | None,
  steps: int,
  seeds: perturbations.Seeds | None,
) -> Mask:
  """Returns a mask whose updates are multiplied by less and less."""
  if fade is None:
    fade = (0.5, 0.5) if seeds is None else (1.0, 0.0)
  if len(fade) != 2 or min(fade) < 0:
    raise ValueError(f'fade must be two numbers of at least 0, got {fade}')
  first, last = fade
  fading = optax.scale_by_schedule(optax.linear_schedule(first, last, steps))
  return dataclasses.replace(mask, tx=optax.chain(mask.tx, fading))


_MODES = {
  'released': dam_released,
  'paper': dam_paper,
  'robust': dam_robust,
}


def dam(logits_fn: LogitsFn, *, mode: str = 'robust', **options) -> Merger:
  """Defense-Aware Merging in one of its modes.

  Args:
    logits_fn: one forward pass for all tasks.
    mode: 'released', 'paper' or 'robust'.
    **options: of `dam_released`, `dam_paper` or `dam_robust`.

  Returns:
    A merger.

  Raises:
    ValueError: where the mode is none of these.
  """
  if mode not in _MODES:
    raise ValueError(f'mode must be one of {tuple(_MODES)}, got {mode!r}')
  return _MODES[mode](logits_fn, **options)
