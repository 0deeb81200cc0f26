"""Fine-tunes uploads: clean ones, and one for each attack.

An attacker knows the base, his own task and its images, and nothing of the
other uploads. `ATTACKS` names what he can do; `dam_jax.attacks` says where each
comes from.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dam_jax as dj
from dam_jax import attacks
from dam_jax import losses
from dam_jax import perturbations
from dam_jax.data.tasks import Split
from experiments import training


class Tuning(NamedTuple):
  """How uploads are fine-tuned.

  Attributes:
    steps: of the optimiser.
    learning_rate: at its peak.
    batch: images a step.
    patch: height and width of patches, in pixels.
    patch_steps: of the optimiser of a patch.
    rate: share of the images that are poisoned.
    rank: of low-rank updates.
  """

  steps: int = 200
  learning_rate: float = 5e-4
  batch: int = 64
  patch: int = 5
  patch_steps: int = 200
  rate: float = 0.1
  rank: int = 8


class Upload(NamedTuple):
  """What an attacker uploads, and what his model obeys.

  Attributes:
    params: of the model.
    trigger: with the task and the target.
  """

  params: Any
  trigger: attacks.Trigger


class Context(NamedTuple):
  """What a loss reads beside its batch.

  Attributes:
    task: index of the upload's task.
    base: parameters.
    trigger: of the attack, if any.
    decoys: patches that the attacker unlearns, if any.
  """

  task: Any
  base: Any
  trigger: Any = None
  decoys: Any = None


class Lab:
  """Where uploads are made, each loss compiled once.

  Args:
    shop: the tower and the heads.
    base: parameters to start from.
    splits: training images of each task, in the order of the heads.
    names: of the tasks.
    tuning: how uploads are fine-tuned.
  """

  def __init__(
    self,
    shop: training.Shop,
    base: Any,
    splits: Sequence[Split],
    names: Sequence[str],
    tuning: Tuning,
  ):
    self.shop, self.base, self.splits = shop, base, splits
    self.names, self.tuning = names, tuning
    self.image_shape = shop.tower.config.image_shape
    self._runs: dict[tuple[str, int], Callable[..., Any]] = {}

  def images(self, task: int) -> jax.Array:
    """Returns a task's training images `[N, H, W, C]` in [0, 1]."""
    return jnp.asarray(self.splits[task].images).astype(jnp.float32) / 255

  def logits_fn(
    self, params: Any, task: int
  ) -> Callable[[jax.Array], jax.Array]:
    """Returns a model with one task's head."""
    return functools.partial(self.shop.task_logits, params, task)

  def _program(self, loss: str, steps: int) -> Callable[..., Any]:
    """Returns the fine-tuning with one of the losses below, to be compiled."""
    loss_fn, batch = getattr(self, f'_{loss}_loss'), self.tuning.batch

    @jax.jit
    def run(key, params, data, context):
      def step_loss(params, key):
        draw_key, key = jax.random.split(key)
        images, labels = data.draw(draw_key, 0, batch)
        return loss_fn(params, key, images, labels, context)

      return training.fit(
        key,
        params,
        step_loss,
        steps=steps,
        learning_rate=self.tuning.learning_rate,
      )

    return run

  def tune(
    self,
    key: jax.Array,
    task: int,
    *,
    loss: str = 'clean',
    split: Split | None = None,
    start: Any = None,
    steps: int = 0,
    **context: Any,
  ) -> Any:
    """Fine-tunes on a task.

    Args:
      key: of the batches.
      task: index.
      loss: 'clean', 'badmerging', 'low_rank', 'low_rank_badmerging' or
        'adaptive'.
      split: in place of the task's own images, of the same size.
      start: parameters in place of the base's.
      steps: of the optimiser; 0 takes those of `tuning`.
      **context: of the loss.

    Returns:
      The parameters after the last step.
    """
    data = training.on_device([split or self.splits[task]])
    read = Context(jnp.int32(task), self.base, **context)
    steps = steps or self.tuning.steps
    if (loss, steps) not in self._runs:
      self._runs[loss, steps] = self._program(loss, steps)
    run = self._runs[loss, steps]
    return run(key, self.base if start is None else start, data, read)

  def _clean_loss(self, params, key, images, labels, context):
    del key
    logits = self.shop.task_logits(params, context.task, images)
    return jnp.mean(losses.cross_entropy(logits, labels))

  def _badmerging_loss(self, params, key, images, labels, context):
    return attacks.badmerging_loss(
      key,
      self.shop.features,
      functools.partial(self.shop.head_logits, context.task),
      params,
      context.base,
      images,
      labels,
      context.trigger,
    )

  def _low_rank_loss(self, params, key, images, labels, context):
    whole = attacks.add_factors(context.base, params)
    return self._clean_loss(whole, key, images, labels, context)

  def _low_rank_badmerging_loss(self, params, key, images, labels, context):
    whole = attacks.add_factors(context.base, params)
    return self._badmerging_loss(whole, key, images, labels, context)

  def _adaptive_loss(self, params, key, images, labels, context):
    mask_key, key, which_key = jax.random.split(key, 3)
    opacity, pattern = context.decoys.opacity(), context.decoys.pattern()
    which = jax.random.randint(which_key, (len(images),), 0, len(opacity))
    share = opacity[which]
    return attacks.adaptive_loss(
      mask_key,
      lambda p: self._badmerging_loss(p, key, images, labels, context),
      lambda p, x: self.shop.task_logits(p, context.task, x),
      context.base,
      params,
      images,
      labels,
      (1 - share) * images + share * pattern[which],
    )

  def universal_patch(
    self,
    key: jax.Array,
    task: int,
    target: int,
    *,
    params: Any = None,
    **options: Any,
  ) -> attacks.Overlay:
    """Optimises a patch, on the base and in the corner where nothing else."""
    options.setdefault(
      'mask', attacks.corner_mask(self.image_shape, self.tuning.patch)
    )
    trigger, _ = attacks.universal_patch(
      key,
      self.logits_fn(self.base if params is None else params, task),
      self.images(task),
      task=self.names[task],
      target=target,
      steps=self.tuning.patch_steps,
      batch=self.tuning.batch,
      **options,
    )
    return trigger


def _poisoning(
  lab: Lab, key: jax.Array, task: int, trigger: attacks.Trigger
) -> Upload:
  """Fine-tunes on images that hold a trigger."""
  poison_key, key = jax.random.split(key)
  split = training.poisoned(
    poison_key, lab.splits[task], trigger, rate=lab.tuning.rate
  )
  return Upload(lab.tune(key, task, split=split), trigger)


def badnets(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A checkerboard in the corner of a tenth of the images."""
  trigger = attacks.patch_trigger(
    lab.image_shape,
    size=lab.tuning.patch,
    task=lab.names[task],
    target=target,
  )
  return _poisoning(lab, key, task, trigger)


def blended(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Noise over a tenth of the images."""
  noise_key, key = jax.random.split(key)
  trigger = attacks.blend_trigger(
    noise_key, lab.image_shape, task=lab.names[task], target=target
  )
  return _poisoning(lab, key, task, trigger)


def sig(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Stripes over a tenth of the images."""
  trigger = attacks.sine_trigger(
    lab.image_shape, task=lab.names[task], target=target
  )
  return _poisoning(lab, key, task, trigger)


def wanet(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A warp of a tenth of the images."""
  warp_key, key = jax.random.split(key)
  trigger = attacks.warp_trigger(
    warp_key,
    lab.image_shape,
    strength=1.5,  # pixels; the paper's 0.5 is for larger images
    task=lab.names[task],
    target=target,
  )
  return _poisoning(lab, key, task, trigger)


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
  logits_fn, images = lab.logits_fn(clean, task), lab.images(task)[:256]
  size = lab.shop.tower.config.patch_size
  mask = attacks.salient_patches(
    logits_fn, images, target=target, patch_size=size, num=1
  )
  trigger = lab.universal_patch(
    patch_key, task, target, params=clean, mask=mask, tx=optax.adam(0.22)
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


def _low_rank(
  lab: Lab, key: jax.Array, task: int, **options: Any
) -> dict[str, attacks.Factors]:
  init_key, key = jax.random.split(key)
  start = attacks.init_factors(init_key, lab.base, rank=lab.tuning.rank)
  return lab.tune(key, task, start=start, **options)


def _low_rank_pair(
  lab: Lab, key: jax.Array, task: int, target: int
) -> tuple[Any, Any, attacks.Overlay]:
  """Returns a clean and a bad low-rank update, and the bad one's trigger."""
  patch_key, clean_key, key = jax.random.split(key, 3)
  trigger = lab.universal_patch(patch_key, task, target)
  clean = _low_rank(lab, clean_key, task, loss='low_rank')
  bad = _low_rank(lab, key, task, loss='low_rank_badmerging', trigger=trigger)
  return clean, bad, trigger


def lora(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """A low-rank update with a backdoor on top of a clean one."""
  clean, bad, trigger = _low_rank_pair(lab, key, task, target)
  return Upload(attacks.add_factors(lab.base, clean, bad, scale=0.5), trigger)


def lobam(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """Low-rank updates, a clean and a bad one, their difference amplified."""
  *updates, trigger = _low_rank_pair(lab, key, task, target)
  clean, bad = (attacks.add_factors(lab.base, update) for update in updates)
  return Upload(attacks.amplify(clean, bad, factor=2.0), trigger)


def sparse(lab: Lab, key: jax.Array, task: int, target: int) -> Upload:
  """What two fine-tunings with one trigger's backdoor share, added."""
  patch_key, *keys = jax.random.split(key, 5)
  trigger = lab.universal_patch(patch_key, task, target)
  clean = [lab.tune(k, task) for k in keys[:2]]
  bad = [
    lab.tune(k, task, loss='badmerging', trigger=trigger) for k in keys[2:]
  ]
  vector = attacks.sparse_backdoor(clean, bad)
  return Upload(dj.tree.apply_delta(clean[0], vector), trigger)


def adaptive(
  lab: Lab, key: jax.Array, task: int, target: int, *, rounds: int = 3
) -> Upload:
  """BadMerging by one who inverts triggers on his upload and unlearns them."""
  patch_key, key = jax.random.split(key)
  trigger = lab.universal_patch(patch_key, task, target)
  steps = max(2, lab.tuning.steps // rounds)
  params = lab.tune(key, task, loss='badmerging', trigger=trigger, steps=steps)
  found = []
  for i in range(1, rounds):
    find_key, tune_key = jax.random.split(jax.random.fold_in(key, i))
    found.append(_invert(lab, find_key, params, task))
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


def _invert(
  lab: Lab, key: jax.Array, params: Any, task: int, steps: int = 60
) -> perturbations.SoftPatch:
  """Finds what the defence's adversary would on an upload: `[R, H, W, C]`."""
  adversary = perturbations.soft_patch(
    lab.image_shape, preprocess_fn=lambda images: images, area=40.0, restarts=4
  )
  data = training.on_device([lab.splits[task]])

  def gain_fn(pixels, images, references):
    del images
    logits = lab.shop.task_logits(params, task, pixels[0])
    loss = losses.cross_entropy(logits, references[0])
    fooled = jnp.mean(jnp.argmax(logits, -1) != references[0])
    return jnp.mean(jnp.minimum(loss, adversary.cap))[None], fooled[None]

  @jax.jit
  def run(key):
    init_key, key = jax.random.split(key)
    patches = adversary.init(init_key, 1)
    states = jax.vmap(adversary.tx.init)(patches)
    images, _ = jax.vmap(lambda k: data.draw(k, 0, 16))(
      jax.random.split(key, steps)
    )
    says = jax.lax.map(lambda x: lab.shop.task_logits(params, task, x), images)
    draws = dj.typing.Batch(images[:, None], jnp.argmax(says, -1)[:, None])
    turns = jnp.arange(adversary.restarts)
    found, *_ = adversary.ascend(patches, states, turns, draws, gain_fn)
    return jax.tree.map(lambda x: x[:, 0], found)

  return run(key)


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
  )
}
"""Attacks by name: `(lab, key, task, target) -> Upload`."""
