"""How a tower's class token attends, for attacks that aim at it.

>>> import jax
>>> import jax.numpy as jnp
>>> from dam_jax.models import clip
>>> config = clip.VisionConfig(
...     hidden_size=8, intermediate_size=16, num_hidden_layers=3,
...     num_attention_heads=2, image_size=4, patch_size=2, projection_dim=6)
>>> tower = clip.VisionTower(config)
>>> pixels = clip.normalize(jnp.zeros((5, 4, 4, 3)))
>>> params = jax.jit(tower.init)(jax.random.key(0), pixels)['params']
>>> jax.jit(class_attention(tower))(params, pixels).shape  # four patches
(3, 5, 2, 4)
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dam_jax.models.clip import VisionTower

AttentionFn = Callable[[Any, jax.Array], jax.Array]
"""`(params, pixels [N, H, W, C]) -> weights [layers, N, heads, patches]`."""


def class_attention(tower: VisionTower) -> AttentionFn:
  """Makes what the class token attends to in each block.

  Args:
    tower: of whose config and dtype.

  Returns:
    `(params, pixels [N, H, W, C]) -> [layers, N, heads, patches]`, float32, the
    patches in reading order; with what it attends to itself, weights sum to 1.
  """
  # Activations could not leave a loop over blocks, or what is computed again.
  tower = tower.clone(scan_layers=False, remat=False)
  heads = tower.config.num_attention_heads

  def attention_fn(params: Any, pixels: jax.Array) -> jax.Array:
    found: dict[str, list[jax.Array]] = {'q_proj': [], 'k_proj': []}

    def keep(layer, args, kwargs, context):
      y = layer(*args, **kwargs)
      if context.module.name in found and context.method_name == '__call__':
        found[context.module.name].append(
          y.reshape(len(pixels), -1, heads, y.shape[-1] // heads)
        )
      return y

    with nn.intercept_methods(keep):
      tower.apply({'params': params}, pixels)
    rows = []
    for q, k in zip(found['q_proj'], found['k_proj'], strict=True):
      scores = jnp.einsum('nhd,nkhd->nhk', q[:, 0], k) * q.shape[-1] ** -0.5
      rows.append(jax.nn.softmax(scores.astype(jnp.float32))[..., 1:])
    return jnp.stack(rows)

  return attention_fn
