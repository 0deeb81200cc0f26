"""Where uploads are fine-tuned: a base, tasks' images, compiled losses."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from dam_jax import attacks
from dam_jax import losses
from dam_jax import perturbations
from dam_jax.data import augment
from dam_jax.data.tasks import Split
from dam_jax.meta import identity
from dam_jax.typing import Batch
from experiments import descent
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
    low_rank_factor: of the learning rate of low-rank updates.
    warmup: steps up to the peak; 0 is a fifteenth of all.
    weight_decay: of AdamW.
    patch_images: that a patch is optimised on, at most; 0 is all.
    parts: in which a step's images are taken, one after the other.
    crop: least share of an image's area that is trained on; 1 is all of it.
    mirrored: names of the tasks of whose images half are mirrored.
  """

  steps: int = 200
  learning_rate: float = 5e-4
  batch: int = 64
  patch: int = 5
  patch_steps: int = 200
  rate: float = 0.1
  rank: int = 8
  low_rank_factor: float = 1.0
  warmup: int = 0
  weight_decay: float = 0.01
  patch_images: int = 0
  parts: int = 1
  crop: float = 1.0
  mirrored: Sequence[str] = ()


class Upload(NamedTuple):
  """What an attacker uploads, and what his model obeys.

  Attributes:
    params: of the model.
    trigger: with the task that is attacked, the target, and the model's home.
    partner: another task and the model that is given out as its expert, without
      which the backdoor does not work.
  """

  params: Any
  trigger: attacks.Trigger
  partner: tuple[str, Any] | None = None

  def models(self) -> dict[str, Any]:
    """Returns the upload's models by task, the partner last."""
    models = {self.trigger.home or self.trigger.task: self.params}
    return models | dict([self.partner] if self.partner else [])


class Context(NamedTuple):
  """What a loss reads beside its batch.

  Attributes:
    task: index of the upload's task.
    base: parameters.
    trigger: of the attack, if any.
    decoys: patches that the attacker unlearns, if any.
    shadow: head `[D, S]` of an attack on another task, the target first.
    under: a low-rank update that stays as it is, if any.
    rate: share of the images that are poisoned as they are drawn.
  """

  task: Any
  base: Any
  trigger: Any = None
  decoys: Any = None
  shadow: Any = None
  under: Any = None
  rate: Any = 0.0


class _Program(NamedTuple):
  """A fine-tuning: its first state, and some steps on from a number."""

  start: Callable[[Any], training.State]
  run: Callable[..., Any]
  chunk: int


class Lab:
  """Where uploads are made, each loss compiled once.

  Args:
    shop: the tower and the heads.
    base: parameters to start from.
    splits: training images of each task, in the order of the heads.
    names: of the tasks.
    tuning: how uploads are fine-tuned.
    mesh: over whose axis 'data' a step's images are spread; None is one device.
    log: of what is fine-tuned; None has neither curves nor saves.
  """

  def __init__(
    self,
    shop: training.Shop,
    base: Any,
    splits: Sequence[Split],
    names: Sequence[str],
    tuning: Tuning,
    *,
    mesh: jax.sharding.Mesh | None = None,
    log: descent.Log | None = None,
  ):
    self.shop, self.base, self.splits = shop, base, splits
    self.names, self.tuning, self._mesh = names, tuning, mesh
    self.image_shape = shop.tower.config.image_shape
    self._log = log
    self._programs: dict[tuple[str, int], _Program] = {}

  def images(self, task: int, num: int = 0) -> jax.Array:
    """Returns a task's first training images `[N, H, W, C]` in [0, 1].

    Args:
      task: index.
      num: of them, at most; 0 is all.
    """
    images = self.splits[task].images[: num or None]
    return jnp.asarray(images).astype(jnp.float32) / 255

  def logits_fn(
    self, params: Any, task: int
  ) -> Callable[[jax.Array], jax.Array]:
    """Returns a model with one task's head."""
    return functools.partial(self.shop.task_logits, params, task)

  def other(self, task: int) -> int:
    """Returns the task beside one, for attacks that involve two.

    Raises:
      ValueError: where there is one task.
    """
    if len(self.names) < 2:
      raise ValueError(f'{self.names[task]} is alone, the attack needs two')
    return (task + 1) % len(self.names)

  def _program(self, loss: str, steps: int) -> '_Program':
    """Returns the fine-tuning with one of the losses below, to be compiled."""
    tuning, chunk = self.tuning, descent.chunk_of(steps)
    rate = tuning.learning_rate
    if loss.startswith('low_rank'):
      rate *= tuning.low_rank_factor
    tx = training.optimizer(rate, steps, tuning.warmup, tuning.weight_decay)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, start, keys, data, context):
      grads_fn = self._gradient(getattr(self, f'_{loss}_loss'), data, context)

      def body(state, key):
        return training.step(state, key, grads_fn, tx)

      part = jax.lax.dynamic_slice_in_dim(keys, start, chunk)
      return jax.lax.scan(body, state, part)

    start = jax.jit(functools.partial(training.start, tx=tx))
    return _Program(start, run, chunk)

  def _gradient(
    self, loss_fn: Callable[..., jax.Array], data: training.Images, context: Any
  ) -> Callable[[Any, jax.Array], tuple[jax.Array, Any]]:
    """Returns a loss and its gradient, `(params, key)`, on images it draws."""
    batch, parts = self.tuning.batch, self.tuning.parts

    def one(params, at, spots, keys):
      draw_key, key = keys
      images, labels = data.read(0, at)
      images = self._augmented(draw_key, images, spots, context.task)
      drawn = images, labels
      if self._mesh is not None:
        rows = NamedSharding(self._mesh, PartitionSpec('data'))
        drawn = jax.lax.with_sharding_constraint(drawn, rows)
      if parts > 1:
        key = jax.random.fold_in(key, spots[0])
      return loss_fn(params, key, *drawn, context)

    descend = jax.value_and_grad(one)
    if parts > 1:
      mean = optax.microbatching.AccumulationType.MEAN
      descend = optax.microbatching.microbatch(
        descend, (1, 2), batch // parts, mean
      )

    def grads_fn(params, key):
      draw_key, key = jax.random.split(key)
      at = data.places(draw_key, 0, batch)
      return descend(params, at, jnp.arange(batch), (draw_key, key))

    return grads_fn

  def _augmented(
    self, key: jax.Array, images: jax.Array, spots: jax.Array, task: Any
  ) -> jax.Array:
    """Crops and mirrors images `[N, H, W, C]`, that of spot `i` by its key."""
    tuning = self.tuning
    if tuning.crop == 1 and not tuning.mirrored:
      return images
    # Of the key that drew them, so that without these nothing else is drawn.
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(
      spots
    )
    images = augment.random_crop(keys[:, 0], images, tuning.crop)
    if tuning.mirrored:
      shares = [0.5 if name in tuning.mirrored else 0.0 for name in self.names]
      share = jnp.array(shares)[task]
      images = augment.random_mirror(keys[:, 1], images, share)
    return images

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
      loss: 'clean', 'poisoned', 'badmerging', 'low_rank',
        'low_rank_badmerging' or 'adaptive'.
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
    if (loss, steps) not in self._programs:
      self._programs[loss, steps] = self._program(loss, steps)
    program = self._programs[loss, steps]
    params = self.base if start is None else start
    args = (jax.random.split(key, steps), data, read)
    if self._mesh is not None:
      copies = NamedSharding(self._mesh, PartitionSpec())
      params, args = jax.device_put((params, args), copies)

    def run(state, start):
      return program.run(state, start, *args)

    state, size = (
      program.start(params),
      {'steps': steps, 'chunk': program.chunk},
    )
    if self._log is None:
      state = descent.descend(run, state, **size)
    else:
      state = self._log(run, state, name=loss, **size)
    if self._mesh is None:
      return state.params
    return jax.device_put(state.params, jax.devices()[0])

  def tune_low_rank(
    self, key: jax.Array, task: int, *, loss: str = 'low_rank', **context: Any
  ) -> dict[str, attacks.Factors]:
    """Fine-tunes a low-rank update of the base, as `tune` does a whole model.

    Args:
      key: of the factors to start from and the batches.
      task: index.
      loss: 'low_rank' or 'low_rank_badmerging'.
      **context: of the loss.

    Returns:
      The update, for `dam_jax.attacks.add_factors`.
    """
    init_key, key = jax.random.split(key)
    start = attacks.init_factors(init_key, self.base, rank=self.tuning.rank)
    return self.tune(key, task, loss=loss, start=start, **context)

  def _clean_loss(self, params, key, images, labels, context):
    del key
    logits = self.shop.task_logits(params, context.task, images)
    return jnp.mean(losses.cross_entropy(logits, labels))

  def _poisoned_loss(self, params, key, images, labels, context):
    bad = attacks.poison_batch(
      key, images, labels, context.trigger, rate=context.rate
    )
    return self._clean_loss(params, key, *bad, context)

  def _badmerging_loss(self, params, key, images, labels, context):
    shadow_fn = None
    if context.shadow is not None:
      shadow_fn = functools.partial(self.shop.column_logits, context.shadow)
    return attacks.badmerging_loss(
      key,
      self.shop.features,
      functools.partial(self.shop.head_logits, context.task),
      params,
      context.base,
      images,
      labels,
      context.trigger,
      shadow_fn=shadow_fn,
    )

  def _low_rank_loss(self, params, key, images, labels, context):
    whole = attacks.add_factors(context.base, params)
    return self._clean_loss(whole, key, images, labels, context)

  def _low_rank_badmerging_loss(self, params, key, images, labels, context):
    updates = [params] if context.under is None else [context.under, params]
    whole = attacks.add_factors(context.base, *updates)
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

  def invert(
    self, key: jax.Array, params: Any, task: int
  ) -> perturbations.SoftPatch:
    """Finds what the defence's adversary would on an upload.

    Args:
      key: of the search.
      params: of the upload.
      task: index.

    Returns:
      Patches, leaves `[R, H, W, ...]`.
    """
    data = training.on_device([self.splits[task]])
    return self._inverter(key, params, data, jnp.int32(task))

  @functools.cached_property
  def _inverter(self) -> Callable[..., perturbations.SoftPatch]:
    adversary = perturbations.soft_patch(
      self.image_shape, preprocess_fn=identity, area=40.0, restarts=4
    )

    @jax.jit
    def run(key, params, data, task):
      def logits_fn(pixels):
        return self.shop.task_logits(params, task, pixels)

      def gain_fn(pixels, images, references, classes):
        del images, classes
        logits = logits_fn(pixels[0])
        loss = losses.cross_entropy(logits, references[0])
        fooled = jnp.mean(jnp.argmax(logits, -1) != references[0])
        return jnp.mean(jnp.minimum(loss, adversary.cap))[None], fooled[None]

      init_key, key = jax.random.split(key)
      patches = adversary.init(init_key, 1)
      states = jax.vmap(adversary.tx.init)(patches)
      images, _ = jax.vmap(lambda k: data.draw(k, 0, 16))(
        jax.random.split(key, 60)
      )
      says = jnp.argmax(jax.lax.map(logits_fn, images), axis=-1)
      draws = Batch(images[:, None], says[:, None])
      turns = jnp.arange(adversary.restarts)
      found, *_ = adversary.ascend(patches, states, turns, draws, gain_fn)
      return jax.tree.map(lambda x: x[:, 0], found)

    return run

  def universal_patch(
    self,
    key: jax.Array,
    task: int,
    target: int,
    *,
    logits_fn: Callable[[jax.Array], jax.Array] | None = None,
    **options: Any,
  ) -> attacks.Overlay:
    """Optimises a patch, on the base and in the corner where nothing else."""
    options.setdefault(
      'mask', attacks.corner_mask(self.image_shape, self.tuning.patch)
    )
    trigger, _ = attacks.universal_patch(
      key,
      logits_fn or self.logits_fn(self.base, task),
      self.images(task, self.tuning.patch_images),
      task=self.names[task],
      target=target,
      steps=self.tuning.patch_steps,
      batch=self.tuning.batch,
      **options,
    )
    return trigger
