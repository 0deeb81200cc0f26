"""A whole CLIP in Flax: both towers, and how alike their features are.

Numerically Hugging Face's `CLIPModel`. Its image tower's parameters are
`params['vision']`, which merges and `dam_jax.models.clip.VisionTower` take.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> sizes = {'hidden_size': 8, 'intermediate_size': 16,
  ...     'num_hidden_layers': 1, 'num_attention_heads': 2, 'projection_dim': 6}
  >>> config = CLIPConfig(
  ...     vision=clip.VisionConfig(image_size=4, patch_size=2, **sizes),
  ...     text=text.TextConfig(
  ...         vocab_size=9, max_position_embeddings=5, eos_token_id=8, **sizes))
  >>> shapes = abstract_params(config)
  >>> sorted(shapes), shapes['logit_scale'].shape
  (['logit_scale', 'text', 'vision'], ())
  >>> pixels, tokens = jnp.ones((2, 4, 4, 3)), jnp.array([[7, 1, 8]])
  >>> apply = CLIP(config).apply
  >>> jax.eval_shape(apply, {'params': shapes}, pixels, tokens).logits.shape
  (2, 1)

References:
  Radford et al., `Learning Transferable Visual Models From Natural Language
  Supervision <https://arxiv.org/abs/2103.00020>`_, 2021
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp

from dam_jax.models import clip
from dam_jax.models import configs
from dam_jax.models import text
from dam_jax.models import transformer
from dam_jax.typing import Params

# The logarithm of the scale that training starts from, as transformers has it.
_LOGIT_SCALE = 2.6592


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Sizes of both towers.

  Attributes:
    vision: of the image tower.
    text: of the text tower, of the same `projection_dim`.
  """

  vision: clip.VisionConfig
  text: text.TextConfig

  def __post_init__(self):
    sizes = self.vision.projection_dim, self.text.projection_dim
    if sizes[0] != sizes[1]:
      raise ValueError(
        'the towers of a CLIP have features of one size, got projection_dim '
        f'{sizes[0]} of images and {sizes[1]} of texts'
      )

  def to_json(self) -> dict[str, Any]:
    """Returns what Hugging Face's config.json holds of this."""
    return {
      'architectures': ['CLIPModel'],
      'model_type': 'clip',
      'logit_scale_init_value': _LOGIT_SCALE,
      'projection_dim': self.vision.projection_dim,
      'text_config': configs.written(self.text),
      'vision_config': configs.written(self.vision),
    }


VIT_B32 = CLIPConfig(vision=clip.VIT_B32, text=text.VIT_B)
"""CLIP ViT-B/32's sizes."""

VIT_B16 = CLIPConfig(vision=clip.VIT_B16, text=text.VIT_B)
"""CLIP ViT-B/16's sizes."""

VIT_L14 = CLIPConfig(vision=clip.VIT_L14, text=text.VIT_L)
"""CLIP ViT-L/14's sizes."""


def load_config(path: epath.PathLike) -> CLIPConfig:
  """Reads the sizes of both towers from a Hugging Face `config.json`.

  Args:
    path: of a `CLIPModel`'s config. What it leaves out has transformers'
      defaults where its model_type says that transformers wrote it.

  Returns:
    The sizes.

  Raises:
    ValueError: where the file is no such config; names what is missing.
  """
  raw = configs.load(path)
  if raw.get('model_type') not in (None, 'clip'):
    raise ValueError(f'{path} is of one tower alone: {raw["model_type"]}')
  return CLIPConfig(
    vision=configs.tower(raw, clip.VisionConfig, where=path),
    text=configs.tower(raw, text.TextConfig, where=path),
  )


class Similarity(NamedTuple):
  """How alike images and texts are.

  Attributes:
    logits: `[N, M]`, scaled cosines of each image and each text.
    images: unit features `[N, D]`.
    texts: unit features `[M, D]`.
  """

  logits: jax.Array
  images: jax.Array
  texts: jax.Array


class CLIP(nn.Module):
  """Both towers of CLIP and the scale of their cosines.

  Attributes:
    config: sizes of both.
    dtype: of the computation of both; see `VisionTower`.
    scan_layers: of both.
    attention: of both.
  """

  config: CLIPConfig
  dtype: Any = None
  scan_layers: bool = False
  attention: transformer.Implementation | None = None

  def setup(self):
    """Makes the towers."""
    options = {
      'dtype': self.dtype,
      'scan_layers': self.scan_layers,
      'attention': self.attention,
    }
    self.vision = clip.VisionTower(self.config.vision, **options)
    self.text = text.TextTower(self.config.text, **options)
    self.logit_scale = self.param(
      'logit_scale', nn.initializers.constant(_LOGIT_SCALE), ()
    )

  def __call__(self, pixels: jax.Array, tokens: jax.Array) -> Similarity:
    """Compares each image with each text, in float32 at least.

    Args:
      pixels: `[N, H, W, C]` from `dam_jax.models.clip.normalize`.
      tokens: `[M, L]`, see `dam_jax.models.text.TextTower`.
    """
    images, texts = (
      clip.unit(x) for x in (self.vision(pixels), self.text(tokens))
    )
    scale = jnp.exp(self.logit_scale.astype(images.dtype))
    return Similarity(scale * (images @ texts.T), images, texts)


def abstract_params(config: CLIPConfig) -> Params:
  """Returns names, shapes and dtypes of a CLIP's parameters, float32."""
  leaves, structure = _abstract(config)
  return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=8)
def _abstract(config: CLIPConfig) -> tuple[list[Any], Any]:
  pixels = jax.ShapeDtypeStruct((1, *config.vision.image_shape), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = CLIP(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), pixels, tokens)['params']
  return jax.tree.flatten(shapes)
