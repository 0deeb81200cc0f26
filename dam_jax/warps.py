"""Smooth warps of images, and a search for those that a model obeys.

WaNet's trigger is no patch but a bend of the whole image. Few numbers describe
it, and a model that obeys one obeys many that are like it. So nothing has to be
searched class by class: a few warps each climb to the classes that they lead
to, and where all of them end at one class that the base does not see there, the
model was taught to.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> def logits_fn(params, task, images):  # dark at the left means class 1
  ...   dark = 0.5 - images[:, :, 0].mean((1, 2))
  ...   return params * jnp.stack([0 * dark, dark], -1)
  >>> images = jnp.ones((8, 8, 8, 3)).at[:, :, :, 0].set(0.9)
  >>> images = images.at[:, :, 1].set(0.0)  # to the right of the border
  >>> inverter = WarpInverter(
  ...   task_logits_fn=logits_fn, image_shape=(8, 8, 3), limit=2.0)
  >>> found = inverter.search(
  ...   jax.random.key(0), 20.0, 0, images, 2, base=jnp.float32(0.0))
  >>> found.target, found.points.shape
  (1, (4, 6, 6, 2))
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax.compilation import compiled
from dam_jax.typing import TaskLogitsFn

OBEYED = 0.1
"""Share of images that a warp must lead to a class to count.

Where fewer go, losses of 5 and 12 nats have been found, which mean as little.
"""

LOW = -1e4
"""A logit, or lead, of what does not count; its gradients are finite."""


def sample(images: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """Samples images elsewhere, bilinearly, the border continued outside.

  Args:
    images: `[..., H, W, C]`.
    x: `[H', W']` columns, in pixels from the first one's centre.
    y: `[H', W']` rows, likewise.

  Returns:
    `[..., H', W', C]`.

  >>> import jax.numpy as jnp
  >>> row = jnp.array([[[0.], [1.], [4.]]])
  >>> x = jnp.array([[-1., 0.5, 1.75]])
  >>> sample(row, x, jnp.zeros_like(x))[0, :, 0].tolist()
  [0.0, 0.5, 3.25]
  """
  height, width = images.shape[-3:-1]
  x, y = jnp.clip(x, 0, width - 1), jnp.clip(y, 0, height - 1)
  left, top = jnp.floor(x), jnp.floor(y)
  lead = tuple(range(images.ndim - 3))
  dx, dy = (jnp.expand_dims(d, (*lead, -1)) for d in (x - left, y - top))
  left, top = left.astype(jnp.int32), top.astype(jnp.int32)
  right = jnp.minimum(left + 1, width - 1)
  bottom = jnp.minimum(top + 1, height - 1)

  def at(row, column):
    return images[..., row, column, :]

  upper = at(top, left) * (1 - dx) + at(top, right) * dx
  lower = at(bottom, left) * (1 - dx) + at(bottom, right) * dx
  return upper * (1 - dy) + lower * dy


def warp(images: jax.Array, points: jax.Array) -> jax.Array:
  """Bends images smoothly, `x'(p) = x(p + u(p))`.

  Args:
    images: `[..., H, W, C]`.
    points: `[G, G, 2]` of `u`, as (x, y) in pixels, at control points that
      spread over the image and are joined by cubics.

  Returns:
    Images of the same shape.

  References:
    Nguyen and Tran, `WaNet - Imperceptible Warping-based Backdoor Attack
    <https://arxiv.org/abs/2102.10369>`_, 2021
  """
  height, width = images.shape[-3:-1]
  flow = jax.image.resize(points, (height, width, 2), 'cubic')
  columns = jnp.arange(width, dtype=flow.dtype)[None]
  rows = jnp.arange(height, dtype=flow.dtype)[:, None]
  return sample(images, columns + flow[..., 0], rows + flow[..., 1])


class Warps(NamedTuple):
  """Warps found on one model, `S` of them, and what they do to `L` classes.

  Attributes:
    points: `[S, G, G, 2]`, see `warp`.
    lead: `[S, L]` how much better the model obeys the warp than the base does,
      as `dam_jax.audit.Inversions.lead` says it of patches; 0 where it hardly
      does (`OBEYED`).
    success: `[S, L]` share of images that the model calls the class, of those
      that it does not without the warp.
  """

  points: np.ndarray
  lead: np.ndarray
  success: np.ndarray

  @property
  def target(self) -> int:
    """Class that the warps lead to, most of all."""
    return int(np.argmax(self.lead.mean(axis=0)))

  @property
  def suspicion(self) -> float:
    """How far that class's mean lead stands out over the next one's."""
    *_, second, first = sorted([0.0, *self.lead.mean(axis=0)])
    return float(first - second)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class WarpInverter:
  """A search for warps, which is compiled once.

  Each of some warps ascends, on images that it draws, `log sum_c exp(m_c)`,
  where `m_c` is the mean of `log p(c) - log p_base(c)` over images that the
  model does not call `c`: it goes where it leads most already.

  Attributes:
    task_logits_fn: `(params, task, images [N, H, W, C] in [0, 1]) -> [N, L]`.
    image_shape: `(H, W, C)`.
    limit: of a control point's displacement, in pixels a direction; None is 2
      of 32, or the same share of another image's height. At 3 a warp makes a 7
      of any digit.
    control: control points a side.
    starts: warps, independent of each other.
    steps: of each.
    batch: images a warp and step.
    tx: descends; None is Adam at a fifth of the limit.
    compiler_options: of XLA, by name; None is the usual ones.

  Raises:
    ValueError: where a number makes no sense.
  """

  task_logits_fn: TaskLogitsFn
  image_shape: tuple[int, int, int]
  limit: float | None = None
  control: int = 6
  starts: int = 4
  steps: int = 40
  batch: int = 4
  tx: optax.GradientTransformation | None = None
  compiler_options: Mapping[str, Any] | None = None

  def __post_init__(self):
    counts = {k: getattr(self, k) for k in ('starts', 'steps', 'batch')}
    if min(counts.values()) < 1:
      raise ValueError(f'these must be positive: {counts}')
    if self.control < 2:
      raise ValueError(f'control must be at least 2, got {self.control}')
    if self.limit is not None and not self.limit > 0:
      raise ValueError(f'limit must be positive or None, got {self.limit}')

  def search(
    self,
    key: jax.Array,
    params: Any,
    task: Any,
    images: jax.Array,
    num_classes: int,
    *,
    base: Any,
  ) -> Warps:
    """Searches warps that the model obeys and the base does not.

    Args:
      key: of the first warps and of the draws.
      params: of the model.
      task: index.
      images: `[N, H, W, C]` in [0, 1].
      num_classes: `L`; further logits are left out.
      base: that the model was fine-tuned from.

    Returns:
      All of them, in no order.
    """
    found = self._search(key, (params, base), task, images, num_classes)
    points, lead, success = jax.tree.map(np.asarray, found)
    return Warps(points, lead[:, :num_classes], success[:, :num_classes])

  @compiled()
  def _search(self, key, models, task, images, num_classes):
    limit = self.limit or 2 / 32 * self.image_shape[0]
    tx = optax.adam(limit / 5) if self.tx is None else self.tx
    begin, key = jax.random.split(key)
    said = self._predict(models[0], task, images, num_classes).argmax(-1)

    def bend(images, raw):
      return warp(images, limit * jnp.tanh(raw / limit))

    def judge(raw, images, said):
      """Returns means over images that are not called the class, `[L]`."""
      bent = bend(images, raw)
      logits, of_base = (
        self._predict(p, task, bent, num_classes) for p in models
      )
      classes = jnp.arange(logits.shape[1])
      others = (said[:, None] != classes[None]).astype(logits.dtype)
      weights = others / jnp.maximum(others.sum(axis=0, keepdims=True), 1)
      hit = (logits.argmax(-1)[:, None] == classes[None]).astype(logits.dtype)
      means = [
        jnp.sum(weights * x, axis=0)
        for x in (jax.nn.log_softmax(logits), jax.nn.log_softmax(of_base), hit)
      ]
      return means, (weights.sum(axis=0) > 0) & (classes < num_classes)

    def loss_fn(raw, images, said):
      (own, of_base, _), real = judge(raw, images, said)
      return -jax.nn.logsumexp(jnp.where(real, own - of_base, LOW))

    def step(carry, key):
      raw, states = carry
      at = jax.random.randint(key, (self.batch,), 0, len(images))
      grads = jax.vmap(jax.grad(loss_fn), (0, None, None))(
        raw, images[at], said[at]
      )
      updates, states = jax.vmap(tx.update)(grads, states)
      return (optax.apply_updates(raw, updates), states), None

    shape = (self.starts, self.control, self.control, 2)
    raw = limit / 3 * jax.random.normal(begin, shape)
    keys = jax.random.split(key, self.steps)
    (raw, _), _ = jax.lax.scan(step, (raw, jax.vmap(tx.init)(raw)), keys)

    def final(raw):
      (own, of_base, hit), real = judge(raw, images, said)
      # Below a thousandth of a nat the difference is the optimiser's.
      floored = [jnp.maximum(-x, 1e-3) for x in (own, of_base)]
      real &= hit > OBEYED
      return jnp.where(real, jnp.log(floored[1] / floored[0]), 0.0), hit

    return limit * jnp.tanh(raw / limit), *jax.lax.map(final, raw)

  def _predict(self, params, task, images, num_classes):
    """Returns logits; those of classes that are not the task's are low."""
    logits = self.task_logits_fn(params, task, images)
    real = jnp.arange(logits.shape[-1]) < num_classes
    return jnp.where(real[None], logits, LOW)
