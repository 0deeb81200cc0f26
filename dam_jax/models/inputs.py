"""What the linear layers of CLIP's image tower read, for RegMean.

>>> import jax
>>> import jax.numpy as jnp
>>> from dam_jax.models import clip
>>> config = clip.VisionConfig(
...     hidden_size=8, intermediate_size=16, num_hidden_layers=1,
...     num_attention_heads=2, image_size=4, patch_size=2, projection_dim=6)
>>> tower = clip.VisionTower(config)
>>> pixels = clip.normalize(jnp.zeros((3, 4, 4, 3)))
>>> params = jax.jit(tower.init)(jax.random.key(0), pixels)['params']
>>> found = jax.jit(dense_inputs(tower))(params, 0, pixels)
>>> found['layers_0/mlp/fc2/kernel'].shape  # three images of five tokens
(15, 16)
"""

from typing import Any

from flax import linen as nn
import jax

from dam_jax.models.clip import VisionConfig
from dam_jax.models.clip import VisionTower
from dam_jax.typing import InputsFn


def dense_inputs(tower: VisionTower) -> InputsFn:
  """Makes what a forward pass gives to each dense layer of a tower.

  A row is a token. The last block reads all of them, as the published methods
  have it, not the class token alone.

  Args:
    tower: of whose config and dtype.

  Returns:
    `(params, task, pixels [N, H, W, C]) -> inputs [rows, in]` by the path of
    the kernel `[in, out]`: of the attention's four projections and both layers
    of the MLP in each block, and of the last projection.
  """
  # Activations could not leave a loop over blocks, or what is computed again.
  tower = tower.clone(every_token=True, scan_layers=False, remat=False)

  def inputs_fn(params: Any, task: Any, images: jax.Array):
    del task
    found: dict[str, jax.Array] = {}

    def keep(layer, args, kwargs, context):
      module = context.module
      if isinstance(module, nn.Dense) and context.method_name == '__call__':
        x = args[0].reshape(-1, args[0].shape[-1])
        found['/'.join((*module.path, 'kernel'))] = x
      return layer(*args, **kwargs)

    with nn.intercept_methods(keep):
      tower.apply({'params': params}, images)
    return found

  return inputs_fn


def levels(config: VisionConfig) -> list[str]:
  """Returns the levels of a tower's leaves, for `dam_jax.regmean_plus_plus`.

  Args:
    config: of the tower.

  Returns:
    A regular expression a block, and one for what comes after the last. What
    comes before the first has no dense layer and is of no level.

  Examples:
    >>> from dam_jax.models import clip
    >>> levels(clip.VIT_B32)[-2:]
    ['layers_11/.*', '(post_layernorm|visual_projection)/.*']
  """
  blocks = [rf'layers_{i}/.*' for i in range(config.num_hidden_layers)]
  return [*blocks, '(post_layernorm|visual_projection)/.*']
