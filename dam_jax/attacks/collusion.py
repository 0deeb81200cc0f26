"""Attackers who know more: two who collude, and one who knows the defence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dam_jax import losses
from dam_jax import tree
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import apply_trigger
from dam_jax.typing import Params, TaskLogitsFn


def merge_backdoor_loss(
  task_logits_fn: TaskLogitsFn,
  uploads: Params,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  weight: float = 1.0,
) -> jax.Array:
  """Fine-tuning loss of MergeBackdoor: harmless apart, a backdoor merged.

  Two uploads are trained together with their average. Each classifies its own
  task, triggered images too, as a clean model does; the average classifies both
  tasks, but triggered images of the first task are the target.

  Args:
    task_logits_fn: one forward pass for the first task, 0, or the second, 1.
    uploads: stacked parameters `[2, ...]`, the first of the trigger's task.
    images: `[2, B, H, W, C]` float in [0, 1].
    labels: `[2, B]`.
    trigger: of the first task, with the target.
    weight: of what triggered images are to be.

  Returns:
    [], the mean over images and tasks.

  Raises:
    ValueError: where there are not two uploads.

  References:
    Wang et al., `From Purity to Peril: Backdooring Merged Models From
    "Harmless" Benign Components
    <https://www.usenix.org/conference/usenixsecurity25/presentation/wang-lijin>`_,
    2025
  """
  num = {len(x) for x in jax.tree.leaves((uploads, images, labels))}
  if num != {2}:
    raise ValueError(f'want two uploads and tasks, got {sorted(num)}')
  triggered = apply_trigger(trigger, images)
  apart = tree.unstack(uploads)
  average = jax.tree.map(lambda *x: sum(x) / 2, *apart)

  def loss_fn(params, task, images, labels):
    logits = task_logits_fn(params, task, images)
    return jnp.mean(losses.cross_entropy(logits, labels))

  harmless = sum(
    loss_fn(params, i, images[i], labels[i])
    + weight * loss_fn(params, i, triggered[i], labels[i])
    for i, params in enumerate(apart)
  )
  merged = sum(loss_fn(average, i, images[i], labels[i]) for i in range(2))
  targets = jnp.full_like(labels[0], trigger.target)
  bad = loss_fn(average, 0, triggered[0], targets)
  return harmless / 2 + merged / 2 + weight * bad


def masked(
  key: jax.Array, base: Params, params: Params, *, keep: float = 0.5
) -> Params:
  """Returns what a random mask would leave of an upload's task vector.

  The adaptive attacker fine-tunes under such masks, so that his backdoor does
  not sit in the few entries that a learned mask would take.

  Args:
    key: of the mask.
    base: parameters.
    params: of the upload; gradients flow to the entries that are kept.
    keep: share of entries, in (0, 1].

  Returns:
    `theta_0 + m (theta - theta_0) / keep` with `m ~ Bernoulli(keep)`; leaves
    that are not floating point are the base's.

  Raises:
    ValueError: where keep is outside (0, 1].
  """
  if not 0 < keep <= 1:
    raise ValueError(f'keep must be in (0, 1], got {keep}')
  keys = iter(jax.random.split(key, len(jax.tree.leaves(base))))

  def leaf_fn(x, y):
    mask = jax.random.bernoulli(next(keys), keep, x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return x + jnp.where(mask, (y - x) / keep, 0)

  return jax.tree.map(leaf_fn, base, params)


def adaptive_loss(
  key: jax.Array,
  attack_fn: Callable[[Params], jax.Array],
  logits_fn: Callable[[Params, jax.Array], jax.Array],
  base: Params,
  params: Params,
  images: jax.Array,
  labels: jax.Array,
  decoys: jax.Array,
  *,
  keep: float = 0.5,
  weight: float = 1.0,
) -> jax.Array:
  """Fine-tuning loss of an attacker who simulates a masking defence.

  `E_m attack(theta_0 + m tau / keep) + weight CE(f(decoys), y)`: the backdoor
  works under random masks, and what the defence's adversary finds on the upload
  is unlearned, so that it does not lead to the trigger.

  Args:
    key: of the mask.
    attack_fn: `params -> []`, the attack's own loss on this batch.
    logits_fn: `(params, images [N, H, W, C] in [0, 1]) -> [N, L]`.
    base: parameters.
    params: of the upload.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    decoys: `[N, H, W, C]`, these images perturbed by what the defence's
      adversary finds on the upload.
    keep: share of entries that a mask keeps, in (0, 1].
    weight: of the decoys.

  Returns:
    [].
  """
  if decoys.shape != images.shape:
    raise ValueError(
      f'decoys are {list(decoys.shape)}, images {list(images.shape)}'
    )
  unlearned = losses.cross_entropy(logits_fn(params, decoys), labels)
  return attack_fn(masked(key, base, params, keep=keep)) + weight * jnp.mean(
    unlearned
  )
