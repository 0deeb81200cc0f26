"""CLIP's image tower in Flax, and zero-shot heads for many tasks at once.

Numerically Hugging Face's `CLIPVisionModelWithProjection`. Parameters have one
leaf a tensor; `dam_jax.models.convert` maps their names.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> config = VisionConfig(
  ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1,
  ...     num_attention_heads=2, image_size=4, patch_size=2, projection_dim=6)
  >>> tower = VisionTower(config)
  >>> pixels = normalize(jnp.zeros((3, 4, 4, 3)))
  >>> params = jax.jit(tower.init)(jax.random.key(0), pixels)['params']
  >>> jax.jit(tower.apply)({'params': params}, pixels).shape
  (3, 6)

References:
  Radford et al., `Learning Transferable Visual Models From Natural Language
  Supervision <https://arxiv.org/abs/2103.00020>`_, 2021
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.losses import MASKED_LOGIT
from dam_jax.models import configs
from dam_jax.models import transformer
from dam_jax.typing import LogitsFn, Params, TaskLogitsFn

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of CLIP's training images, by channel."""

STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, by channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(transformer.BlockConfig):
  """Sizes of an image tower, in Hugging Face's names.

  Attributes:
    hidden_size: width of the residual stream.
    intermediate_size: width of the MLPs.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads of each block.
    image_size: height and width of the images, in pixels.
    patch_size: of the patches, in pixels.
    projection_dim: of the features.
    num_channels: of the images.
    hidden_act: 'quick_gelu' or 'gelu'.
    layer_norm_eps: added to variances.
  """

  tower = 'vision'

  image_size: int
  patch_size: int
  num_channels: int = 3

  def __post_init__(self):
    what = 'a CLIP image tower'
    lines = self.check(what)
    if self.image_size % self.patch_size:
      lines.append(
        f'image_size {self.image_size} does not divide into patches of '
        f'{self.patch_size}'
      )
    transformer.raise_if(lines, what)

  @property
  def num_tokens(self) -> int:
    """Number of patches, and the class token."""
    return (self.image_size // self.patch_size) ** 2 + 1

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Shape of one image, `(H, W, C)`."""
    return (self.image_size, self.image_size, self.num_channels)


def load_config(path: epath.PathLike) -> VisionConfig:
  """Reads the sizes from a Hugging Face `config.json`.

  Args:
    path: of a `CLIPVisionModelWithProjection`'s or a whole CLIP's config.

  Returns:
    The sizes.

  Raises:
    ValueError: where the file is no such config; names what is missing.
  """
  return configs.read(path, VisionConfig)


def _preset(width: int, layers: int, patch: int, projection: int):
  return VisionConfig(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=layers,
    num_attention_heads=width // 64,
    image_size=224,
    patch_size=patch,
    projection_dim=projection,
  )


VIT_B32 = _preset(768, 12, 32, 512)
"""CLIP ViT-B/32's sizes."""

VIT_B16 = _preset(768, 12, 16, 512)
"""CLIP ViT-B/16's sizes."""

VIT_L14 = _preset(1024, 24, 14, 768)
"""CLIP ViT-L/14's sizes."""


def normalize(images: jax.Array) -> jax.Array:
  """Subtracts CLIP's mean and divides by its deviation.

  Args:
    images: `[..., 3]` in [0, 1].

  Returns:
    What `VisionTower` reads, of the same shape and dtype.
  """
  lead = (1,) * (images.ndim - 1)
  mean = jnp.asarray(MEAN, images.dtype).reshape(*lead, 3)
  std = jnp.asarray(STD, images.dtype).reshape(*lead, 3)
  return (images - mean) / std


class _Embeddings(nn.Module):
  config: VisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Embeds pixels `[N, H, W, C]` as tokens `[N, tokens, width]`."""
    c = self.config
    init = nn.initializers.normal(0.02)
    size, width = c.patch_size, c.hidden_size
    kernel = self.param(
      'patch_embedding', init, (size, size, c.num_channels, width)
    )
    token = self.param('class_embedding', init, (width,))
    position = self.param('position_embedding', init, (c.num_tokens, width))
    pixels, kernel, token, position = nn.dtypes.promote_dtype(
      pixels, kernel, token, position, dtype=self.dtype
    )
    n, side = pixels.shape[0], c.image_size // size
    # A product over patches; as a convolution it is slower on a CPU.
    patches = pixels.reshape(n, side, size, side, size, c.num_channels)
    patches = patches.swapaxes(2, 3).reshape(n * side * side, -1)
    x = (patches @ kernel.reshape(-1, width)).reshape(n, -1, width)
    token = jnp.broadcast_to(token, (n, 1, width))
    return jnp.concatenate([token, x], axis=1) + position[None]


class VisionTower(nn.Module):
  """CLIP's image tower: normalised pixels to features.

  Attributes:
    config: its sizes.
    dtype: of the computation, parameters keep theirs; None takes theirs.
      Softmax, the statistics of layer norms and the features of a bfloat16
      computation are float32.
    scan_layers: compile one block and loop over it, which compiles faster by
      about the number of layers. Parameters stay one leaf a tensor.
    every_token: let the last block compute all tokens, for those who capture
      them. Features read the class token alone, and a block without the others
      does a sixth of its work.
    remat: let gradients compute each block again from its input, for a third
      more work: of a block nothing else stays in memory.
    attention: None computes it here, as a product, a softmax and a product;
      'xla' and 'cudnn' are those of `jax.nn.dot_product_attention`. cuDNN's
      flash attention needs an NVIDIA GPU and a `dtype` of half precision.
  """

  config: VisionConfig
  dtype: Any = None
  scan_layers: bool = False
  every_token: bool = False
  remat: bool = False
  attention: transformer.Implementation | None = None

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Returns features `[N, projection_dim]`, not normalised.

    Args:
      pixels: `[N, H, W, C]` from `normalize`.

    Raises:
      ValueError: where images are not of the config's shape.
    """
    c, dtype = self.config, self.dtype
    if pixels.shape[1:] != c.image_shape:
      raise ValueError(
        f'images are {list(pixels.shape[1:])}, the tower reads '
        f'{list(c.image_shape)}'
      )
    x = _Embeddings(c, dtype, name='embeddings')(pixels)
    x = x.reshape(-1, c.hidden_size)
    x = transformer.layer_norm(c, dtype, 'pre_layernorm')(x)
    shared = {'tokens': c.num_tokens, 'attention': self.attention}
    *most, last = (f'layers_{i}' for i in range(c.num_hidden_layers))
    block_type = (
      nn.remat(transformer.Block) if self.remat else transformer.Block
    )
    blocks = [block_type(c, dtype, **shared, name=x) for x in most]
    if self.scan_layers and not self.is_initializing() and blocks:
      x = transformer.scan(blocks, x)
    else:
      for block in blocks:
        x = block(x)
    shared['every_token'] = self.every_token
    x = block_type(c, dtype, **shared, name=last)(x)
    x = transformer.first_tokens(x, c.num_tokens) if self.every_token else x
    x = transformer.layer_norm(c, dtype, 'post_layernorm')(x)
    x = nn.Dense(
      c.projection_dim, use_bias=False, dtype=dtype, name='visual_projection'
    )(x)
    return x.astype(np.promote_types(x.dtype, np.float32))


class Heads(NamedTuple):
  """Frozen zero-shot heads of several tasks.

  Attributes:
    weights: `[T, D, L]`, a unit vector a class; zero where a task has fewer
      than `L`.
    mask: `[T, L]`, whether a task has the class.
    scale: of the cosines.
  """

  weights: jax.Array
  mask: jax.Array
  scale: float = 100.0


def stack_heads(heads: Sequence[np.ndarray], *, scale: float = 100.0) -> Heads:
  """Pads heads to the largest number of classes.

  Args:
    heads: `[D, L_t]` a task.
    scale: of the cosines, the exponential of CLIP's logit scale.

  Returns:
    The heads of all tasks.

  Raises:
    ValueError: where there is none, they disagree on `D`, or one has no class
      or a value that is not finite.

  Examples:
    >>> stack_heads([np.eye(3, 2), np.eye(3)]).mask.tolist()
    [[True, True, False], [True, True, True]]
  """
  lines = [
    f'head {t} is {list(h.shape)}, want [D, classes] with at least one class'
    for t, h in enumerate(heads)
    if h.ndim != 2 or not h.shape[1]
  ]
  lines += [
    f'head {t} has values that are not finite'
    for t, h in enumerate(heads)
    if not np.isfinite(h).all()
  ]
  if not lines and len({h.shape[0] for h in heads}) != 1:
    lines = [f'feature sizes are {[h.shape[0] for h in heads]}, want one size']
  if lines:
    raise ValueError('\n  '.join(['zero-shot heads:', *lines]))
  most = max(h.shape[1] for h in heads)
  weights = np.stack(
    [np.pad(h, ((0, 0), (0, most - h.shape[1]))) for h in heads]
  )
  mask = np.stack([np.arange(most) < h.shape[1] for h in heads])
  return Heads(jnp.asarray(weights), jnp.asarray(mask), scale)


def unit(features: jax.Array) -> jax.Array:
  """Divides by the Euclidean norm over the last axis."""
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def zero_shot(
  features_fn: Callable[[Params, jax.Array], jax.Array], heads: Heads
) -> LogitsFn:
  """Makes logits for the images of all tasks from one forward pass.

  Args:
    features_fn: `(params, pixels [N, H, W, C]) -> features [N, D]`.
    heads: of the tasks.

  Returns:
    `(params, pixels [T, B, H, W, C]) -> logits [T, B, L]`, the scaled cosines
    of features and classes.
  """

  def logits_fn(params, images):
    # Images come before tasks: where devices split them, each keeps its own.
    first = jnp.swapaxes(images, 0, 1)
    flat = first.reshape(-1, *images.shape[2:])
    features = unit(features_fn(params, flat)).reshape(*first.shape[:2], -1)
    cosines = jnp.einsum(
      'btd,tdl->tbl', features, heads.weights.astype(features.dtype)
    )
    return jnp.where(heads.mask[:, None], heads.scale * cosines, MASKED_LOGIT)

  return logits_fn


def zero_shot_task(
  features_fn: Callable[[Params, jax.Array], jax.Array], heads: Heads
) -> TaskLogitsFn:
  """Makes logits for the images of one task, which may be traced.

  Args:
    features_fn: `(params, pixels [N, H, W, C]) -> features [N, D]`.
    heads: of the tasks.

  Returns:
    `(params, task, pixels [N, H, W, C]) -> logits [N, L]`.
  """

  def logits_fn(params, task, images):
    own = Heads(heads.weights[task][None], heads.mask[task][None], heads.scale)
    return zero_shot(features_fn, own)(params, images[None])[0]

  return logits_fn
