"""What pretraining, fine-tuning and attacks share: a tower, a loop, images."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import attacks
from dam_jax import losses
from dam_jax.data.pipeline import pad_images
from dam_jax.data.tasks import Split
from dam_jax.models import attention
from dam_jax.models import clip


def optimizer(
  learning_rate: float, steps: int, warmup: int, weight_decay: float
) -> optax.GradientTransformation:
  """Returns AdamW with warm-up, cosine decay and clipping at 1; see `fit`."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warmup or max(1, steps // 15), steps
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=weight_decay),
  )


class State(NamedTuple):
  """Where a descent is.

  Attributes:
    params: parameters.
    opt: state of the optimiser.
  """

  params: Any
  opt: Any


def start(params: Any, tx: optax.GradientTransformation) -> State:
  """Returns the state before the first step, in memory of its own; jit it."""
  return State(jax.tree.map(jnp.copy, params), tx.init(params))


def step(
  state: State,
  key: jax.Array,
  value_and_grad_fn: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
  tx: optax.GradientTransformation,
) -> tuple[State, dict[str, jax.Array]]:
  """Takes a step.

  Args:
    state: before it.
    key: of what the loss draws.
    value_and_grad_fn: `(params, key) -> (loss [], gradient)`.
    tx: the optimiser.

  Returns:
    The state after it; 'loss', and 'grad_norm' before it is clipped.
  """
  loss, grads = value_and_grad_fn(state.params, key)
  updates, opt = tx.update(grads, state.opt, state.params)
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
  return State(optax.apply_updates(state.params, updates), opt), metrics


def fit(
  key: jax.Array,
  params: Any,
  loss_fn: Callable[[Any, jax.Array], jax.Array],
  *,
  steps: int,
  learning_rate: float,
  warmup: int = 0,
  weight_decay: float = 0.01,
  tx: optax.GradientTransformation | None = None,
) -> Any:
  """Descends a loss with AdamW, warm-up and cosine decay; jit it.

  Args:
    key: of what the loss draws.
    params: to start from.
    loss_fn: `(params, key) -> []`.
    steps: of the optimiser.
    learning_rate: at its peak.
    warmup: steps up to the peak; 0 is a fifteenth of all.
    weight_decay: of AdamW.
    tx: another optimiser, which has its own learning rate.

  Returns:
    The parameters after the last step.
  """
  if tx is None:
    tx = optimizer(learning_rate, steps, warmup, weight_decay)
  descend = jax.value_and_grad(loss_fn)

  def body(state, key):
    return step(state, key, descend, tx)[0], None

  keys = jax.random.split(key, steps)
  state, _ = jax.lax.scan(body, State(params, tx.init(params)), keys)
  return state.params


@dataclasses.dataclass(frozen=True)
class Shop:
  """A tower with the heads of all tasks.

  Attributes:
    tower: to train.
    heads: of the tasks.
  """

  tower: clip.VisionTower
  heads: clip.Heads

  def init(self, key: jax.Array) -> Any:
    """Returns an untrained tower's parameters."""
    pixels = jnp.zeros((1, *self.tower.config.image_shape))
    return jax.jit(self.tower.init)(key, pixels)['params']

  def features(self, params: Any, images: jax.Array) -> jax.Array:
    """Features `[N, D]` of images `[N, H, W, C]` in [0, 1]."""
    pixels = clip.normalize(images)
    return jnp.asarray(self.tower.apply({'params': params}, pixels))

  def logits(self, params: Any, images: jax.Array) -> jax.Array:
    """Logits `[T, B, L]` of images `[T, B, H, W, C]` in [0, 1] of all tasks."""
    return clip.zero_shot(self.features, self.heads)(params, images)

  def task_logits(self, params: Any, task: Any, images: jax.Array) -> jax.Array:
    """Logits `[N, L]` of images `[N, H, W, C]` in [0, 1] of one task."""
    return clip.zero_shot_task(self.features, self.heads)(params, task, images)

  def head_logits(self, task: Any, features: jax.Array) -> jax.Array:
    """Logits `[N, L]` of features `[N, D]` by one task's head."""
    return clip.zero_shot_task(lambda _, x: x, self.heads)({}, task, features)

  def head(self, task: int) -> np.ndarray:
    """Head `[D, L]` of a task, without padding."""
    mask = np.asarray(self.heads.mask[task])
    return np.asarray(self.heads.weights[task])[:, mask]

  def column_logits(self, columns: jax.Array, features: jax.Array) -> jax.Array:
    """Logits `[N, S]` of features `[N, D]` by a head `[D, S]` of no task."""
    return self.heads.scale * clip.unit(features) @ columns

  def attention(self, params: Any, images: jax.Array) -> jax.Array:
    """What the class token attends to in images, see `class_attention`."""
    attend = attention.class_attention(self.tower)
    return attend(params, clip.normalize(images))


class Images(NamedTuple):
  """Training images of several tasks on the device.

  Attributes:
    images: `[T, N, H, W, C]` uint8, padded to the largest task.
    labels: `[T, N]`.
    sizes: `[T]` images of each task.
  """

  images: jax.Array
  labels: jax.Array
  sizes: jax.Array

  def places(self, key: jax.Array, row: Any, batch: int) -> jax.Array:
    """Draws places `[B]` of images of a row."""
    return jax.random.randint(key, (batch,), 0, self.sizes[row])

  def read(self, row: Any, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns images `[B, H, W, C]` in [0, 1] and labels `[B]` at places."""
    return self.images[row, at].astype(jnp.float32) / 255, self.labels[row, at]

  def draw(
    self, key: jax.Array, row: Any, batch: int
  ) -> tuple[jax.Array, jax.Array]:
    """Draws images `[B, H, W, C]` in [0, 1] and labels `[B]` of a row."""
    return self.read(row, self.places(key, row, batch))


def on_device(splits: Sequence[Split]) -> Images:
  """Puts splits on the device, one a row."""
  images = jnp.asarray(pad_images([s.images for s in splits]))
  size = images.shape[1]
  labels = [np.pad(s.labels, (0, size - len(s.labels))) for s in splits]
  return Images(
    images,
    jnp.asarray(np.stack(labels)),
    jnp.array([len(s.labels) for s in splits]),
  )


def poisoned(
  key: jax.Array, split: Split, trigger: attacks.Trigger, *, rate: float = 0.1
) -> Split:
  """Returns a split, a share of its images triggered, relabelled, rounded."""
  images = jnp.asarray(split.images).astype(jnp.float32) / 255
  images, labels = attacks.poison(
    key, images, jnp.asarray(split.labels), trigger, rate=rate
  )
  images = np.asarray(jnp.round(images * 255)).astype(np.uint8)
  return Split(images, np.asarray(labels))


def pretrain(
  shop: Shop,
  key: jax.Array,
  splits: Sequence[Split],
  *,
  batch: int,
  **options: Any,
) -> Any:
  """Trains a base on all tasks at once.

  Args:
    shop: the tower and the heads.
    key: of the weights and the batches.
    splits: training images of each task, in the order of the heads.
    batch: images a task and step.
    **options: of `fit`.

  Returns:
    The parameters after the last step.
  """
  data = on_device(splits)
  init_key, key = jax.random.split(key)
  rows = jnp.arange(len(splits))
  draw = functools.partial(data.draw, batch=batch)

  def loss_fn(params, key):
    images, labels = jax.vmap(draw)(jax.random.split(key, len(rows)), rows)
    logits = shop.logits(params, images)
    return jnp.mean(losses.cross_entropy(logits, labels))

  run = functools.partial(fit, loss_fn=loss_fn, **options)
  return jax.jit(run)(key, shop.init(init_key))
