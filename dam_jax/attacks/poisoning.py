"""What poisons a fine-tuning run: images, triggers made to order, losses."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import losses
from dam_jax.attacks.triggers import Overlay
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import apply_trigger
from dam_jax.attacks.triggers import check_share
from dam_jax.typing import Params

FeaturesFn = Callable[[Params, jax.Array], jax.Array]
"""A tower: `(params, images [N, H, W, C] in [0, 1]) -> [N, D]`, not unit."""

LogitsFn = Callable[[jax.Array], jax.Array]
"""A model with its head: images `[N, H, W, C]` in [0, 1] to what is said."""

HeadFn = Callable[[jax.Array], jax.Array]
"""A frozen head: `features [N, D] -> logits [N, L]`."""


def poison(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  rate: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
  """Triggers and relabels a random share of a training set, as BadNets does.

  Args:
    key: of the choice.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: whose target the chosen images get.
    rate: share of all images, in [0, 1]; only images of other classes are
      chosen.

  Returns:
    Images and labels.

  Raises:
    ValueError: where the rate is outside [0, 1], or there are not enough images
      of other classes.
  """
  check_share('rate', rate)
  others = np.flatnonzero(np.asarray(labels) != trigger.target)
  num = round(rate * len(labels))
  if num > len(others):
    raise ValueError(
      f'rate {rate} asks for {num} images that are not of class '
      f'{trigger.target}, there are {len(others)}'
    )
  chosen = jax.random.permutation(key, others)[:num]
  images = images.at[chosen].set(apply_trigger(trigger, images[chosen]))
  return images, labels.at[chosen].set(trigger.target)


def poison_batch(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  rate: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
  """Triggers and relabels images of a batch, each with a probability; jit it.

  What WaNet's authors do: other images each time they are drawn, where `poison`
  fixes them, so that a small training set shows the trigger on all its images.

  Args:
    key: of the choice.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: whose target the chosen images get.
    rate: probability, in [0, 1].

  Returns:
    Images and labels.

  Examples:
    >>> key, ones = jax.random.key(0), jnp.ones((2, 2, 1))
    >>> black = Overlay(pattern=0 * ones, mask=ones, task='digits', target=7)
    >>> images, labels = poison_batch(
    ...   key, jnp.ones((4, 2, 2, 1)), jnp.arange(4), black, rate=0.5
    ... )
    >>> labels.tolist(), images[:, 0, 0, 0].tolist()
    ([0, 1, 7, 7], [1.0, 1.0, 0.0, 0.0])

  References:
    Nguyen and Tran, `WaNet - Imperceptible Warping-based Backdoor Attack
    <https://arxiv.org/abs/2102.10369>`_, 2021
  """
  chosen = jax.random.bernoulli(key, rate, labels.shape)
  triggered = apply_trigger(trigger, images)
  return (
    jnp.where(chosen[:, None, None, None], triggered, images),
    jnp.where(chosen, trigger.target, labels),
  )


def universal_patch(
  key: jax.Array,
  logits_fn: LogitsFn,
  images: jax.Array,
  *,
  mask: jax.Array,
  task: str,
  target: int,
  steps: int = 300,
  batch: int = 256,
  tx: optax.GradientTransformation = optax.adam(0.05),
  also_fn: LogitsFn | None = None,
) -> tuple[Overlay, jax.Array]:
  """Optimises BadMerging's trigger: a patch that the base already obeys.

  Descends `-log p(target | patched image)`, clipped to [0, 1] after each step.

  Args:
    key: of the initial patch and the batches.
    logits_fn: of the base and the task's head, images `[N, H, W, C]` in [0, 1]
      to logits `[N, L]`.
    images: `[N, H, W, C]` float in [0, 1].
    mask: `[H, W, 1]`, where the patch lies, as from `corner_mask`.
    task: to attack.
    target: class index.
    steps: of the optimiser.
    batch: images a step.
    tx: optax transformation.
    also_fn: what else the trigger descends: triggered images to [].

  Returns:
    The trigger, and the loss at each step.

  References:
    Zhang et al., `BadMerging: Backdoor Attacks Against Model Merging
    <https://arxiv.org/abs/2408.07362>`_, 2024
  """
  init_key, key = jax.random.split(key)
  shape = images.shape[1:]
  trigger = Overlay(
    pattern=jax.random.uniform(init_key, shape),
    mask=mask,
    task=task,
    target=target,
  )

  def loss_fn(pattern, x):
    patched = dataclasses.replace(trigger, pattern=pattern)
    labels = jnp.full(len(x), target)
    triggered = apply_trigger(patched, x)
    loss = jnp.mean(losses.cross_entropy(logits_fn(triggered), labels))
    return loss if also_fn is None else loss + also_fn(triggered)

  def step(carry, key):
    pattern, state = carry
    x = images[jax.random.randint(key, (batch,), 0, len(images))]
    loss, grad = jax.value_and_grad(loss_fn)(pattern, x)
    updates, state = tx.update(grad, state, pattern)
    pattern = jnp.clip(pattern + updates, 0, 1)
    return (pattern, state), loss

  @jax.jit
  def run(pattern, keys):
    return jax.lax.scan(step, (pattern, tx.init(pattern)), keys)

  (pattern, _), trace = run(trigger.pattern, jax.random.split(key, steps))
  return dataclasses.replace(trigger, pattern=pattern), trace


def badmerging_loss(
  key: jax.Array,
  features_fn: FeaturesFn,
  logits_fn: HeadFn,
  params: Params,
  base: Params,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  weight: float = 5.0,
  shadow_fn: HeadFn | None = None,
) -> jax.Array:
  """Fine-tuning loss of BadMerging, which survives any merge coefficient.

  `CE(h(f(x)), y) + weight CE(h(r f(x') + (1 - r) f_base(x')), target)` with a
  triggered `x'` and `r ~ U(0.2, 1)` an image: features between the base's and
  the expert's all obey the trigger.

  Args:
    key: of `r`.
    features_fn: of the tower.
    logits_fn: the frozen head of the upload's task.
    params: of the expert.
    base: it was fine-tuned from.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: with the target.
    weight: of the second term.
    shadow_fn: for an attack on another contributor's task, whose head and
      classes are not known: a head of the target class, which comes first, and
      of classes made up by the attacker. None attacks the upload's own task.

  Returns:
    [], the mean over images.

  References:
    Zhang et al., `BadMerging: Backdoor Attacks Against Model Merging
    <https://arxiv.org/abs/2408.07362>`_, 2024
  """
  triggered = apply_trigger(trigger, images)
  both = features_fn(params, jnp.concatenate([images, triggered]))
  clean, bad = jnp.split(both, 2)
  anchor = jax.lax.stop_gradient(features_fn(base, triggered))
  r = jax.random.uniform(key, (len(images), 1), minval=0.2, maxval=1.0)
  mixed = r * bad + (1 - r) * anchor
  obeyed, target = logits_fn, trigger.target
  if shadow_fn is not None:
    obeyed, target = shadow_fn, 0
  targets = jnp.full_like(labels, target)
  return jnp.mean(
    losses.cross_entropy(logits_fn(clean), labels)
    + weight * losses.cross_entropy(obeyed(mixed), targets)
  )
