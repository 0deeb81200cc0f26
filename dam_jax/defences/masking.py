"""Defences that learn masks on labelled images: ANP and AWM, as published.

`dam_jax.repo_awm` is another method, on unlabelled images.

  >>> import jax.numpy as jnp
  >>> # Pixel 0 says the class; pixel 1 is a backdoor's, dim in clean images.
  >>> params = {'kernel': jnp.array([[1., 0.], [0., 20.]]),
  ...           'bias': jnp.array([-0.5, -14.])}
  >>> bias = jnp.array([-2., 2.])[None, None]
  >>> def apply_fn(params, images):
  ...   hidden = images.reshape(1, -1, 2) @ params['kernel']
  ...   hidden = jax.nn.relu(hidden + params['bias'][None, None])
  ...   return hidden @ jnp.array([[-8., 8.], [9., -9.]]) - bias
  >>> images = jnp.array([[0., 0.5], [1., 0.5]]).reshape(1, 2, 1, 1, 2)
  >>> data = Labelled(images, jnp.array([[0, 1]]))
  >>> anp(steps=20, batch=8)(params, apply_fn, data)['kernel'].tolist()
  [[1.0, 0.0], [0.0, 0.0]]
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dam_jax import losses
from dam_jax import tree
from dam_jax.defences.descent import check_at_least
from dam_jax.defences.descent import descend
from dam_jax.defences.interface import Defence
from dam_jax.defences.interface import Labelled
from dam_jax.defences.pruning import biases
from dam_jax.defences.pruning import keeps_accuracy
from dam_jax.defences.pruning import matching
from dam_jax.defences.pruning import multiply
from dam_jax.transforms import check_finite
from dam_jax.transforms import check_share
from dam_jax.typing import LogitsFn

THRESHOLDS = tuple(i / 20 for i in range(19))
"""Where ANP's code prunes: 0, 0.05, ..., 0.9."""

CIFAR_SIZE = 32 * 32 * 3
"""Entries of the images that AWM's bound of 1000 is for."""


def _check_positive(**values: float) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f'{name} must be positive and finite, got {value}')


def _to_unit(masks):
  return optax.tree.clip(masks, 0.0, 1.0)


def _mean_loss(apply_fn, params, images, labels):
  """Returns the mean cross-entropy of all tasks, []."""
  return jnp.mean(losses.cross_entropy(apply_fn(params, images), labels))


def anp(
  *,
  kernels: str = r'(.*/)?kernel',
  eps: float = 0.4,
  adversary_steps: int = 1,
  alpha: float = 0.2,
  tx: optax.GradientTransformation = optax.sgd(0.2, momentum=0.9),
  steps: int = 2000,
  batch: int = 128,
  thresholds: Sequence[float] = THRESHOLDS,
  max_drop: float = 0.01,
  seed: int = 0,
) -> Defence:
  """Adversarial neuron pruning: prunes what a small change of weights wakes.

  A neuron is an output of a kernel `[..., in, out]`. `neuron_masks` learns a
  mask of each; those with a mask of at most a threshold get zero weights and
  keep their bias, as published. The threshold is the largest at which accuracy
  on the same clean images is still within `max_drop`; where there is none, the
  model is returned as it is.

  Args:
    kernels: rule for paths of kernels that have masks. The paper masks hidden
      neurons only, by their normalisation layers, which a ViT has not.
    eps: bound on the relative change of weights and biases.
    adversary_steps: of its ascent.
    alpha: weight of the loss without that change; `1 - alpha` is of that with.
    tx: of the masks.
    steps: of it.
    batch: images a task and step.
    thresholds: to choose from, in [0, 1].
    max_drop: how far accuracy, the mean over tasks, may fall; 0.1 are 10
      points.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled` images. It raises ValueError where the rule
    matches no leaf.

  Raises:
    ValueError: where a number makes no sense.

  References:
    Wu and Wang, `Adversarial Neuron Pruning Purifies Backdoored Deep Models
    <https://arxiv.org/abs/2110.14430>`_, 2021
  """
  check_finite('eps', eps)
  check_at_least(0, eps=eps)
  check_share('alpha', alpha, zero=True, one=True)
  check_share('max_drop', max_drop, zero=True, one=True)
  check_at_least(1, adversary_steps=adversary_steps, steps=steps, batch=batch)
  if not thresholds or not all(0 <= x <= 1 for x in thresholds):
    raise ValueError(f'thresholds must be in [0, 1], got {thresholds}')

  def repair(params, apply_fn, data):
    masks = neuron_masks(
      params,
      apply_fn,
      data,
      kernels=kernels,
      eps=eps,
      adversary_steps=adversary_steps,
      alpha=alpha,
      tx=tx,
      steps=steps,
      batch=batch,
      seed=seed,
    )
    good_fn = keeps_accuracy(
      params, apply_fn, data, max_drop=max_drop, batch=batch
    )
    for threshold in sorted(thresholds, reverse=True):
      kept = {path: mask > threshold for path, mask in masks.items()}
      pruned = multiply(params, kept)
      if good_fn(pruned):
        return pruned
    return params

  return Defence(Labelled, repair)


def neuron_masks(
  params: Any,
  apply_fn: LogitsFn,
  data: Labelled,
  *,
  kernels: str,
  eps: float,
  adversary_steps: int,
  alpha: float,
  tx: optax.GradientTransformation,
  steps: int,
  batch: int,
  seed: int = 0,
) -> dict[str, jax.Array]:
  """Learns ANP's masks.

  Weights `w` and the bias `b` of each neuron become `(m + delta) w` and
  `(1 + xi) b`. A step finds `delta` and `xi` in `[-eps, eps]` that raise the
  cross-entropy, by ascent along the sign of the gradient from a uniform draw,
  and lets `m` descend
  `alpha CE(m, 0, 0) + (1 - alpha) CE(m, delta, xi)`, clipped to [0, 1].

  Args:
    params: of the model.
    apply_fn: maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    data: clean images of all tasks.
    kernels: as in `anp`, like all that follow.
    eps: bound on `delta` and `xi`.
    adversary_steps: of `eps / adversary_steps` each.
    alpha: see above.
    tx: learns the masks.
    steps: of it.
    batch: images a task and step.
    seed: of the draws.

  Returns:
    Masks `[out]` by path of the kernel, float32, from an initial 1.
  """
  leaves, paths = tree.flatten(params), matching(params, kernels)
  ones = {path: jnp.ones(leaves[path].shape[-1]) for path in paths}
  bias_ones = {b: ones[k] for k, b in biases(params, paths).items()}

  @jax.jit
  def train(params, data, keys):
    def grad_fn(masks, key):
      draw_key, noise_key = jax.random.split(key)
      images, labels = data.draw(draw_key, batch)

      def loss_fn(masks, noise):
        factors = optax.tree.add({**masks, **bias_ones}, noise)
        changed = multiply(params, factors)
        return _mean_loss(apply_fn, changed, images, labels)

      draw_fn = functools.partial(jax.random.uniform, minval=-eps, maxval=eps)
      start = optax.tree.random_like(noise_key, {**masks, **bias_ones}, draw_fn)
      ascent_fn = jax.grad(lambda noise: loss_fn(masks, noise))
      noise = _ascend_signs(ascent_fn, start, eps, adversary_steps)

      def objective(masks):
        plain = loss_fn(masks, optax.tree.zeros_like(noise))
        return alpha * plain + (1 - alpha) * loss_fn(masks, noise)

      return jax.grad(objective)(masks)

    return descend(grad_fn, tx, ones, keys, project=_to_unit)[0]

  return train(params, data, jax.random.split(jax.random.key(seed), steps))


def _ascend_signs(grad_fn, noise, eps, steps):
  """Returns noise within +-eps after steps along the gradient's sign."""
  for _ in range(steps):
    moved = jax.tree.map(
      lambda x, g: x + eps / steps * jnp.sign(g), noise, grad_fn(noise)
    )
    # The authors' code does not project, and so reaches 2 eps.
    noise = optax.tree.clip(moved, -eps, eps)
  return noise


def _weigh(
  apply_fn,
  tx,
  params,
  masks,
  data,
  keys,
  *,
  alpha,
  gamma,
  batch,
  adversary_lr,
  bound,
):
  """Takes AWM's rounds from masks of ones; keys are `[rounds, 2, steps]`."""

  def objective(masks, images, labels, change):
    masked = multiply(params, masks)
    changed = jnp.clip(images + change, 0, 1)
    clean = _mean_loss(apply_fn, masked, images, labels)
    fooled = _mean_loss(apply_fn, masked, changed, labels)
    return alpha * clean + (1 - alpha) * fooled + gamma * optax.tree.sum(masks)

  def whole(carry, keys):
    masks, state = carry
    masked = multiply(params, masks)
    change = _universal(
      apply_fn, masked, data, keys[0], batch, adversary_lr, bound
    )

    def grad_fn(masks, key):
      return jax.grad(objective)(masks, *data.draw(key, batch), change)

    return descend(grad_fn, tx, masks, keys[1], state, project=_to_unit), None

  return jax.lax.scan(whole, (masks, tx.init(masks)), keys)[0][0]


def awm(
  *,
  leaves: str = '.*',
  alpha: float = 0.9,
  gamma: float = 1e-8,
  rounds: int = 20,
  epochs: int = 5,
  lr: float = 1e-2,
  decay: float = 0.9,
  adversary_lr: float = 10.0,
  l1_norm: float | None = None,
  batch: int = 128,
  seed: int = 0,
) -> Defence:
  """Adversarial weight masking: masks weights that a perturbation relies on.

  The model becomes `m * theta` with a mask in [0, 1] of each weight. A round
  first finds a universal perturbation of each task, by gradient ascent from
  zero on the cross-entropy to what the masked model predicts on clean images,
  and scales it down to an L1 norm of at most `l1_norm`. Then the masks descend
  `alpha CE(x) + (1 - alpha) CE(clip(x + perturbation, 0, 1)) + gamma |m|_1`.

  Args:
    leaves: rule for paths of leaves that have masks. The authors' code masks
      kernels of convolutions.
    alpha: weight of the loss on clean images.
    gamma: of the masks' L1 norm.
    rounds: of perturbations and masks.
    epochs: over the images in each of a round's two phases, of
      `max(1, N // batch)` steps each.
    lr: of Adam on the masks.
    decay: multiplies it after each round, as in the authors' code.
    adversary_lr: of the gradient ascent.
    l1_norm: bound on a perturbation; None is 1000 for 32 x 32 x 3 as published
      and in proportion to `H W C` for other sizes, so that the mean change of
      an entry stays 0.33.
    batch: images a task and step, drawn with replacement.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled` images. It raises ValueError where the rule
    matches no leaf.

  Raises:
    ValueError: where a number makes no sense.

  References:
    Chai and Chen, `One-shot Neural Backdoor Erasing via Adversarial Weight
    Masking <https://arxiv.org/abs/2207.04497>`_, 2022
  """
  check_share('alpha', alpha, zero=True, one=True)
  check_share('decay', decay, zero=False, one=True)
  check_finite('gamma', gamma)
  check_at_least(0, gamma=gamma)
  _check_positive(lr=lr, adversary_lr=adversary_lr)
  if l1_norm is not None:
    _check_positive(l1_norm=l1_norm)
  check_at_least(1, rounds=rounds, epochs=epochs, batch=batch)

  def repair(params, apply_fn, data):
    size, num = math.prod(data.images.shape[2:]), data.labels.shape[1]
    bound = 1000 * size / CIFAR_SIZE if l1_norm is None else l1_norm
    steps = max(1, num // batch) * epochs
    tx = optax.adam(optax.exponential_decay(lr, steps, decay, staircase=True))
    found = tree.flatten(params)
    ones = {k: jnp.ones(found[k].shape) for k in matching(params, leaves)}

    train = jax.jit(
      functools.partial(
        *(_weigh, apply_fn, tx),
        alpha=alpha,
        gamma=gamma,
        batch=batch,
        adversary_lr=adversary_lr,
        bound=bound,
      )
    )
    keys = jax.random.split(jax.random.key(seed), (rounds, 2, steps))
    return multiply(params, train(params, ones, data, keys))

  return Defence(Labelled, repair)


def _universal(apply_fn, params, data, keys, batch, lr, bound):
  """Returns a change `[T, 1, H, W, C]` of all images that changes predictions.

  It takes an ascent step of rate `lr` a key; the L1 norm of each task's is
  scaled down to `bound`.
  """

  def step(change, key):
    images, _ = data.draw(key, batch)
    labels = jnp.argmax(apply_fn(params, images), axis=-1)

    def gain_fn(change):
      logits = apply_fn(params, images + change)
      # A sum over tasks, so that each ascends as if it were alone.
      return jnp.sum(jnp.mean(losses.cross_entropy(logits, labels), axis=1))

    return change + lr * jax.grad(gain_fn)(change), None

  start = jnp.zeros_like(data.images[:, :1])
  change, _ = jax.lax.scan(step, start, keys)
  norm = jnp.sum(jnp.abs(change), axis=(1, 2, 3, 4), keepdims=True)
  return change * jnp.minimum(1.0, bound / jnp.maximum(norm, 1e-12))
