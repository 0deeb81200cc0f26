"""Repairs of a merged model that search what fools it and unlearn that.

Both fine-tune all weights on few labelled clean images: SAU on examples that
fool the model and its former self alike, I-BAU on one perturbation a task, of
which it knows how the weights move it.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from dam_jax.defences.interface import Labelled
  >>> images = jax.random.uniform(jax.random.key(0), (1, 8, 2, 2, 1))
  >>> labels = (images[:, :, 0, 0, 0] > 0.5).astype(int)
  >>> def apply_fn(params, x):
  ...   return x.reshape(*x.shape[:2], -1) @ params['w']
  >>> data = Labelled(images, labels)
  >>> sau(rounds=2, batch=4)({'w': jnp.eye(4, 2)}, apply_fn, data)['w'].shape
  (4, 2)

Leaves that are not floating point are left alone; the others are trained in
float32 at least and get their dtypes back. Perturbed images are not clipped to
[0, 1], as in both authors' code.
"""

from collections.abc import Callable
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
from dam_jax.typing import LogitsFn


def sau(
  *,
  radius: float = 0.2,
  rate: float = 0.2,
  ascents: int = 5,
  untargeted: float = 0.01,
  divergence: float = 1.0,
  weight: float = 1.0,
  tx: optax.GradientTransformation = optax.adam(1e-4),
  rounds: int = 100,
  batch: int = 256,
  seed: int = 0,
) -> Defence:
  """Shared adversarial unlearning.

  A step looks for examples with `shared_perturbation`, against the model and
  the model as given, and descends `unlearning_loss` on them.

  Args:
    radius: of the L-infinity ball, in units of images in [0, 1].
    rate: of a signed step in it.
    ascents: such steps.
    untargeted: weight of the cross-entropies in the search.
    divergence: weight of the Jensen-Shannon divergence there.
    weight: of unlearning, beside the cross-entropy on clean images.
    tx: of the weights.
    rounds: passes over the images.
    batch: images a task and step, drawn with replacement.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled`.

  Raises:
    ValueError: where a size or number makes no sense.

  References:
    Wei et al., `Shared Adversarial Unlearning: Backdoor Mitigation by
    Unlearning Shared Adversarial Examples
    <https://arxiv.org/abs/2307.10562>`_, 2023
  """
  check_at_least(1, ascents=ascents, rounds=rounds, batch=batch)
  check_at_least(0, radius=radius, rate=rate, weight=weight)
  check_at_least(0, untargeted=untargeted, divergence=divergence)
  search = functools.partial(
    shared_perturbation,
    radius=radius,
    rate=rate,
    steps=ascents,
    untargeted=untargeted,
    divergence=divergence,
  )

  def repair(params: Any, apply_fn: LogitsFn, data: Labelled) -> Any:
    @jax.jit
    def run(given, data, keys):
      flat = tree.ravel(given)

      def logits_fn(params: Any, images: jax.Array) -> jax.Array:
        return apply_fn(flat.unravel(params), images)

      def loss_fn(vector, key):
        images, labels = data.draw(key, batch)
        now = jax.lax.stop_gradient(vector)
        shift = search(logits_fn, now, flat.vector, images, labels)
        both = jnp.concatenate([images, images + shift], axis=1)
        logits = logits_fn(vector, both)
        reference = logits_fn(flat.vector, both)
        return unlearning_loss(logits, reference, labels, weight=weight)

      vector, _ = descend(jax.grad(loss_fn), tx, flat.vector, keys)
      return flat.unravel(vector)

    steps = rounds * -(-data.labels.shape[1] // batch)
    return run(params, data, jax.random.split(jax.random.key(seed), steps))

  return Defence(Labelled, repair)


def shared_perturbation(
  logits_fn: LogitsFn,
  params: Any,
  reference: Any,
  images: jax.Array,
  labels: jax.Array,
  *,
  radius: float,
  rate: float,
  steps: int,
  untargeted: float,
  divergence: float,
) -> jax.Array:
  """Searches perturbations that fool two models into the same class.

  Signed descent of `divergence JS - untargeted / 2 (CE + CE_reference)`, which
  starts in the ball's largest corner, as the authors' code does. A model that
  already errs has no cross-entropy, and images on which both make the same
  mistake have no divergence.

  Args:
    logits_fn: maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    params: of the model.
    reference: of the other one.
    images: `[T, B, H, W, C]`.
    labels: `[T, B]`.
    radius: see `sau`, as for the following.
    rate: of a step.
    steps: of descent.
    untargeted: weight.
    divergence: weight.

  Returns:
    What to add to the images, `[T, B, H, W, C]` in [-radius, radius].
  """
  said = jnp.argmax(logits_fn(params, images), axis=-1)
  other_said = jnp.argmax(logits_fn(reference, images), axis=-1)

  def unfooled(logits, clean):
    each = losses.cross_entropy(logits, labels)
    same = jnp.argmax(logits, axis=-1) == clean
    return jnp.mean(jnp.where(same, each, 0.0), axis=-1)

  def objective(shift):
    logits = logits_fn(params, images + shift)
    other = logits_fn(reference, images + shift)
    apart = losses.unshared_divergence(logits, other, said, other_said)
    gain = unfooled(logits, said) + unfooled(other, other_said)
    return jnp.sum(divergence * apart - untargeted / 2 * gain)

  def step(shift, _):
    moved = shift - rate * jnp.sign(jax.grad(objective)(shift))
    return jnp.clip(moved, -radius, radius), None

  return jax.lax.scan(step, jnp.full_like(images, radius), length=steps)[0]


def unlearning_loss(
  logits: jax.Array, reference: jax.Array, labels: jax.Array, *, weight: float
) -> jax.Array:
  """Cross-entropy and `-log(1 - p)` of the class that fooled the reference.

  The latter is `losses.shared_adversarial`, on images that the reference calls
  something else when perturbed, and that something is wrong.

  Args:
    logits: `[T, 2 B, L]` of the model, on clean images and the same perturbed.
    reference: `[T, 2 B, L]` of the model as given, likewise.
    labels: `[T, B]`.
    weight: of the second term.

  Returns:
    [], the mean over images, in nats.
  """
  clean, perturbed = jnp.split(logits, 2, axis=1)
  said, wrong = jnp.split(jnp.argmax(reference, axis=-1), 2, axis=1)
  applies = (wrong != labels) & (wrong != said)
  each = losses.shared_adversarial(perturbed, wrong)
  shared = jnp.where(applies, each, 0.0)
  return jnp.mean(losses.cross_entropy(clean, labels) + weight * shared)


def i_bau(
  *,
  search_tx: optax.GradientTransformation = optax.sgd(10.0),
  norm: float = 10.0,
  price: float = 1e-3,
  portion: float = 0.01,
  fixed_points: int = 5,
  inner_rate: float = 0.1,
  tx: optax.GradientTransformation = optax.adam(1e-4),
  rounds: int = 5,
  batch: int = 100,
  seed: int = 0,
) -> Defence:
  """Adversarial unlearning by an implicit hyper-gradient.

  `min_theta max_delta CE(f_theta(x + delta), y)`, where delta is one
  perturbation a task and the gradient accounts for how the weights move it. A
  round searches delta from zero in one pass over the images, and takes as many
  steps of the weights.

  Args:
    search_tx: of the perturbations.
    norm: bound on a perturbation's L2 norm after its search; inf for none.
    price: of its squared norm, in nats.
    portion: of a batch that the weights see perturbed, in (0, 1], rounded up;
      as in the authors' code, where their equation has all of it.
    fixed_points: terms of the hyper-gradient's Neumann series.
    inner_rate: of the descent that defines this series.
    tx: of the weights.
    rounds: of search and unlearning.
    batch: images a task and step, drawn with replacement.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled`.

  Raises:
    ValueError: where a size or number makes no sense.

  References:
    Zeng et al., `Adversarial Unlearning of Backdoors via Implicit Hypergradient
    <https://arxiv.org/abs/2110.03735>`_, 2022
  """
  check_at_least(1, fixed_points=fixed_points, rounds=rounds, batch=batch)
  check_at_least(0, norm=norm, price=price, inner_rate=inner_rate)
  if not 0 < portion <= 1:
    raise ValueError(f'portion must be in (0, 1], got {portion}')
  series = {'steps': fixed_points, 'rate': inner_rate}
  project = functools.partial(optax.projections.projection_l2_ball, scale=norm)

  def repair(params: Any, apply_fn: LogitsFn, data: Labelled) -> Any:
    def errors(params, images, labels):
      return losses.cross_entropy(apply_fn(params, images), labels)

    @jax.jit
    def run(given, data, keys):
      flat, zero = tree.ravel(given), jnp.zeros_like(data.images[:, 0])

      def inner_fn(delta, vector, images, labels):
        each = errors(flat.unravel(vector), images + delta[:, None], labels)
        return price * jnp.sum(delta**2) - jnp.sum(jnp.mean(each, axis=-1))

      def outer_fn(delta, vector, images, labels):
        # A batch is drawn at random, so its first images are too.
        num = math.ceil(portion * batch)
        images = images.at[:, :num].add(delta[:, None])
        return jnp.mean(errors(flat.unravel(vector), images, labels))

      def round_fn(carry, keys):
        vector, state = carry

        def search_fn(delta, key):
          return jax.grad(inner_fn)(delta, vector, *data.draw(key, batch))

        delta, _ = descend(search_fn, search_tx, zero, keys[0])
        delta = jax.vmap(project)(delta)

        def grad_fn(vector, key):
          args = delta, vector, *data.draw(key, batch)
          return hyper_gradient(outer_fn, inner_fn, *args, **series)

        return descend(grad_fn, tx, vector, keys[1], state), None

      carry = flat.vector, tx.init(flat.vector)
      return flat.unravel(jax.lax.scan(round_fn, carry, keys)[0][0])

    shape = rounds, 2, -(-data.labels.shape[1] // batch)
    return run(params, data, jax.random.split(jax.random.key(seed), shape))

  return Defence(Labelled, repair)


def hyper_gradient(
  outer_fn: Callable[..., jax.Array],
  inner_fn: Callable[..., jax.Array],
  delta: jax.Array,
  weights: jax.Array,
  *args: Any,
  steps: int,
  rate: float,
) -> jax.Array:
  """Differentiates an objective through the minimiser of another one.

  With `phi(delta, w) = delta - rate grad_delta inner(delta, w)` and its
  Jacobians `A` in delta and `B` in `w`: `grad_w outer + B^T v` with
  `v = sum_{k < steps} (A^T)^k grad_delta outer`, which tends to the gradient of
  `outer(delta*(w), w)`.

  Args:
    outer_fn: maps `(delta, weights, *args)` to [].
    inner_fn: the same, what delta minimises.
    delta: the minimiser, an array.
    weights: an array.
    *args: of both.
    steps: terms of the series.
    rate: of the map, at most the inverse of the inner curvature.

  Returns:
    An array like the weights.

  Examples:
    >>> inner = lambda d, w: (d - w) ** 2
    >>> outer = lambda d, w: d ** 2
    >>> float(hyper_gradient(outer, inner, 3.0, 3.0, steps=1, rate=0.5))
    6.0

  References:
    Grazzi et al., `On the Iteration Complexity of Hypergradient Computation
    <https://arxiv.org/abs/2006.16218>`_, 2020
  """

  def phi(delta, weights):
    return delta - rate * jax.grad(inner_fn)(delta, weights, *args)

  both = jax.grad(outer_fn, argnums=(0, 1))
  indirect, direct = both(delta, weights, *args)
  _, pull = jax.vjp(phi, delta, weights)

  def step(v, _):
    return pull(v)[0] + indirect, None

  v, _ = jax.lax.scan(step, jnp.zeros_like(indirect), length=steps)
  return direct + pull(v)[1]
