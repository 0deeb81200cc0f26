"""The defence's own adversary: universal perturbations, learned by ascent.

An `Adversary` looks for one perturbation a task that changes predictions on
all images of that task, as a backdoor's trigger would. The merge then learns
masks under which it no longer works.

References:
  Moosavi-Dezfooli et al., `Universal adversarial perturbations
  <https://arxiv.org/abs/1610.08401>`_, 2017
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dam_jax.typing import Batch, PreprocessFn
from dam_jax.warps import warp


class Seeds(NamedTuple):
  """Perturbations that were found before there is a merge.

  Attributes:
    params: leaves `[S, T, ...]`.
    classes: `[S, T]` int32 that each leads to.
    points: `[W, T, G, G, 2]` of warps (`dam_jax.warps`) besides, if any.
    shunned: `[S + W, T]` int32 classes that images dealt to each, not to its
      copy, are to be kept from, -1 for none; None shuns none.
    trust: `[T]` in [0, 1], with what share of the usual coefficient each task's
      expert starts; None trusts all alike.
  """

  params: Any
  classes: jax.Array
  points: jax.Array | None = None
  shunned: jax.Array | None = None
  trust: jax.Array | None = None


class Adversary(NamedTuple):
  """A family of universal perturbations and how to search it.

  Attributes:
    init: `(key, num_tasks) -> params`, leaves `[restarts, T, ...]`.
    perturb: `(params, images, clip) -> pixels`; params of one restart, leaves
      `[T, ...]`, and images `[T, B, H, W, C]` in [0, 1] give what the model
      reads, preprocessed. `clip=False` is the ascent's own view.
    price: `params -> []`, what the perturbation's size costs.
    project: `params -> params`, back into the allowed set.
    tx: optax transformation that ascends.
    ascents: ascent steps before each step of the masks.
    cap: bound on the cross-entropy that is worth ascending, in nats.
    restarts: number of independent perturbations, to which the images of a
      step of the masks are dealt. They ascend together before the first such
      step, and take turns from then on.
    seeds: each never moves, but a copy of it takes turns with the restarts,
      and leads the merge to the seed's class as the masks learn; images are
      dealt to both, and to warps, which have no copies. None has none.
    preprocess_fn: from images in [0, 1] to what the model reads, for warps.
  """

  init: Callable[[jax.Array, int], Any]
  perturb: Callable[[Any, jax.Array, bool], jax.Array]
  price: Callable[[Any], jax.Array]
  project: Callable[[Any], Any]
  tx: optax.GradientTransformation
  ascents: int = 1
  cap: float = float('inf')
  restarts: int = 1
  seeds: Seeds | None = None
  preprocess_fn: PreprocessFn = lambda images: images

  @property
  def moving(self) -> int:
    """Number of perturbations that ascend, `M`: restarts, copies of seeds."""
    return self.restarts + (len(self.seeds.classes) if self.seeds else 0)

  def start(self, key: jax.Array, num_tasks: int) -> Any:
    """Returns all perturbations that ascend, leaves `[M, T, ...]`."""
    params = self.init(key, num_tasks)
    if self.seeds is None:
      return params
    return _joined(params, self.seeds.params)

  def turns(self, count: jax.Array, *, warm: bool) -> jax.Array:
    """Returns which perturbations ascend in a step, `[N]` of `M`.

    Args:
      count: [] number of the step.
      warm: whether it comes before the first step of the masks.
    """
    if warm:
      return jnp.arange(self.restarts)
    return (count % self.moving)[None]

  def ascend(
    self,
    params: Any,
    states: Any,
    turns: jax.Array,
    draws: Batch,
    gain_fn: Callable[..., tuple[jax.Array, jax.Array]],
    mean_fn: Callable[[Any], Any] = lambda x: x,
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Takes one step of ascent a draw of images.

    Args:
      params: of all that move, leaves `[M, T, ...]`.
      states: of their optimisers, leaves `[M, ...]`.
      turns: `[N]` which of them do.
      draws: of images, `[D, T, B, ...]`.
      gain_fn: `(pixels, images, references, classes) -> (gain, fooled)`, both
        `[T]`, where the pixels are the perturbed images, and `[T]` classes are
        those to lead to, -1 for none.
      mean_fn: averages gradients and what was measured over devices that each
        have a part of the images.

    Returns:
      Parameters and states, and of the last draw, as means over those that
      moved: 'loss' `[T]` is minus the gain, 'fooled' `[T]`, 'grad_norm' [].
    """
    classes = jnp.full((self.restarts, draws.images.shape[1]), -1, jnp.int32)
    if self.seeds is not None:
      classes = jnp.concatenate([classes, self.seeds.classes])
    classes = classes[turns]

    def step(own, classes, draw):
      params, state = own

      def objective(params):
        pixels = self.perturb(params, draw.images, False)
        gain, fooled = gain_fn(pixels, draw.images, draw.references, classes)
        loss = self.price(params).astype(gain.dtype) - jnp.sum(gain)
        return loss, {'loss': -gain, 'fooled': fooled}

      grads, found = mean_fn(jax.grad(objective, has_aux=True)(params))
      found['grad_norm'] = optax.tree.norm(grads)
      updates, state = self.tx.update(grads, state, params)
      return (self.project(optax.apply_updates(params, updates)), state), found

    before = jax.tree.map(lambda x: x[turns], (params, states))
    steps = jax.vmap(step, (0, 0, None))
    after, found = jax.lax.scan(
      lambda own, draw: steps(own, classes, draw), before, draws
    )
    params, states = jax.tree.map(
      lambda old, new: old.at[turns].set(new), (params, states), after
    )
    found = jax.tree.map(lambda x: jnp.mean(x[-1], axis=0), found)
    return params, states, found

  def deal(
    self,
    params: Any,
    images: jax.Array,
    count: jax.Array,
    axis_name: str | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Perturbs each image of a batch with one that moves, or a seed.

    Args:
      params: of all that move, leaves `[M, T, ...]`.
      images: `[T, B, H, W, C]` in [0, 1].
      count: [] number of the step, from which the dealing goes on.
      axis_name: of the devices that each have a part of the images, if any.

    Returns:
      `[T, B, H, W, C]`, what the model reads, and `[T, B]` which classes the
      images are not to get, -1 for none, if any are shunned.
    """
    points = None
    if self.seeds is not None:
      params, points = _joined(params, self.seeds.params), self.seeds.points
    num, patches = images.shape[1], len(jax.tree.leaves(params)[0])
    all_hands = patches + (0 if points is None else len(points))
    block = count
    if axis_name is not None:
      block = count * jax.lax.axis_size(axis_name) + jax.lax.axis_index(
        axis_name
      )
    hands = (block * num + jnp.arange(num, dtype=count.dtype)) % all_hands

    def perturb(hand, image):
      at = jnp.minimum(hand, patches - 1)
      own = jax.tree.map(lambda x: x[at], params)
      pixels = self.perturb(own, image[:, None], True)[:, 0]
      if points is None:
        return pixels
      bent = jax.vmap(warp)(image, points[jnp.maximum(hand - patches, 0)])
      return jnp.where(hand < patches, pixels, self.preprocess_fn(bent))

    pixels = jax.vmap(perturb, in_axes=(0, 1), out_axes=1)(hands, images)
    if self.seeds is None or self.seeds.shunned is None:
      return pixels, None
    none = jnp.full((self.moving, len(images)), -1)
    shunned = jnp.concatenate([none, self.seeds.shunned])
    return pixels, shunned[hands].T


def _joined(*params: Any) -> Any:
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *params)


def _check(ascents: int, restarts: int, image_shape: Sequence[int]) -> None:
  if ascents < 1 or restarts < 1:
    raise ValueError(
      f'ascents and restarts must be positive, got {ascents} and {restarts}'
    )
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(
      f'image_shape must be (height, width, channels), got {image_shape}'
    )


def additive(
  image_shape: tuple[int, int, int],
  *,
  preprocess_fn: PreprocessFn,
  radius: float | None = None,
  normalized: bool = False,
  tx: optax.GradientTransformation = optax.adam(1e-2),
  ascents: int = 1,
) -> Adversary:
  """One image-shaped perturbation a task, added to every image.

  Args:
    image_shape: `(H, W, C)`.
    preprocess_fn: from images in [0, 1] to what the model reads.
    radius: bound on each entry's magnitude (an L-infinity ball), in units of
      the space it is added in; None leaves it free.
    normalized: add after preprocessing, and clip *there* to [0, 1] outside the
      ascent, as the authors' code does; False adds to images in [0, 1] and
      always clips to [0, 1].
    tx: ascends.
    ascents: steps of it before each step of the masks.

  Returns:
    The adversary; its parameters are one array `[1, T, H, W, C]`.

  Raises:
    ValueError: where the shape, radius or number of ascents makes no sense.
  """
  _check(ascents, 1, image_shape)
  if radius is not None and not radius > 0:
    raise ValueError(f'radius must be positive or None, got {radius}')

  def init_fn(key, num_tasks):
    del key
    return jnp.zeros((1, num_tasks, *image_shape))

  def perturb_fn(params, images, clip):
    delta = params[:, None]
    if not normalized:
      return preprocess_fn(jnp.clip(images + delta, 0, 1))
    pixels = preprocess_fn(images) + delta
    return jnp.clip(pixels, 0, 1) if clip else pixels

  def project_fn(params):
    return params if radius is None else jnp.clip(params, -radius, radius)

  return Adversary(
    init_fn, perturb_fn, lambda params: jnp.zeros(()), project_fn, tx, ascents
  )


class SoftPatch(NamedTuple):
  """A patch whose place, shape and colours are all learned.

  Attributes:
    mask_logits: `[..., T, H, W, 1]`, the sigmoid is the patch's opacity.
    pattern_logits: `[..., T, H, W, C]`, the sigmoid is its colour.
  """

  mask_logits: jax.Array
  pattern_logits: jax.Array

  def opacity(self) -> jax.Array:
    """Returns `[..., T, H, W, 1]` in [0, 1]."""
    return jax.nn.sigmoid(self.mask_logits)

  def pattern(self) -> jax.Array:
    """Returns `[..., T, H, W, C]` in [0, 1]."""
    return jax.nn.sigmoid(self.pattern_logits)


def soft_patch(
  image_shape: tuple[int, int, int],
  *,
  preprocess_fn: PreprocessFn,
  area: float,
  price: float = 2.0,
  init_logit: float = -3.0,
  tx: optax.GradientTransformation = optax.adam(0.2),
  ascents: int = 4,
  restarts: int = 2,
  cap: float = 20.0,
  seeds: Seeds | None = None,
) -> Adversary:
  """Soft patches, `x' = (1 - s(a)) x + s(a) s(b)` with the sigmoid `s`.

  Their size is priced at `price * relu(sum s(a) / area - 1)` a task.

  Args:
    image_shape: `(H, W, C)`.
    preprocess_fn: from images in [0, 1] to what the model reads.
    area: in pixels, what a patch may cover for free.
    price: of covering twice as much, in nats.
    init_logit: mean of `a` at the start.
    tx: ascends.
    ascents: steps of it before each step of the masks.
    restarts: independent patches a task.
    cap: on the cross-entropy that is worth ascending, in nats.
    seeds: patches and the classes they lead to; copies of them move.

  Returns:
    The adversary; its parameters are a `SoftPatch`.

  Raises:
    ValueError: where a size or number makes no sense.
  """
  _check(ascents, restarts, image_shape)
  if not 0 < area <= image_shape[0] * image_shape[1]:
    raise ValueError(
      f'area must be positive and within the image of {image_shape[0]} x '
      f'{image_shape[1]} pixels, got {area}'
    )

  def init_fn(key, num_tasks):
    place, colour = jax.random.split(key)
    lead = (restarts, num_tasks, *image_shape[:2])
    return SoftPatch(
      init_logit + 0.1 * jax.random.normal(place, (*lead, 1)),
      jax.random.normal(colour, (*lead, image_shape[2])),
    )

  def perturb_fn(params, images, clip):
    del clip
    opacity, pattern = params.opacity()[:, None], params.pattern()[:, None]
    return preprocess_fn((1 - opacity) * images + opacity * pattern)

  def price_fn(params):
    covered = jnp.sum(params.opacity(), axis=(-3, -2, -1))
    return price * jnp.sum(jax.nn.relu(covered / area - 1))

  if seeds is not None:
    _check_seeds(seeds, image_shape)
  return Adversary(
    init_fn,
    perturb_fn,
    price_fn,
    lambda p: p,
    tx,
    ascents,
    cap,
    restarts,
    seeds,
    preprocess_fn,
  )


def _check_seeds(seeds: Seeds, image_shape: tuple[int, int, int]) -> None:
  """Raises unless patches, their classes and warps fit each other."""
  found = [x.shape for x in (*seeds.params, seeds.classes)]
  lead = found[-1]
  if len(lead) != 2 or found[:2] != [
    (*lead, *image_shape[:2], 1),
    (*lead, *image_shape),
  ]:
    raise ValueError(
      f'seeds must be [S, T, ...] of images {image_shape} and their masks, '
      f'and classes [S, T], got {found}'
    )
  num = lead[0]
  if seeds.points is not None:
    shape = seeds.points.shape
    if len(shape) != 5 or shape[1] != lead[1] or shape[4] != 2:
      raise ValueError(
        f'points of warps must be [W, {lead[1]}, G, G, 2], got {list(shape)}'
      )
    num += shape[0]
  if seeds.shunned is not None and seeds.shunned.shape != (num, lead[1]):
    raise ValueError(
      f'shunned classes must be [{num}, {lead[1]}], one for each patch and '
      f'warp, got {list(seeds.shunned.shape)}'
    )
  if (trust := seeds.trust) is not None and (
    trust.shape != lead[1:] or jnp.min(trust) < 0 or jnp.max(trust) > 1
  ):
    raise ValueError(
      f'trust must be [{lead[1]}], of each expert and in [0, 1], got '
      f'{trust.tolist()}'
    )
