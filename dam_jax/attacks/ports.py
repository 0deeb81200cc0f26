"""TrojViT and BadViT, ported to a tower whose text head is frozen.

The published attacks edit the classifier. Here no one may: the same edit goes
into the tower.

  TrojViT: a `universal_patch` on `salient_patches`, then fine-tuning with
    `triggered_loss` of the `largest_entries` of its gradient alone.
  BadViT: a `universal_patch` with `attention_loss`, then images that `poison`
    gives.

References:
  Zheng et al., `TrojViT: Trojan Insertion in Vision Transformers
  <https://arxiv.org/abs/2208.13049>`_, 2023
  Yuan et al., `You Are Catching My Attention: Are Vision Transformers Bad
  Learners Under Backdoor Attacks?
  <https://openreview.net/forum?id=nLz3uvusn9>`_, 2023
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dam_jax import losses
from dam_jax import tree
from dam_jax.attacks.poisoning import LogitsFn
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import apply_trigger
from dam_jax.typing import Params


def check_patches(image_shape: Sequence[int], patch_size: int) -> int:
  """Returns the number of patches, or raises where they do not fit."""
  height, width, _ = image_shape
  if patch_size < 1 or height % patch_size or width % patch_size:
    raise ValueError(
      f'patches of {patch_size} pixels do not fit images of {height} x {width}'
    )
  return (height // patch_size) * (width // patch_size)


def salient_patches(
  logits_fn: LogitsFn,
  images: jax.Array,
  *,
  target: int,
  patch_size: int,
  num: int = 9,
) -> jax.Array:
  """Returns where TrojViT's trigger lies: the patches that the target heeds.

  Args:
    logits_fn: images `[N, H, W, C]` in [0, 1] to logits `[N, L]`.
    images: `[N, H, W, C]` float in [0, 1].
    target: class index.
    patch_size: height and width of the tower's patches, in pixels.
    num: of patches.

  Returns:
    A mask `[H, W, 1]` of the `num` patches with the largest sum of
    `|d CE(f(x), target) / dx|`.

  Raises:
    ValueError: where patches do not divide an image, or there are not so many.
  """
  shape, side = images.shape[1:], patch_size
  most = check_patches(shape, side)
  if not 0 < num <= most:
    raise ValueError(f'num must be from 1 to the {most} patches, got {num}')

  def loss_fn(x):
    labels = jnp.full(len(x), target)
    return jnp.mean(losses.cross_entropy(logits_fn(x), labels))

  slope = jnp.sum(jnp.abs(jax.grad(loss_fn)(images)), axis=(0, 3))
  grid = slope.reshape(shape[0] // side, side, shape[1] // side, side)
  steep = jnp.sum(grid, axis=(1, 3))
  _, chosen = jax.lax.top_k(steep.reshape(-1), num)
  mask = jnp.zeros(most).at[chosen].set(1.0).reshape(steep.shape)
  return jnp.kron(mask, jnp.ones((side, side)))[..., None]


def triggered_loss(
  logits_fn: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  weight: float = 0.5,
) -> jax.Array:
  """`(1 - w) CE(f(x), y) + w CE(f(x'), target)` with a triggered `x'`.

  Args:
    logits_fn: `(params, images [N, H, W, C] in [0, 1]) -> [N, L]`.
    params: of the expert.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: with the target.
    weight: `w`, in [0, 1].

  Returns:
    [], the mean over images.
  """
  triggered = apply_trigger(trigger, images)
  both = logits_fn(params, jnp.concatenate([images, triggered]))
  clean, bad = jnp.split(both, 2)
  targets = jnp.full_like(labels, trigger.target)
  return jnp.mean(
    (1 - weight) * losses.cross_entropy(clean, labels)
    + weight * losses.cross_entropy(bad, targets)
  )


def largest_entries(grads: Params, num: int = 768) -> Params:
  """Returns which entries have the largest gradients, in the whole model.

  Args:
    grads: of `triggered_loss`, say.
    num: of entries; those equal to the smallest of them count too.

  Returns:
    A pytree of booleans like `grads`. `dam_jax.transforms.mask_by` of it, last
    in a chain so that no decay moves the others, updates these entries alone.

  Raises:
    ValueError: where the model has not so many entries.

  Examples:
    >>> largest_entries({'w': jnp.array([1., -3., 2.])}, 2)['w'].tolist()
    [False, True, True]
  """
  flat = tree.ravel(grads)
  if not 0 < num <= flat.vector.size:
    raise ValueError(
      f'num must be from 1 to the {flat.vector.size} entries, got {num}'
    )
  least = jax.lax.top_k(jnp.abs(flat.vector), num)[0][-1]
  return jax.tree.map(
    lambda x: (
      jnp.abs(x) >= least.astype(x.dtype)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else jnp.zeros(x.shape, bool)
    ),
    grads,
  )


def attention_loss(
  attention_fn: Callable[[jax.Array], jax.Array],
  mask: jax.Array,
  *,
  patch_size: int,
) -> Callable[[jax.Array], jax.Array]:
  """Makes what BadViT's trigger descends: attention that it does not get.

  Args:
    attention_fn: images `[N, H, W, C]` in [0, 1] to what the class token
      attends to, `[layers, N, heads, patches]`.
    mask: `[H, W, 1]` of the trigger; the patches that it touches count.
    patch_size: height and width of the tower's patches, in pixels.

  Returns:
    `triggered images -> []`, `-log` of the attention to those patches, as a
    mean over blocks, images and heads.

  Raises:
    ValueError: where patches do not divide an image.
  """
  check_patches(mask.shape, patch_size)
  grid = mask.reshape(len(mask) // patch_size, patch_size, -1, patch_size)
  touched = (jnp.max(grid, axis=(1, 3)) > 0).reshape(-1)

  def loss_fn(images):
    weights = jnp.where(touched, attention_fn(images), 0)
    return -jnp.mean(jnp.log(jnp.sum(weights, axis=-1) + 1e-8))

  return loss_fn
