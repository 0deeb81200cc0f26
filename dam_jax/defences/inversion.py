"""A trigger that a model obeys, found on clean images.

A backdoored model has a class that a small patch reaches from all others.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import optax
  >>> images = jax.random.uniform(jax.random.key(0), (1, 8, 2, 2, 1)) / 2
  >>> data = Labelled(images, jnp.zeros((1, 8), int))
  >>> def apply_fn(params, x):  # A white corner is class 2.
  ...   white = 9 * x[:, :, 0, 0, 0] - 7
  ...   return jnp.stack([0 * white, -9 + 0 * white, white], axis=-1)
  >>> task, trigger = inverted_trigger(
  ...   jax.random.key(0), apply_fn, {}, data, area=0.25, tx=optax.adam(0.2),
  ...   steps=50, batch=8)
  >>> task, trigger.target
  (0, 2)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dam_jax import losses
from dam_jax import perturbations
from dam_jax.attacks.triggers import Overlay
from dam_jax.defences.descent import descend
from dam_jax.defences.interface import Labelled
from dam_jax.meta import identity
from dam_jax.typing import LogitsFn


def inverted_trigger(
  key: jax.Array,
  apply_fn: LogitsFn,
  params: Any,
  data: Labelled,
  *,
  area: float,
  tx: optax.GradientTransformation,
  steps: int,
  batch: int,
) -> tuple[int, Overlay]:
  """Searches a patch that gets one class of one task predicted.

  For each class in turn, a soft patch of each task descends the cross-entropy
  to it. The most suspicious class of all tasks is that which becomes the most
  probable on images of other classes.

  Args:
    key: of the first patch and the draws, which are the same for all classes.
    apply_fn: maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    params: of the model.
    data: clean images of all tasks.
    area: share of an image that a patch may cover for free, in (0, 1].
    tx: of the patches.
    steps: for each class.
    batch: images a task and step.

  Returns:
    The task's index, and the trigger.

  References:
    Wang et al., `Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
    Neural Networks <https://doi.org/10.1109/SP.2019.00031>`_, 2019
  """
  num_tasks, _, height, width, channels = data.images.shape
  family = perturbations.soft_patch(
    (height, width, channels),
    preprocess_fn=identity,
    area=area * height * width,
    restarts=1,
  )

  def own(patch):
    return jax.tree.map(lambda x: x[0], patch)

  @jax.jit
  def run(start, params, data, look_key, keys):
    def logits_fn(patch, images):
      return apply_fn(params, family.perturb(own(patch), images, True))

    def visit(best, target):
      def objective(patch, key):
        images, labels = data.draw(key, batch)
        wanted = jnp.full_like(labels, target)
        each = losses.cross_entropy(logits_fn(patch, images), wanted)
        return family.price(patch) + jnp.sum(jnp.mean(each, axis=-1))

      patch, _ = descend(jax.grad(objective), tx, start, keys)
      images, labels = data.draw(look_key, batch)
      said = jax.nn.softmax(logits_fn(patch, images))[..., target]
      others = (labels != target).astype(said.dtype)
      share = jnp.sum(said * others, axis=1)
      share /= jnp.maximum(1, jnp.sum(others, axis=1))
      task = jnp.argmax(share)
      its_own = jax.tree.map(lambda x: x[task], own(patch))
      found = share[task], task, target, its_own
      return jax.tree.map(
        lambda new, old: jnp.where(found[0] > best[0], new, old), found, best
      ), None

    logits = logits_fn(start, data.images[:, :1])
    nothing = jax.tree.map(lambda x: x[0], own(start))
    best = -1.0, 0, 0, nothing
    return jax.lax.scan(visit, best, jnp.arange(logits.shape[-1]))[0]

  start_key, look_key, key = jax.random.split(key, 3)
  start = family.init(start_key, num_tasks)
  keys = jax.random.split(key, steps)
  _, task, target, patch = run(start, params, data, look_key, keys)
  return int(task), Overlay(
    pattern=patch.pattern(),
    mask=patch.opacity(),
    task=str(int(task)),
    target=int(target),
  )
