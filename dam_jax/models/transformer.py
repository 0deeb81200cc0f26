"""What CLIP's two towers are made of: their blocks, in Flax.

Products go over `[N * tokens, width]`, which on a CPU are faster, backwards
above all, than over `[N, tokens, width]`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal['xla', 'cudnn']
"""Of `jax.nn.dot_product_attention`."""


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {'quick_gelu': _quick_gelu, 'gelu': _gelu}
"""Those of CLIP's MLPs, in Hugging Face's names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """Sizes that both towers have, in Hugging Face's names.

  Attributes:
    hidden_size: width of the residual stream.
    intermediate_size: width of the MLPs.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads of each block.
    projection_dim: of the features.
    hidden_act: 'quick_gelu' or 'gelu'.
    layer_norm_eps: added to variances.
    tower: 'vision' or 'text'.
  """

  tower: ClassVar[str]

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  projection_dim: int
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5

  def check(self, what: str) -> list[str]:
    """Returns a line for each choice that blocks cannot have.

    Args:
      what: the head of an error.

    Raises:
      ValueError: where sizes are not positive numbers (all of them).
    """
    lines = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      want, name = _KINDS.get(field.name, (int, 'a whole number'))
      if not isinstance(value, want) or isinstance(value, bool):
        lines.append(f'{field.name} must be {name}, got {value!r}')
      elif want is not str and not value > 0:
        lines.append(f'{field.name} must be positive, got {value}')
    raise_if(lines, what)
    if self.hidden_act not in ACTIVATIONS:
      lines.append(
        f'hidden_act must be one of {tuple(ACTIVATIONS)}, '
        f'got {self.hidden_act!r}'
      )
    if self.hidden_size % self.num_attention_heads:
      lines.append(
        f'hidden_size {self.hidden_size} does not divide into '
        f'{self.num_attention_heads} heads'
      )
    return lines


# Fields that are not whole numbers.
_KINDS: dict[str, tuple[Any, str]] = {
  'hidden_act': (str, 'a name'),
  'layer_norm_eps': ((int, float), 'a number'),
}


def raise_if(lines: Sequence[str], what: str) -> None:
  """Raises ValueError with all lines, if there is one."""
  if lines:
    raise ValueError('\n  '.join([f'{what}:', *lines]))


class _Attention(nn.Module):
  config: BlockConfig
  dtype: Any
  causal: bool
  attention: Implementation | None

  @nn.compact
  def __call__(self, x: jax.Array, queries: jax.Array, num: int) -> jax.Array:
    """Attends within each of `num` rows, `[num * tokens, width]`."""
    c = self.config
    heads, depth = c.num_attention_heads, c.hidden_size // c.num_attention_heads

    def project(x, name):
      y = nn.Dense(c.hidden_size, dtype=self.dtype, name=name)(x)
      return jnp.swapaxes(y.reshape(num, -1, heads, depth), 1, 2)

    q = project(queries, 'q_proj')
    k, v = project(x, 'k_proj'), project(x, 'v_proj')
    attend = _attend if self.attention is None else self._attend_by_jax
    y = jnp.swapaxes(attend(q, k, v, causal=self.causal), 1, 2)
    return nn.Dense(c.hidden_size, dtype=self.dtype, name='out_proj')(
      y.reshape(queries.shape)
    )

  def _attend_by_jax(self, q, k, v, *, causal):
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if self.attention == 'cudnn' and not half:
      raise ValueError(
        f'cudnn attends in bfloat16 or float16, the tower computes in {q.dtype}'
      )
    y = jax.nn.dot_product_attention(
      *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)),
      is_causal=causal,
      implementation=self.attention,
    )
    return jnp.swapaxes(y, 1, 2)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool):
  """Attends `[N, heads, tokens, depth]`, softmax in float32 at least."""
  scores = jnp.einsum('nhqd,nhkd->nhqk', q * q.shape[-1] ** -0.5, k)
  scores = scores.astype(np.promote_types(scores.dtype, np.float32))
  if causal:
    past = np.tri(scores.shape[2], dtype=bool)[None, None]
    scores = jnp.where(past, scores, jnp.finfo(scores.dtype).min)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum('nhqk,nhkd->nhqd', weights, v)


class _MLP(nn.Module):
  config: BlockConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    x = nn.Dense(c.intermediate_size, dtype=self.dtype, name='fc1')(x)
    # Gradients compute it again, see `layer_norm`.
    x = jax.checkpoint(ACTIVATIONS[c.hidden_act])(x)
    return nn.Dense(c.hidden_size, dtype=self.dtype, name='fc2')(x)


def first_tokens(x: jax.Array, tokens: int) -> jax.Array:
  """Takes the first token of each row, `[N * tokens, width]` to `[N, width]`.

  Not `x[::tokens]`, whose gradient is padded between its entries: libtpu 0.0.52
  aborts on that where a device has 16 rows of ViT-L/14.
  """
  return x.reshape(-1, tokens, x.shape[-1])[:, 0]


def layer_norm(config: BlockConfig, dtype: Any, name: str) -> nn.LayerNorm:
  """Makes a layer norm that gradients compute again from its input.

  Together with the activations' that saves a quarter of the memory and, on a
  CPU, a tenth of a step's time.
  """
  return nn.remat(nn.LayerNorm)(
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    use_fast_variance=False,
    name=name,
  )


class Block(nn.Module):
  """Attention and an MLP, each after a layer norm and added to what was.

  Attributes:
    config: its sizes.
    dtype: of the computation.
    tokens: of each row.
    causal: whether a token sees none that comes after it.
    every_token: whether to return them all, or each row's first alone.
    attention: None is this module's own; see `VisionTower`.
  """

  config: BlockConfig
  dtype: Any
  tokens: int
  causal: bool = False
  every_token: bool = True
  attention: Implementation | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[N * tokens, width]` to the same, or to the first token's alone."""
    c, dtype = self.config, self.dtype
    num = x.shape[0] // self.tokens
    y = layer_norm(c, dtype, 'layer_norm1')(x)
    queries = y
    if not self.every_token:
      x, queries = first_tokens(x, self.tokens), first_tokens(y, self.tokens)
    attend = _Attention(c, dtype, self.causal, self.attention, name='self_attn')
    x = x + attend(y, queries, num)
    y = layer_norm(c, dtype, 'layer_norm2')(x)
    return x + _MLP(c, dtype, name='mlp')(y)


def scan(blocks: Sequence[Block], x: jax.Array) -> jax.Array:
  """Applies blocks that are alike, compiled once, one after the other.

  Args:
    blocks: bound, with parameters; at least one.
    x: what the first one reads.

  Returns:
    What the last one returns.
  """
  each = [block.variables['params'] for block in blocks]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  one = blocks[0].clone(parent=None, name=None)

  def apply(x, params) -> tuple[Any, None]:
    return one.apply({'params': params}, x), None

  return jax.lax.scan(apply, x, stacked)[0]
