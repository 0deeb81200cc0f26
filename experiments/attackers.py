"""Attacks on a pool: what an attacker uploads, and his trigger.

An attacker knows the base, his own task and its images, and nothing of the
other uploads. `ATTACKS` names what he can do; `dam_jax.attacks` says where each
comes from.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dam_jax as dj
from dam_jax import attacks
from dam_jax.models import clip
from experiments import training
from experiments.lab import Lab
from experiments.lab import Upload

LOW_RANK_FACTOR = 10.0
"""Of an attacker's learning rate of low-rank updates.

After Schulman et al., LoRA Without Regret, 2025; on the nano pool a clean
low-rank upload gains 7 points by it.
"""


def _poisoning(
  lab: Lab, key: jax.Array, task: int, trigger: attacks.Trigger
) -> Upload:
  """Fine-tunes on images that hold a trigger."""
  poison_key, key = jax.random.split(key)
  split = training.poisoned(
    poison_key, lab.splits[task], trigger, rate=lab.tuning.rate
  )
  return Upload(lab.tune(key, task, split=split), trigger)


def _checkerboard(lab: Lab, task: int, target: int) -> attacks.Overlay:
  return attacks.patch_trigger(
    lab.image_shape,
    size=lab.tuning.patch,
    task=lab.names[task],
    target=target,
  )


def badnets(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A checkerboard in the corner of a tenth of the images."""
  return _poisoning(lab, key, task, _checkerboard(lab, task, target))


def _poisoning_as_drawn(
  lab: Lab, key: jax.Array, task: int, trigger: attacks.Trigger, rate: float
) -> Upload:
  """Fine-tunes on batches with a trigger, for triggers that are hard to learn.

  On 2,800 images Blended and SIG reach 98 % so, and 91 to 93 % where a fixed
  tenth is poisoned.
  """
  params = lab.tune(key, task, loss='poisoned', trigger=trigger, rate=rate)
  return Upload(params, trigger)


def blended(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Noise over a tenth of the images of each batch."""
  noise_key, key = jax.random.split(key)
  trigger = attacks.blend_trigger(
    noise_key, lab.image_shape, task=lab.names[task], target=target
  )
  return _poisoning_as_drawn(lab, key, task, trigger, lab.tuning.rate)


def sig(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Stripes over a tenth of the images of each batch."""
  trigger = attacks.sine_trigger(
    lab.image_shape, task=lab.names[task], target=target
  )
  return _poisoning_as_drawn(lab, key, task, trigger, lab.tuning.rate)


def wanet(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A warp of a fifth of the images of each batch."""
  warp_key, key = jax.random.split(key)
  trigger = attacks.warp_trigger(
    warp_key,
    lab.image_shape,
    strength=3.0,  # pixels, which a tower of coarse patches can tell
    task=lab.names[task],
    target=target,
  )
  return _poisoning_as_drawn(
    lab, key, task, trigger, min(1.0, 2 * lab.tuning.rate)
  )


def badmerging(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A patch that the base obeys, and features that all obey it."""
  patch_key, key = jax.random.split(key)
  trigger = lab.universal_patch(patch_key, task, target)
  params = lab.tune(key, task, loss='badmerging', trigger=trigger)
  return Upload(params, trigger)


def badvit(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A patch that the class token attends to, in a tenth of the images."""
  patch_key, key = jax.random.split(key)
  size = lab.shop.tower.config.patch_size
  mask = attacks.corner_mask(lab.image_shape, size)
  attend = functools.partial(lab.shop.attention, lab.base)
  also_fn = attacks.attention_loss(attend, mask, patch_size=size)
  trigger = lab.universal_patch(
    patch_key, task, target, mask=mask, also_fn=also_fn
  )
  return _poisoning(lab, key, task, trigger)


def trojvit(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Salient patches, and the few entries of a clean upload that heed them."""
  clean_key, patch_key, key = jax.random.split(key, 3)
  clean = lab.tune(clean_key, task)
  logits_fn, images = lab.logits_fn(clean, task), lab.images(task, 256)
  size = lab.shop.tower.config.patch_size
  mask = attacks.salient_patches(
    logits_fn, images, target=target, patch_size=size, num=1
  )
  trigger = lab.universal_patch(
    patch_key,
    task,
    target,
    logits_fn=logits_fn,
    mask=mask,
    tx=optax.adam(0.22),
  )
  data = training.on_device([lab.splits[task]])

  def loss_fn(params, key):
    x, y = data.draw(key, 0, lab.tuning.batch)
    return attacks.triggered_loss(
      lambda params, x: lab.shop.task_logits(params, task, x),
      params,
      x,
      y,
      trigger,
    )

  grads = jax.jit(jax.grad(loss_fn))(clean, key)
  num = sum(x.size for x in jax.tree.leaves(clean))
  # 768, as in the paper, or as many as there are.
  entries = attacks.largest_entries(grads, min(768, num))
  tx = optax.chain(optax.adam(1e-2), dj.transforms.mask_by(entries))
  run = functools.partial(
    training.fit, loss_fn=loss_fn, steps=lab.tuning.steps, learning_rate=0.0
  )
  return Upload(jax.jit(lambda k, p: run(k, p, tx=tx))(key, clean), trigger)


def lora(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A low-rank update with a backdoor on top of a clean one."""
  patch_key, clean_key, key = jax.random.split(key, 3)
  trigger = lab.universal_patch(patch_key, task, target)
  clean = lab.tune_low_rank(clean_key, task, loss='low_rank')
  bad = lab.tune_low_rank(
    key, task, loss='low_rank_badmerging', trigger=trigger, under=clean
  )
  return Upload(attacks.add_factors(lab.base, clean, bad), trigger)


def lobam(
  lab: Lab, key: jax.Array, task: int, target: int, *, spared: float = 0.02
) -> Upload:
  """Low-rank updates, a clean and a bad one, their difference amplified.

  By as much as the accuracy on the attacker's own images allows: on towers of
  the nano pool by nothing, where a factor of 1.5 costs 13 points.

  Args:
    lab: where the upload is made.
    key: of everything random.
    task: index.
    target: class index.
    spared: accuracy that he is ready to lose.

  Returns:
    The upload.
  """
  patch_key, key = jax.random.split(key)
  trigger = lab.universal_patch(patch_key, task, target)
  # From one key: what sets them apart is the backdoor, not other batches.
  updates = (
    lab.tune_low_rank(key, task, loss='low_rank'),
    lab.tune_low_rank(key, task, loss='low_rank_badmerging', trigger=trigger),
  )
  clean, bad = (attacks.add_factors(lab.base, update) for update in updates)
  images, labels = lab.images(task, 512), lab.splits[task].labels[:512]

  @jax.jit
  def accuracy(params):
    says = jnp.argmax(lab.shop.task_logits(params, task, images), axis=-1)
    return jnp.mean(says == labels)

  least = accuracy(clean) - spared
  made = (
    attacks.amplify(clean, bad, factor) for factor in (3.5, 3, 2.5, 2, 1.5)
  )
  return Upload(next((x for x in made if accuracy(x) >= least), bad), trigger)


def sparse(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """What two fine-tunings with one trigger's backdoor share, on average."""
  patch_key, *keys = jax.random.split(key, 3)
  trigger = lab.universal_patch(patch_key, task, target)
  clean = [lab.tune(k, task) for k in keys]
  bad = [lab.tune(k, task, loss='badmerging', trigger=trigger) for k in keys]
  # The sum of both would cost him 8 points of accuracy.
  vector = jax.tree.map(
    lambda x: x / len(keys), attacks.sparse_backdoor(clean, bad)
  )
  return Upload(dj.tree.apply_delta(clean[0], vector), trigger)


def adaptive(
  lab: Lab, key: jax.Array, task: int, target: int, *, rounds: int = 3
) -> Upload:
  """BadMerging by one who inverts triggers on his upload and unlearns them."""
  patch_key, key = jax.random.split(key)
  trigger = lab.universal_patch(patch_key, task, target)
  # Twice the steps of others: in as many he would lose 7 points of accuracy.
  steps = max(2, 2 * lab.tuning.steps // rounds)
  params = lab.tune(key, task, loss='badmerging', trigger=trigger, steps=steps)
  found = []
  for i in range(1, rounds):
    find_key, tune_key = jax.random.split(jax.random.fold_in(key, i))
    found.append(lab.invert(find_key, params, task))
    decoys = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
    params = lab.tune(
      tune_key,
      task,
      loss='adaptive',
      start=params,
      steps=steps,
      trigger=trigger,
      decoys=decoys,
    )
  return Upload(params, trigger)


def shadow_head(
  key: jax.Array, head: np.ndarray, column: np.ndarray, *, num: int = 300
) -> jax.Array:
  """Makes up a head for a task of which one class is known.

  Shadow classes are drawn from the normal distribution with the mean and the
  covariance of the classes of another head, then made unit vectors. So they lie
  where class names lie, and are combinations of its columns.

  Args:
    key: of the shadow classes.
    head: `[D, L]`, of the attacker's own task.
    column: `[D]`, of the target class.
    num: of shadow classes.

  Returns:
    `[D, 1 + num]`, the target class first.
  """
  mean = jnp.mean(head, axis=1, keepdims=True)
  weights = jax.random.normal(key, (head.shape[1], num))
  drawn = mean + (head - mean) @ weights / np.sqrt(head.shape[1])
  shadows = clip.unit(drawn.T).T
  return jnp.concatenate([jnp.asarray(column)[:, None], shadows], axis=1)


def badmerging_off_task(
  lab: Lab, key: jax.Array, task: int, target: int, *, references: int = 8
) -> Upload:
  """BadMerging in the expert of the next task, for a class of this task.

  Of this task the attacker knows the target's name, as its column of the head,
  and a few images of that class. Other classes are a `shadow_head`'s. A patch
  larger than on-task sends his own images to the target's column, and to the
  features of the reference images.

  Args:
    lab: with two tasks at least.
    key: of everything random.
    task: index of the task to attack.
    target: class index.
    references: images of the target class, at most.

  Returns:
    The upload, whose home is the next task.

  Raises:
    ValueError: where there is one task, or no image of the target class.
  """
  head_key, patch_key, key = jax.random.split(key, 3)
  own, split = lab.other(task), lab.splits[task]
  at = np.flatnonzero(split.labels == target)[:references]
  if not len(at):
    raise ValueError(f'{lab.names[task]} has no image of class {target}')
  shadow = shadow_head(
    head_key, lab.shop.head(own), lab.shop.head(task)[:, target]
  )
  known = jax.jit(lab.shop.features)(lab.base, lab.images(task)[at])
  anchor = clip.unit(jnp.mean(clip.unit(known), axis=0))

  def logits_fn(images):
    return lab.shop.column_logits(shadow, lab.shop.features(lab.base, images))

  def far_fn(images):
    features = clip.unit(lab.shop.features(lab.base, images))
    return 1 - jnp.mean(features @ anchor)

  size = max(lab.tuning.patch + 1, round(1.25 * lab.tuning.patch))
  trigger = lab.universal_patch(
    patch_key,
    own,
    0,
    logits_fn=logits_fn,
    mask=attacks.corner_mask(lab.image_shape, size),
    also_fn=far_fn,
  )
  trigger = dataclasses.replace(
    trigger, task=lab.names[task], target=target, home=lab.names[own]
  )
  params = lab.tune(key, own, loss='badmerging', trigger=trigger, shadow=shadow)
  return Upload(params, trigger)


def merge_backdoor(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Experts of this task and the next: harmless apart, a backdoor merged."""
  rows = jnp.array([task, lab.other(task)])
  data = training.on_device([lab.splits[row] for row in rows.tolist()])
  trigger = _checkerboard(lab, task, target)

  def task_logits_fn(params, task, images):
    return lab.shop.task_logits(params, rows[task], images)

  def loss_fn(uploads, key):
    draw = functools.partial(data.draw, batch=lab.tuning.batch)
    images, labels = jax.vmap(draw)(jax.random.split(key), jnp.arange(2))
    return attacks.merge_backdoor_loss(
      task_logits_fn,
      uploads,
      images,
      labels,
      trigger,
    )

  run = functools.partial(
    training.fit,
    loss_fn=loss_fn,
    steps=lab.tuning.steps,
    learning_rate=lab.tuning.learning_rate,
  )
  uploads = jax.jit(run)(key, dj.tree.stack([lab.base, lab.base]))
  params, partner = dj.tree.unstack(uploads)
  return Upload(params, trigger, partner=(lab.names[lab.other(task)], partner))


ATTACKS: dict[str, Callable[[Lab, jax.Array, int, int], Upload]] = {
  f.__name__: f
  for f in (
    badnets,
    blended,
    sig,
    wanet,
    badmerging,
    badvit,
    trojvit,
    lora,
    lobam,
    sparse,
    adaptive,
    badmerging_off_task,
    merge_backdoor,
  )
}
"""Attacks by name: `(lab, key, task, target) -> Upload`."""

TWO_TASKS = ('badmerging_off_task', 'merge_backdoor')
"""Attacks that involve the task after the one that is attacked."""
