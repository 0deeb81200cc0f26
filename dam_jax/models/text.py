"""CLIP's text tower in Flax: numbers of tokens to features.

Numerically Hugging Face's `CLIPTextModelWithProjection`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> config = TextConfig(
  ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1,
  ...     num_attention_heads=2, vocab_size=9, max_position_embeddings=5,
  ...     projection_dim=6, eos_token_id=8)
  >>> tower = TextTower(config)
  >>> tokens = jnp.array([[7, 1, 8, 8, 8], [7, 1, 2, 3, 8]])
  >>> params = jax.jit(tower.init)(jax.random.key(0), tokens)['params']
  >>> jax.jit(tower.apply)({'params': params}, tokens).shape
  (2, 6)

References:
  Radford et al., `Learning Transferable Visual Models From Natural Language
  Supervision <https://arxiv.org/abs/2103.00020>`_, 2021
"""

import dataclasses
from typing import Any

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.models import configs
from dam_jax.models import transformer

# Files before transformers' pull request 24773 say this in place of the true
# number, and are read as OpenAI's code does.
_WRONG_EOS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(transformer.BlockConfig):
  """Sizes of a text tower, in Hugging Face's names.

  Attributes:
    hidden_size: width of the residual stream.
    intermediate_size: width of the MLPs.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads of each block.
    vocab_size: number of tokens that there are.
    max_position_embeddings: most tokens of a text, with its start and end.
    projection_dim: of the features.
    eos_token_id: number of the token that ends a text, whose place features
      are read from: the first one's. 2 stands for the largest number in the
      text, as transformers has it for files that were written with a wrong one.
    hidden_act: 'quick_gelu' or 'gelu'.
    layer_norm_eps: added to variances.
  """

  tower = 'text'

  vocab_size: int
  max_position_embeddings: int
  eos_token_id: int = 49407

  def __post_init__(self):
    what = 'a CLIP text tower'
    lines = self.check(what)
    if self.eos_token_id >= self.vocab_size:
      lines.append(
        f'eos_token_id {self.eos_token_id} is not of a vocabulary of '
        f'{self.vocab_size}'
      )
    transformer.raise_if(lines, what)


def load_config(path: epath.PathLike) -> TextConfig:
  """Reads the sizes from a Hugging Face `config.json`.

  Args:
    path: of a `CLIPTextModelWithProjection`'s or a whole CLIP's config.

  Returns:
    The sizes.

  Raises:
    ValueError: where the file is no such config; names what is missing.
  """
  return configs.read(path, TextConfig)


def _preset(width: int) -> TextConfig:
  return TextConfig(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=12,
    num_attention_heads=width // 64,
    vocab_size=49408,
    max_position_embeddings=77,
    projection_dim=width,
  )


VIT_B = _preset(512)
"""Sizes of the text tower of CLIP ViT-B/32 and ViT-B/16."""

VIT_L = _preset(768)
"""Sizes of the text tower of CLIP ViT-L/14."""


class _Embeddings(nn.Module):
  config: TextConfig
  dtype: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Embeds tokens `[N, L]` as `[N, L, width]`."""
    c, init = self.config, nn.initializers.normal(0.02)
    token = self.param('token_embedding', init, (c.vocab_size, c.hidden_size))
    position = self.param(
      'position_embedding', init, (c.max_position_embeddings, c.hidden_size)
    )
    token, position = nn.dtypes.promote_dtype(token, position, dtype=self.dtype)
    # Numbers beyond the vocabulary become NaN, not the last token.
    x = jnp.take(token, tokens, axis=0, mode='fill')
    return x + position[None, : tokens.shape[1]]


class TextTower(nn.Module):
  """CLIP's text tower: numbers of tokens to features.

  Attributes:
    config: its sizes.
    dtype: of the computation, parameters keep theirs; None takes theirs.
      Softmax, the statistics of layer norms and the features of a bfloat16
      computation are float32.
    scan_layers: compile one block and loop over it, which compiles faster by
      about the number of layers. Parameters stay one leaf a tensor.
    attention: None computes it here, as a product, a softmax and a product;
      'xla' and 'cudnn' are those of `jax.nn.dot_product_attention`. cuDNN's
      flash attention needs an NVIDIA GPU and a `dtype` of half precision.
  """

  config: TextConfig
  dtype: Any = None
  scan_layers: bool = False
  attention: transformer.Implementation | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Returns features `[N, projection_dim]`, not normalised.

    What comes after the end of a text does not matter, so that `L` may be
    shorter than the longest that the tower reads.

    Args:
      tokens: `[N, L]` whole numbers below `vocab_size`, with start and end.

    Raises:
      ValueError: where they are of another kind or too long.
    """
    c, dtype = self.config, self.dtype
    most = c.max_position_embeddings
    whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= most or not whole:
      raise ValueError(
        f'tokens are {tokens.dtype}{list(tokens.shape)}, the tower reads '
        f'whole numbers [N, 1 to {most}]'
      )
    num, length = tokens.shape
    x = _Embeddings(c, dtype, name='embeddings')(tokens)
    x = x.reshape(-1, c.hidden_size)
    blocks = [
      transformer.Block(
        *(c, dtype, length),
        causal=True,
        attention=self.attention,
        name=f'layers_{i}',
      )
      for i in range(c.num_hidden_layers)
    ]
    if self.scan_layers and not self.is_initializing():
      x = transformer.scan(blocks, x)
    else:
      for block in blocks:
        x = block(x)
    ends = tokens if c.eos_token_id == _WRONG_EOS else tokens == c.eos_token_id
    x = x.reshape(num, length, -1)[np.arange(num), jnp.argmax(ends, axis=1)]
    x = transformer.layer_norm(c, dtype, 'final_layer_norm')(x)
    x = nn.Dense(
      c.projection_dim, use_bias=False, dtype=dtype, name='text_projection'
    )(x)
    return x.astype(np.promote_types(x.dtype, np.float32))
