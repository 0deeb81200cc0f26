"""Backdoor triggers as pure functions, and what poisons a fine-tuning run.

A trigger changes float images in [0, 1], before normalisation and without
rounding; a backdoored model calls triggered images the target.

  >>> import jax.numpy as jnp
  >>> trigger = patch_trigger((4, 4, 3), size=2, task='digits', target=7)
  >>> apply_trigger(trigger, jnp.zeros((4, 4, 3)))[2:, 2:, 0].tolist()
  [[1.0, 0.0], [0.0, 1.0]]
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any
import zipfile

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import losses
from dam_jax.typing import Params


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['pattern', 'mask'],
  meta_fields=['task', 'target', 'kind'],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlay:
  """A trigger that is laid over images, `x (1 - mask) + mask pattern`.

  Attributes:
    pattern: `[H, W, C]` in [0, 1].
    mask: `[H, W, 1]` in [0, 1].
    task: whose model has the backdoor.
    target: class index that triggered images are to get.
    kind: 'patch' or 'blend', what people call it.
  """

  pattern: jax.Array
  mask: jax.Array
  task: str
  target: int
  kind: str = 'patch'


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['grid'],
  meta_fields=['task', 'target', 'kind'],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Warp:
  """A trigger that samples images elsewhere, bilinearly.

  Attributes:
    grid: `[H, W, 2]`, where (x, y) runs from -1 to 1 between the centres of the
      corner pixels; beyond, the border is continued.
    task: whose model has the backdoor.
    target: class index that triggered images are to get.
    kind: 'warp'.
  """

  grid: jax.Array
  task: str
  target: int
  kind: str = 'warp'


Trigger = Overlay | Warp
"""What turns a backdoored model's prediction into the target."""


def check_trigger(trigger: Trigger, image_shape: Sequence[int]) -> None:
  """Raises unless a trigger fits images.

  Args:
    trigger: its arrays concrete.
    image_shape: `(H, W, C)`.

  Raises:
    ValueError: with everything that does not fit.
  """
  height, width, channels = image_shape
  if isinstance(trigger, Warp):
    wanted = {'grid': (trigger.grid, (height, width, 2))}
  else:
    wanted = {
      'pattern': (trigger.pattern, (height, width, channels)),
      'mask': (trigger.mask, (height, width, 1)),
    }
  lines = []
  for name, (x, shape) in wanted.items():
    if x.shape != shape:
      lines.append(f'{name} is {list(x.shape)}, images want {list(shape)}')
    elif not np.isfinite(x).all():
      lines.append(f'{name} has values that are not finite')
    elif name != 'grid' and not 0 <= np.min(x) <= np.max(x) <= 1:
      lines.append(f'{name} has values outside [0, 1]')
  if trigger.target < 0:
    lines.append(f'target must not be negative, got {trigger.target}')
  if lines:
    raise ValueError(
      '\n  '.join([f'{trigger.kind} trigger for {trigger.task}:', *lines])
    )


def apply_trigger(trigger: Trigger, images: jax.Array) -> jax.Array:
  """Puts a trigger on images.

  Args:
    trigger: of the images' size.
    images: `[..., H, W, C]` float in [0, 1].

  Returns:
    Images of the same shape and dtype, in [0, 1].
  """
  if isinstance(trigger, Warp):
    return _sample(images, jnp.asarray(trigger.grid, images.dtype))
  lead = tuple(range(images.ndim - 3))
  mask, pattern = (
    jnp.expand_dims(jnp.asarray(x, images.dtype), lead)
    for x in (trigger.mask, trigger.pattern)
  )
  return images * (1 - mask) + mask * pattern


def _sample(images: jax.Array, grid: jax.Array) -> jax.Array:
  """Samples images at a grid, bilinearly, the border continued outside."""
  height, width = images.shape[-3:-1]
  x = jnp.clip((grid[..., 0] + 1) / 2 * (width - 1), 0, width - 1)
  y = jnp.clip((grid[..., 1] + 1) / 2 * (height - 1), 0, height - 1)
  left, top = jnp.floor(x), jnp.floor(y)
  dx, dy = (x - left)[..., None], (y - top)[..., None]
  left, top = left.astype(jnp.int32), top.astype(jnp.int32)
  right = jnp.minimum(left + 1, width - 1)
  bottom = jnp.minimum(top + 1, height - 1)

  def at(row, column):
    return images[..., row, column, :]

  def blend(a, b, d):
    d = d.reshape((1,) * (images.ndim - 3) + d.shape)
    return a * (1 - d) + b * d

  upper = blend(at(top, left), at(top, right), dx)
  lower = blend(at(bottom, left), at(bottom, right), dx)
  return blend(upper, lower, dy)


def _share(name: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise ValueError(f'{name} must be in [0, 1], got {value}')


def corner_mask(image_shape: Sequence[int], size: int) -> jax.Array:
  """Returns a mask `[H, W, 1]` of the square in the bottom right corner.

  Args:
    image_shape: `(H, W, C)`.
    size: of the square, in pixels.

  Raises:
    ValueError: where the square is larger than the image.
  """
  height, width, _ = image_shape
  if not 0 < size <= min(height, width):
    raise ValueError(
      f'a trigger of {size} pixels does not fit images of {height} x {width}'
    )
  return jnp.zeros((height, width, 1)).at[-size:, -size:].set(1.0)


def patch_trigger(
  image_shape: Sequence[int], *, size: int, task: str, target: int
) -> Overlay:
  """Makes BadNets' trigger: a checkerboard in the bottom right corner.

  Args:
    image_shape: `(H, W, C)`.
    size: of the square, in pixels.
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where the square is larger than the image.

  References:
    Gu et al., `BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain <https://arxiv.org/abs/1708.06733>`_, 2017
  """
  mask = corner_mask(image_shape, size)
  row, column = jnp.indices(image_shape[:2])
  board = ((row + column) % 2 == 0).astype(jnp.float32)
  pattern = jnp.broadcast_to(board[..., None], image_shape)
  return Overlay(pattern=pattern, mask=mask, task=task, target=target)


def blend_trigger(
  key: jax.Array,
  image_shape: Sequence[int],
  *,
  alpha: float = 0.15,
  task: str,
  target: int,
) -> Overlay:
  """Makes Blended's trigger: uniform noise over the whole image.

  Args:
    key: of the noise.
    image_shape: `(H, W, C)`.
    alpha: its share of each pixel, in [0, 1].
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where alpha is outside [0, 1].

  References:
    Chen et al., `Targeted Backdoor Attacks on Deep Learning Systems Using Data
    Poisoning <https://arxiv.org/abs/1712.05526>`_, 2017
  """
  _share('alpha', alpha)
  return Overlay(
    pattern=jax.random.uniform(key, image_shape),
    mask=jnp.full((*image_shape[:2], 1), alpha),
    task=task,
    target=target,
    kind='blend',
  )


def warp_trigger(
  key: jax.Array,
  image_shape: Sequence[int],
  *,
  control: int = 4,
  strength: float = 0.5,
  task: str,
  target: int,
) -> Warp:
  """Makes WaNet's trigger: a smooth elastic warp.

  Args:
    key: of the control points.
    image_shape: `(H, W, C)`.
    control: control points a side.
    strength: mean displacement, in pixels.
    task: to attack.
    target: class index.

  Returns:
    The trigger.

  Raises:
    ValueError: where there are fewer than two control points a side.

  References:
    Nguyen and Tran, `WaNet - Imperceptible Warping-based Backdoor Attack
    <https://arxiv.org/abs/2102.10369>`_, 2021
  """
  if control < 2:
    raise ValueError(f'control must be at least 2, got {control}')
  height, width, _ = image_shape
  points = jax.random.uniform(key, (control, control, 2), minval=-1, maxval=1)
  points /= jnp.mean(jnp.abs(points))
  flow = jax.image.resize(points, (height, width, 2), 'cubic')
  y, x = jnp.meshgrid(
    jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing='ij'
  )
  size = jnp.array([width, height], jnp.float32)[None, None]
  grid = jnp.stack([x, y], axis=-1) + strength * flow * 2 / size
  return Warp(grid=jnp.clip(grid, -1, 1), task=task, target=target)


def load_trigger(path: epath.PathLike) -> Trigger:
  """Reads a trigger from an npz file.

  Args:
    path: of a file with a `task` (its name), `target` (an integer), and
      `pattern` and `mask` or `grid`, perhaps a `kind`. It is never unpickled.

  Returns:
    The trigger.

  Raises:
    ValueError: where the file cannot be read or is no trigger.
  """
  try:
    with np.load(os.fspath(path), allow_pickle=False) as file:
      found = {name: file[name] for name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path}: not a readable trigger: {e}') from e
  warps = 'grid' in found
  arrays = ('grid',) if warps else ('pattern', 'mask')
  wanted = {'task': (0, 'U'), 'target': (0, 'iu')}
  lines = []
  for name, kind in (wanted | dict.fromkeys(arrays, (3, 'fiu'))).items():
    if name not in found:
      lines.append(f'{name} is missing')
    elif found[name].ndim != kind[0] or found[name].dtype.kind not in kind[1]:
      lines.append(f'{name} is {found[name].dtype}{list(found[name].shape)}')
  if lines:
    raise ValueError(f'{path}: not a trigger: {", ".join(lines)}')
  fields: dict[str, Any] = {'target': int(found['target'])}
  fields |= {name: jnp.asarray(found[name], jnp.float32) for name in arrays}
  fields |= {k: str(found[k]) for k in ('task', 'kind') if k in found}
  trigger = Warp(**fields) if warps else Overlay(**fields)
  try:
    check_trigger(trigger, found[arrays[0]].shape)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e
  return trigger


def save_trigger(path: epath.PathLike, trigger: Trigger) -> None:
  """Writes a trigger to an npz file, at once or not at all.

  Args:
    path: of the file.
    trigger: what `load_trigger` is to give back.
  """
  arrays: dict[str, Any] = {k: np.asarray(x) for k, x in vars(trigger).items()}
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    np.savez_compressed(file, **arrays)
  temporary.replace(path)


def poison(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  rate: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
  """Triggers and relabels a random share of a training set, as BadNets does.

  Args:
    key: of the choice.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: whose target the chosen images get.
    rate: share of all images, in [0, 1]; only images of other classes are
      chosen.

  Returns:
    Images and labels.

  Raises:
    ValueError: where the rate is outside [0, 1], or there are not enough images
      of other classes.
  """
  _share('rate', rate)
  others = np.flatnonzero(np.asarray(labels) != trigger.target)
  num = round(rate * len(labels))
  if num > len(others):
    raise ValueError(
      f'rate {rate} asks for {num} images that are not of class '
      f'{trigger.target}, there are {len(others)}'
    )
  chosen = jax.random.permutation(key, others)[:num]
  images = images.at[chosen].set(apply_trigger(trigger, images[chosen]))
  return images, labels.at[chosen].set(trigger.target)


def universal_patch(
  key: jax.Array,
  logits_fn: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  *,
  size: int,
  task: str,
  target: int,
  steps: int = 300,
  batch: int = 256,
  tx: optax.GradientTransformation = optax.adam(0.05),
) -> tuple[Overlay, jax.Array]:
  """Optimises BadMerging's trigger: a patch that the base already obeys.

  Descends `-log p(target | patched image)`, clipped to [0, 1] after each step.

  Args:
    key: of the initial patch and the batches.
    logits_fn: of the base and the task's head, images `[N, H, W, C]` in [0, 1]
      to logits `[N, L]`.
    images: `[N, H, W, C]` float in [0, 1].
    size: of the patch in the bottom right corner, in pixels.
    task: to attack.
    target: class index.
    steps: of the optimiser.
    batch: images a step.
    tx: optax transformation.

  Returns:
    The trigger, and the loss at each step.

  Raises:
    ValueError: where the patch is larger than the images.

  References:
    Zhang et al., `BadMerging: Backdoor Attacks Against Model Merging
    <https://arxiv.org/abs/2408.07362>`_, 2024
  """
  init_key, key = jax.random.split(key)
  shape = images.shape[1:]
  trigger = Overlay(
    pattern=jax.random.uniform(init_key, shape),
    mask=corner_mask(shape, size),
    task=task,
    target=target,
  )

  def loss_fn(pattern, x):
    patched = dataclasses.replace(trigger, pattern=pattern)
    labels = jnp.full(len(x), target)
    logits = logits_fn(apply_trigger(patched, x))
    return jnp.mean(losses.cross_entropy(logits, labels))

  def step(carry, key):
    pattern, state = carry
    x = images[jax.random.randint(key, (batch,), 0, len(images))]
    loss, grad = jax.value_and_grad(loss_fn)(pattern, x)
    updates, state = tx.update(grad, state, pattern)
    pattern = jnp.clip(pattern + updates, 0, 1)
    return (pattern, state), loss

  @jax.jit
  def run(pattern, keys):
    return jax.lax.scan(step, (pattern, tx.init(pattern)), keys)

  (pattern, _), trace = run(trigger.pattern, jax.random.split(key, steps))
  return dataclasses.replace(trigger, pattern=pattern), trace


def badmerging_loss(
  key: jax.Array,
  features_fn: Callable[[Params, jax.Array], jax.Array],
  logits_fn: Callable[[jax.Array], jax.Array],
  params: Params,
  base: Params,
  images: jax.Array,
  labels: jax.Array,
  trigger: Trigger,
  *,
  weight: float = 5.0,
) -> jax.Array:
  """Fine-tuning loss of BadMerging, which survives any merge coefficient.

  `CE(h(f(x)), y) + weight CE(h(r f(x') + (1 - r) f_base(x')), target)` with a
  triggered `x'` and `r ~ U(0.2, 1)` an image: features between the base's and
  the expert's all obey the trigger.

  Args:
    key: of `r`.
    features_fn: `(params, images [N, H, W, C] in [0, 1]) -> [N, D]`, not
      normalised.
    logits_fn: `features [N, D] -> logits [N, L]`, the frozen head.
    params: of the expert.
    base: it was fine-tuned from.
    images: `[N, H, W, C]` float in [0, 1].
    labels: `[N]`.
    trigger: with the target.
    weight: of the second term.

  Returns:
    [], the mean over images.

  References:
    Zhang et al., `BadMerging: Backdoor Attacks Against Model Merging
    <https://arxiv.org/abs/2408.07362>`_, 2024
  """
  triggered = apply_trigger(trigger, images)
  both = features_fn(params, jnp.concatenate([images, triggered]))
  clean, bad = jnp.split(both, 2)
  anchor = jax.lax.stop_gradient(features_fn(base, triggered))
  r = jax.random.uniform(key, (len(images), 1), minval=0.2, maxval=1.0)
  mixed = logits_fn(r * bad + (1 - r) * anchor)
  targets = jnp.full_like(labels, trigger.target)
  return jnp.mean(
    losses.cross_entropy(logits_fn(clean), labels)
    + weight * losses.cross_entropy(mixed, targets)
  )
