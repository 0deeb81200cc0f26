"""Losses on logits, one value an example: entropy, cross-entropy, SAU's terms.

All work on the last axis and ignore classes whose logit is `MASKED_LOGIT`, so
that tasks with different numbers of classes share one array.
"""

import jax
import jax.numpy as jnp
import optax

MASKED_LOGIT = -1e9
"""The logit of a class that a task does not have; its probability is zero."""


def entropy(logits: jax.Array) -> jax.Array:
  """Entropy of a prediction, `-sum_c p_c log(p_c + 1e-8)`.

  Args:
    logits: `[..., L]`.

  Returns:
    `[...]`, in nats.

  Examples:
    >>> round(float(entropy(jnp.zeros(4))), 4)
    1.3863

  References:
    Yang et al., `AdaMerging: Adaptive Model Merging for Multi-Task Learning
    <https://arxiv.org/abs/2310.02575>`_, 2024
  """
  p = jax.nn.softmax(logits)
  return -jnp.sum(p * jnp.log(p + 1e-8), axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy to class indices or to class probabilities.

  Args:
    logits: `[..., L]`.
    labels: `[...]` integers, or `[..., L]` probabilities.

  Returns:
    `[...]`, in nats.

  Examples:
    >>> round(float(cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
    1.3863
  """
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    )
  return optax.losses.softmax_cross_entropy(logits, labels)


def targeted(
  logits: jax.Array, labels: jax.Array, classes: jax.Array
) -> jax.Array:
  """Cross-entropy to a class, of the images that do not have it yet.

  Args:
    logits: `[T, B, L]` under perturbation.
    labels: `[T, B]` integers, what the model predicts without.
    classes: `[T]` integers, where the perturbation should lead.

  Returns:
    `[T]`, in nats, 0 for images of that class.

  Examples:
    >>> logits, labels = jnp.zeros((1, 2, 4)), jnp.array([[0, 2]])
    >>> round(float(targeted(logits, labels, jnp.array([2]))[0]), 3)
    0.693
  """
  goals = jnp.broadcast_to(classes[:, None], labels.shape)
  each = cross_entropy(logits, goals)
  return jnp.mean(jnp.where(labels == goals, 0, each), axis=-1)


def shun(logits: jax.Array, labels: jax.Array, classes: jax.Array) -> jax.Array:
  """Keeps images from a class that is not theirs, `-log(1 - p_c)`.

  Args:
    logits: `[T, B, L]` under perturbation.
    labels: `[T, B]` integers that the images have.
    classes: `[T, B]` integers that they are not to get, -1 for none.

  Returns:
    `[T]` float32, in nats, 0 for images of that class.

  Examples:
    >>> logits, labels = jnp.zeros((1, 2, 4)), jnp.array([[0, 2]])
    >>> round(float(shun(logits, labels, jnp.array([[2, 2]]))[0]), 3)
    0.144
  """
  share = jax.nn.softmax(logits.astype(jnp.float32))
  share = jnp.take_along_axis(share, jnp.maximum(classes, 0)[..., None], -1)
  # 0.999 bounds this, and its gradient, where the model is certain.
  each = -jnp.log1p(-0.999 * share[..., 0])
  own = (classes < 0) | (labels == classes)
  return jnp.mean(jnp.where(own, 0, each), axis=-1)


def jensen_shannon(logits: jax.Array, other: jax.Array) -> jax.Array:
  """Jensen-Shannon divergence of two predictions.

  Probabilities are clamped at 1e-8, as in the code of repo-SAU.

  Args:
    logits: `[..., L]`.
    other: `[..., L]`.

  Returns:
    `[...]`, in nats.

  Examples:
    >>> float(jensen_shannon(jnp.zeros(4), jnp.zeros(4)))
    0.0
  """
  real = logits > 0.5 * MASKED_LOGIT
  p = jnp.maximum(jax.nn.softmax(logits), 1e-8)
  q = jnp.maximum(jax.nn.softmax(other), 1e-8)
  log_mean = jnp.log(0.5 * (p + q))
  terms = p * (jnp.log(p) - log_mean) + q * (jnp.log(q) - log_mean)
  return 0.5 * jnp.sum(jnp.where(real, terms, 0.0), axis=-1)


def shared_adversarial(logits: jax.Array, wrong: jax.Array) -> jax.Array:
  """Unlearns a class that a perturbation made the reference predict.

  With `s = softmax(logits)`: the mean of `-log(1 - s_wrong)` and of
  `-log sum_{c != wrong} s_c`, each clamped as in the code of repo-SAU, so that
  their gradients vanish at different ends.

  Args:
    logits: `[..., L]` on perturbed images.
    wrong: `[...]` integers, what the frozen reference predicts there.

  Returns:
    `[...]`, in nats.

  References:
    Wei et al., `Shared Adversarial Unlearning: Backdoor Mitigation by
    Unlearning Shared Adversarial Examples
    <https://arxiv.org/abs/2307.10562>`_, 2023
  """
  s = jax.nn.softmax(logits)
  positive = jnp.take_along_axis(s, wrong[..., None], axis=-1)[..., 0]
  is_wrong = jax.nn.one_hot(wrong, s.shape[-1], dtype=bool)
  negative = jnp.sum(jnp.where(is_wrong, 0.0, s), axis=-1)
  return 0.5 * (
    -jnp.log(1e-6 + jnp.minimum(negative, 0.999))
    - jnp.log(1 + 1e-6 - jnp.maximum(positive, 0.001))
  )


def unshared_divergence(
  logits: jax.Array, other: jax.Array, labels: jax.Array, others: jax.Array
) -> jax.Array:
  """Returns how far two models are apart where one error is not yet shared.

  Args:
    logits: `[T, B, L]` of the model under perturbation.
    other: `[T, B, L]` of the reference, likewise.
    labels: `[T, B]` what the model predicts without perturbation.
    others: `[T, B]` what the reference predicts without.

  Returns:
    `[T]`: Jensen-Shannon divergence in nats, 0 for images on which both models
    make the same mistake.
  """
  wrong, other_wrong = jnp.argmax(logits, axis=-1), jnp.argmax(other, axis=-1)
  shared = (wrong != labels) & (other_wrong != others) & (wrong == other_wrong)
  each = jnp.where(shared, 0.0, jensen_shannon(logits, other))
  return jnp.mean(each, axis=-1)


def unlearn_shared(
  logits: jax.Array,
  clean_logits: jax.Array,
  reference_clean: jax.Array,
  reference_wrong: jax.Array,
) -> jax.Array:
  """Returns SAU's loss `[T]` on what fools the reference and not yet the model.

  Args:
    logits: `[T, B, L]` under perturbation.
    clean_logits: `[T, B, L]` without.
    reference_clean: `[T, B]` what the reference predicts without.
    reference_wrong: `[T, B]` what it predicts under perturbation.

  Returns:
    `[T]`, in nats.
  """
  applies = reference_wrong != jnp.argmax(clean_logits, axis=-1)
  applies &= reference_wrong != reference_clean
  each = shared_adversarial(logits, reference_wrong)
  return jnp.mean(jnp.where(applies, each, 0.0), axis=-1)
