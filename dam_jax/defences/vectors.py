"""Repairs of a merged model that add or subtract one task vector.

A backdoor is a direction in weight space: an average dilutes it (WAG), one of
the defender's own making stands for it (IBVS), fine-tuning on its trigger finds
it (TBAR), or a vector is learned against it (LFPM).

  >>> import jax.numpy as jnp
  >>> from dam_jax.defences.interface import NoData
  >>> wag()({'w': jnp.array([[0.0, 4.0], [2.0, 0.0]])}, None, NoData())
  {'w': Array([1., 2.], dtype=float32)}

Vectors are learned in float32 at least; leaves that are not floating point are
left alone, and the others get their dtypes back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import audit
from dam_jax import losses
from dam_jax import tree
from dam_jax.attacks.poisoning import poison
from dam_jax.attacks.triggers import Overlay
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import apply_trigger
from dam_jax.attacks.triggers import check_share
from dam_jax.attacks.triggers import check_trigger
from dam_jax.attacks.triggers import patch_trigger
from dam_jax.defences.descent import check_at_least
from dam_jax.defences.descent import descend
from dam_jax.defences.interface import Defence
from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.typing import LogitsFn, TaskLogitsFn


def wag() -> Defence:
  """Averages all uploads.

  Returns:
    A defence that reads `NoData` and maps uploads, leaves `[K, ...]`, to their
    mean; leaves that are not floating point are the first upload's.

  References:
    Arora et al., `Here's a Free Lunch: Sanitizing Backdoored Models with Model
    Merge <https://arxiv.org/abs/2402.19334>`_, 2024
  """

  def repair(params: Any, apply_fn: Any, data: NoData) -> Any:
    del apply_fn, data
    return jax.tree.map(
      lambda x: jnp.mean(x, axis=0) if tree.is_float(x) else x[0], params
    )

  return Defence(NoData, repair, experts=True)


def ibvs(
  *,
  task: int = 0,
  trigger: Trigger | None = None,
  target: int = 0,
  rate: float = 0.1,
  scale: float = 1.0,
  tx: optax.GradientTransformation = optax.adam(1e-5),
  steps: int = 1000,
  batch: int = 128,
  seed: int = 0,
) -> Defence:
  """Subtracts a backdoor vector of the defender's own making.

  `theta - scale (theta_backdoored - theta_clean)`, both fine-tuned from `theta`
  on the same images of one task, of which the first has some poisoned.

  Args:
    task: index of the defender's own task; no other images are used.
    trigger: to inject; None is a checkerboard in the bottom right corner, an
      eighth of an image's height. Its target replaces `target`.
    target: class of the default trigger.
    rate: share of poisoned images.
    scale: `lambda`; like `tx` and `steps` ours, for want of the paper's.
    tx: of both runs.
    steps: of each.
    batch: images a step, drawn with replacement.
    seed: of the poisoning and the draws.

  Returns:
    A defence that reads `Labelled`. It raises ValueError where there is no such
    task, the trigger does not fit the images, or there are too few to poison.

  Raises:
    ValueError: where a size or number makes no sense.

  References:
    Pawlak et al., `Backdoor Vectors: a Task Arithmetic View on Backdoor Attacks
    and Defenses <https://arxiv.org/abs/2510.08016>`_, 2025
  """
  check_at_least(0, task=task, target=target, scale=scale)
  check_at_least(1, steps=steps, batch=batch)
  check_share('rate', rate)

  def repair(params: Any, apply_fn: LogitsFn, data: Labelled) -> Any:
    shape = data.images.shape[2:]
    injected = trigger or patch_trigger(
      shape, size=max(1, shape[0] // 8), task='own', target=target
    )
    clean = _of_task(data, task, injected)
    poison_key, key = jax.random.split(jax.random.key(seed))
    bad = poison(poison_key, *clean, injected, rate=rate)
    keys = jax.random.split(key, steps)
    flat, num = tree.ravel(params), len(data.labels)
    vector_fn = fine_tuning(apply_fn, flat, num, task, tx=tx, batch=batch)
    vector = vector_fn(*bad, keys) - vector_fn(*clean, keys)
    return flat.unravel(flat.vector - scale * vector)

  return Defence(Labelled, repair)


def tbar(
  *,
  trigger: tuple[int, Trigger] | None = None,
  samples: int = 64,
  scale: float = 1.0,
  tx: optax.GradientTransformation = optax.adam(1e-5),
  steps: int = 100,
  batch: int = 32,
  area: float = 20 / 32**2,
  seed: int = 0,
) -> Defence:
  """Subtracts what fine-tuning on a trigger adds, by backdoor arithmetic.

  `theta - scale (theta_triggered - theta)`, fine-tuned from `theta` on
  images of one task with the trigger, which are labelled as its target.

  Args:
    trigger: the index of its task, and the trigger; None inverts one for each
      class of each task, and takes that whose class stands out most
      (`dam_jax.audit`).
    samples: triggered images, at most; those of the target class are left out.
    scale: `alpha`; the paper chooses it on validation data. Like the numbers
      that follow ours, for want of the paper's.
    tx: of the weights.
    steps: of it.
    batch: images a step, drawn with replacement.
    area: share of an image that an inverted trigger may cover for free.
    seed: of the draws.

  Returns:
    A defence that reads `Labelled`. It raises ValueError where there is no such
    task, no image of another class, or the trigger does not fit the images.

  Raises:
    ValueError: where a size or number makes no sense.

  References:
    Abdelraheem et al., `Backdoor Unlearning by Linear Task Decomposition
    <https://arxiv.org/abs/2510.14845>`_, 2025
  """
  check_at_least(0, task=0 if trigger is None else trigger[0], scale=scale)
  check_at_least(1, samples=samples, steps=steps, batch=batch)
  if not 0 < area <= 1:
    raise ValueError(f'area must be in (0, 1], got {area}')

  def repair(params: Any, apply_fn: LogitsFn, data: Labelled) -> Any:
    choice_key, search_key, key = jax.random.split(jax.random.key(seed), 3)
    task, known = trigger or _inverted_trigger(
      search_key, apply_fn, params, data, area
    )
    images, labels = _of_task(data, task, known)
    others = np.flatnonzero(np.asarray(labels) != known.target)
    if not len(others):
      raise ValueError(f'no image that is not of class {known.target}')
    chosen = jax.random.permutation(choice_key, others)[:samples]
    flat, num = tree.ravel(params), len(data.labels)
    vector_fn = fine_tuning(apply_fn, flat, num, task, tx=tx, batch=batch)
    vector = vector_fn(
      apply_trigger(known, images[chosen]),
      jnp.full(len(chosen), known.target),
      jax.random.split(key, steps),
    )
    return flat.unravel(flat.vector - scale * vector)

  return Defence(Labelled, repair)


def _inverted_trigger(
  key: jax.Array, apply_fn: LogitsFn, params: Any, data: Labelled, area: float
) -> tuple[int, Trigger]:
  """Returns the most suspicious trigger and the index of its task."""
  num_tasks, _, height, width, channels = data.images.shape
  inverter = audit.Inverter(
    task_logits_fn=_alone(apply_fn, num_tasks),
    image_shape=(height, width, channels),
    areas=(area * height * width,),
  )
  logits = jax.eval_shape(apply_fn, params, data.images[:, :1])
  found = [
    inverter.search(
      jax.random.fold_in(key, t), params, t, images, logits.shape[-1]
    )
    for t, images in enumerate(data.images)
  ]
  task = int(np.argmax([x.suspicion for x in found]))
  patch = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), found[task].patches)
  return task, Overlay(
    pattern=patch.pattern(),
    mask=patch.opacity(),
    task=str(task),
    target=int(found[task].classes[0]),
  )


def _alone(apply_fn: LogitsFn, num_tasks: int) -> TaskLogitsFn:
  """Returns a forward pass for one task: all read its images, one is kept."""

  def task_logits_fn(params, task, images):
    images = jnp.broadcast_to(images, (num_tasks, *images.shape))
    return apply_fn(params, images)[task]

  return task_logits_fn


def fine_tuning(
  apply_fn: LogitsFn,
  flat: tree.Raveled,
  num_tasks: int,
  task: int,
  *,
  tx: optax.GradientTransformation,
  batch: int,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Makes what fine-tunes a model on images of one task.

  Args:
    apply_fn: maps `(params, [T, B, H, W, C])` to `[T, B, L]`.
    flat: where it starts.
    num_tasks: `T`.
    task: index of the task.
    tx: optax transformation.
    batch: images a step, drawn with replacement.

  Returns:
    A compiled function of images `[N, H, W, C]`, labels `[N]` and keys
    `[steps]`, which returns what fine-tuning adds, `[P]`.
  """
  task_logits_fn = _alone(apply_fn, num_tasks)

  @jax.jit
  def run(start, data, keys):
    def loss_fn(vector, key):
      (images,), (labels,) = data.draw(key, batch)
      logits = task_logits_fn(flat.unravel(vector), task, images)
      return jnp.mean(losses.cross_entropy(logits, labels))

    return descend(jax.grad(loss_fn), tx, start, keys)[0] - start

  def vector_fn(images, labels, keys):
    return run(flat.vector, Labelled(images[None], labels[None]), keys)

  return vector_fn


def lfpm(
  *,
  weight: float = 1.0,
  radius: float = 0.2,
  rate: float = 0.1,
  ascents: int = 5,
  rho: float = 0.05,
  tx: optax.GradientTransformation = optax.adam(1e-4),
  steps: int = 500,
  batch: int = 64,
  seed: int = 0,
) -> Defence:
  """Adds an anti-backdoor vector, learned along the path to it.

  Our reading of a description of linear feature path minimisation: neither the
  paper's equations nor its authors' code could be read, and all numbers are
  ours. Returns `theta + tau` where `tau` descends, at `theta + t tau` with
  `t ~ U(0, 1)`, `CE(x) + weight CE(clip(x + prompt, 0, 1))`. The visual prompt
  is one perturbation a task, mined anew in each step by signed ascent of the
  cross-entropy, which stands for the paper's features. As in sharpness-aware
  minimisation the gradient is that at `tau + rho g / |g|`.

  Args:
    weight: of the loss on prompted images.
    radius: of the prompt's L-infinity ball.
    rate: of a signed step in it.
    ascents: such steps.
    rho: how far the gradient looks ahead, in L2 norm.
    tx: of the vector.
    steps: of it.
    batch: images a task and step, drawn with replacement.
    seed: of the draws and of `t`.

  Returns:
    A defence that reads `Labelled`.

  Raises:
    ValueError: where a size or number makes no sense.

  References:
    After Zhu et al., `From Parameters to Feature Space: Task Arithmetic for
    Backdoor Mitigation in Model Merging <https://arxiv.org/abs/2606.12498>`_,
    2026
  """
  check_at_least(0, weight=weight, radius=radius, rate=rate, rho=rho)
  check_at_least(1, ascents=ascents, steps=steps, batch=batch)

  def repair(params: Any, apply_fn: LogitsFn, data: Labelled) -> Any:
    @jax.jit
    def run(given, data, keys):
      flat, none = tree.ravel(given), jnp.zeros_like(data.images[:, 0])

      def error_fn(vector, prompt, images, labels):
        images = jnp.clip(images + prompt[:, None], 0, 1)
        logits = apply_fn(flat.unravel(vector), images)
        return jnp.mean(losses.cross_entropy(logits, labels))

      def grad_fn(tau, key):
        draw_key, path_key = jax.random.split(key)
        drawn, t = data.draw(draw_key, batch), jax.random.uniform(path_key)
        point = flat.vector + t * tau

        def ascend(prompt, _):
          grad = jax.grad(error_fn, 1)(point, prompt, *drawn)
          moved = prompt + rate * jnp.sign(grad)
          return jnp.clip(moved, -radius, radius), None

        prompt, _ = jax.lax.scan(ascend, none, length=ascents)

        def path_fn(tau):
          vector = flat.vector + t * tau
          prompted = error_fn(vector, prompt, *drawn)
          return error_fn(vector, none, *drawn) + weight * prompted

        grad = jax.grad(path_fn)(tau)
        ahead = rho * grad / jnp.maximum(optax.tree.norm(grad), 1e-12)
        return jax.grad(path_fn)(tau + ahead)

      tau, _ = descend(grad_fn, tx, jnp.zeros_like(flat.vector), keys)
      return flat.unravel(flat.vector + tau)

    return run(params, data, jax.random.split(jax.random.key(seed), steps))

  return Defence(Labelled, repair)


def _of_task(
  data: Labelled, task: int, trigger: Trigger
) -> tuple[jax.Array, jax.Array]:
  """Returns images and labels of a task that a trigger fits."""
  if task >= len(data.labels):
    raise ValueError(f'no task {task}, there are {len(data.labels)}')
  check_trigger(trigger, data.images.shape[2:])
  return jnp.asarray(data.images[task]), jnp.asarray(data.labels[task])
