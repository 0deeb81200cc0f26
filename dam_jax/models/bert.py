"""BERT's encoder in Flax, which reads words or vectors of words.

Numerically Hugging Face's `BertModel`, without its pooler. Parameters have one
leaf a tensor; `dam_jax.models.convert` maps their names.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> config = BertConfig(
  ...     vocab_size=20, hidden_size=8, intermediate_size=16,
  ...     num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=6)
  >>> encoder = Encoder(config)
  >>> words = jnp.array([[2, 7, 3, 0, 0]])
  >>> params = jax.jit(encoder.init)(jax.random.key(0), words)['params']
  >>> hidden = jax.jit(encoder.apply)({'params': params}, words)
  >>> hidden.shape, mean_pool(hidden, present(words)).shape
  ((1, 5, 8), (1, 8))

A merge that perturbs its inputs needs such as can be changed a little, which
words cannot. `Vectors` makes them of words.

References:
  Devlin et al., `BERT: Pre-training of Deep Bidirectional Transformers for
  Language Understanding <https://arxiv.org/abs/1810.04805>`_, 2019
"""

import dataclasses
import json
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PAD = 0
"""The word that fills up short texts."""

_NO_WORD = 1e-30  # its logarithm is finite, and its weight in a softmax zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
  """Sizes of an encoder, in Hugging Face's names.

  Attributes:
    vocab_size: number of words.
    hidden_size: width of the residual stream.
    intermediate_size: width of the MLPs.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads of each block.
    max_position_embeddings: longest text, in words.
    type_vocab_size: number of segments; texts here are of the first.
    layer_norm_eps: added to variances.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12

  def __post_init__(self):
    lines = [
      f'{name} must be positive, got {size}'
      for name, size in dataclasses.asdict(self).items()
      if not size > 0
    ]
    if not lines and self.hidden_size % self.num_attention_heads:
      lines.append(
        f'hidden_size {self.hidden_size} does not divide into '
        f'{self.num_attention_heads} heads'
      )
    if lines:
      raise ValueError('\n  '.join(['a BERT encoder:', *lines]))


_ALSO = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
}


def load_config(path: epath.PathLike) -> BertConfig:
  """Reads the sizes from a Hugging Face `config.json`.

  Args:
    path: of a `BertModel`'s config.

  Returns:
    The sizes.

  Raises:
    ValueError: where the file is no such config, or asks for what the encoder
      does not do; names all of it.
  """
  try:
    raw = json.loads(epath.Path(path).read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
  fields = dataclasses.fields(BertConfig)
  lines = [
    f'{f.name} is missing'
    for f in fields
    if f.default is dataclasses.MISSING and f.name not in raw
  ]
  lines += [
    f'{name} must be {want}, got {raw[name]}'
    for name, want in _ALSO.items()
    if raw.get(name, want) != want
  ]
  if lines:
    raise ValueError('\n  '.join([f'{path}:', *lines]))
  return BertConfig(**{f.name: raw[f.name] for f in fields if f.name in raw})


class _Attention(nn.Module):
  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Attends within each text; x `[N * L, D]`, mask `[N, L]`."""
    c = self.config
    heads, depth = c.num_attention_heads, c.hidden_size // c.num_attention_heads

    def project(name):
      y = nn.Dense(c.hidden_size, dtype=self.dtype, name=name)(x)
      return jnp.swapaxes(y.reshape(len(mask), -1, heads, depth), 1, 2)

    q, k, v = project('query'), project('key'), project('value')
    scores = jnp.einsum('nhqd,nhkd->nhqk', q * depth**-0.5, k)
    wide = np.promote_types(scores.dtype, np.float32)
    there = jnp.log(jnp.maximum(mask.astype(wide), _NO_WORD))
    scores = scores.astype(wide) + there[:, None, None]
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = jnp.swapaxes(jnp.einsum('nhqk,nhkd->nhqd', weights, v), 1, 2)
    return nn.Dense(c.hidden_size, dtype=self.dtype, name='out')(
      y.reshape(x.shape)
    )


def _layer_norm(config: BertConfig, dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    use_fast_variance=False,
    name=name,
  )


class _Block(nn.Module):
  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps `[N * L, D]` to the same."""
    c, dtype = self.config, self.dtype
    y = _Attention(c, dtype, name='attention')(x, mask)
    x = _layer_norm(c, dtype, 'attention_norm')(x + y)
    y = nn.Dense(c.intermediate_size, dtype=dtype, name='fc1')(x)
    y = jax.nn.gelu(y, approximate=False)
    y = nn.Dense(c.hidden_size, dtype=dtype, name='fc2')(y)
    return _layer_norm(c, dtype, 'mlp_norm')(x + y)


class _Embeddings(nn.Module):
  config: BertConfig
  dtype: Any

  def setup(self):
    c = self.config

    def table(rows: int) -> nn.Embed:
      return nn.Embed(
        rows,
        c.hidden_size,
        dtype=self.dtype,
        embedding_init=nn.initializers.normal(0.02),
      )

    self.word = table(c.vocab_size)
    self.position = table(c.max_position_embeddings)
    self.token_type = table(c.type_vocab_size)
    self.norm = nn.LayerNorm(
      epsilon=c.layer_norm_eps, dtype=self.dtype, use_fast_variance=False
    )

  def __call__(self, vectors: jax.Array) -> jax.Array:
    at = self.position(jnp.arange(vectors.shape[1]))
    first = self.token_type(jnp.zeros(1, jnp.int32))
    return self.norm(vectors.astype(at.dtype) + (at + first)[None])


class Encoder(nn.Module):
  """BERT's encoder.

  Attributes:
    config: its sizes.
    dtype: of the computation, parameters keep theirs; None takes theirs.
      Softmax and the statistics of layer norms are float32.
  """

  config: BertConfig
  dtype: Any = None

  def setup(self):
    """Names the parts."""
    c = self.config
    self.embeddings = _Embeddings(c, self.dtype)
    self.layers = [_Block(c, self.dtype) for _ in range(c.num_hidden_layers)]

  def __call__(self, words: jax.Array) -> jax.Array:
    """Returns hidden states `[N, L, D]`.

    Args:
      words: `[N, L]` indices; `PAD` where there is none.

    Raises:
      ValueError: where texts are longer than the config's positions.
    """
    return self.from_vectors(self.embeddings.word(words), present(words))

  def from_vectors(self, vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns hidden states `[N, L, D]`; reads no table of words.

    Args:
      vectors: `[N, L, D]` of the words.
      mask: `[N, L]` in [0, 1], how much of a word is there.

    Raises:
      ValueError: where texts are longer than the config's positions.
    """
    shape, most = vectors.shape, self.config.max_position_embeddings
    if shape[1] > most:
      raise ValueError(
        f'texts are of {shape[1]} words, the encoder reads {most}'
      )
    x = self.embeddings(vectors).reshape(-1, shape[-1])
    for layer in self.layers:
      x = layer(x, mask)
    return x.reshape(shape)


def present(words: jax.Array) -> jax.Array:
  """Returns which words are there, `[N, L]` float32 of `[N, L]` indices."""
  return (words != PAD).astype(jnp.float32)


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """Averages over the words of each text, as sentence encoders do.

  Args:
    hidden: `[N, L, D]`.
    mask: `[N, L]` in [0, 1], how much of a word is there.

  Returns:
    Features `[N, D]`.

  References:
    Reimers and Gurevych, `Sentence-BERT: Sentence Embeddings using Siamese
    BERT-Networks <https://arxiv.org/abs/1908.10084>`_, 2019
  """
  mask = mask.astype(hidden.dtype)[..., None]
  total = jnp.sum(mask * hidden, axis=1)
  return total / jnp.maximum(jnp.sum(mask, axis=1), 1e-6)


class Vectors(NamedTuple):
  """Texts in the form that adversaries of merges perturb: images in [0, 1].

  A text is an image `[L, 1, D + 1]`, a pixel a word: its vector, scaled by the
  smallest and the largest value that any word has in each dimension, and a last
  channel that is 1 where there is a word. A patch of `dam_jax.perturbations` is
  then a vector near to no word or to one, in a place of its own, or a word more
  at the end.

  Attributes:
    table: `[V, D]`, a vector a word, the same for all models.
    low: `[D]`.
    span: `[D]`.

  Examples:
    >>> vectors = Vectors.of(jnp.array([[0., 5.], [2., 1.], [4., 3.]]))
    >>> images = vectors.images(jnp.array([[2, 1, 0]]))
    >>> images.shape
    (1, 3, 1, 3)
    >>> own, mask = split(vectors.preprocess(images))
    >>> own[0].tolist(), mask[0].tolist()
    ([[4.0, 3.0], [2.0, 1.0], [0.0, 5.0]], [1.0, 1.0, 0.0])
  """

  table: jax.Array
  low: jax.Array
  span: jax.Array

  @classmethod
  def of(cls, table: jax.Array) -> 'Vectors':
    """Returns the form of a table `[V, D]`."""
    low, high = jnp.min(table, axis=0), jnp.max(table, axis=0)
    return cls(table, low, jnp.maximum(high - low, 1e-6))

  def images(self, words: jax.Array) -> jax.Array:
    """Returns `[..., L, 1, D + 1]` in [0, 1] of words `[..., L]`."""
    lead = (1,) * words.ndim
    low, span = (x.reshape(*lead, -1) for x in (self.low, self.span))
    scaled = (self.table[words] - low) / span
    mask = present(words)[..., None].astype(scaled.dtype)
    return jnp.concatenate([scaled, mask], axis=-1)[..., None, :]

  def preprocess(self, images: jax.Array) -> jax.Array:
    """Scales back to the vectors that the encoder reads, of the same shape."""
    lead = (1,) * (images.ndim - 1)
    low = jnp.append(self.low, 0).astype(images.dtype).reshape(*lead, -1)
    span = jnp.append(self.span, 1).astype(images.dtype).reshape(*lead, -1)
    return low + span * images


def split(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits what `Vectors.preprocess` gives.

  Args:
    pixels: `[..., L, 1, D + 1]`.

  Returns:
    Vectors `[..., L, D]` and mask `[..., L]`, as `Encoder.from_vectors` reads
    them.
  """
  return pixels[..., 0, :-1], pixels[..., 0, -1]
