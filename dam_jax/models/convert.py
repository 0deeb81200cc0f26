"""Names and layouts of CLIP image towers on the Hugging Face hub.

>>> clip_vision.to_path('vision_model.encoder.layers.3.mlp.fc1.weight')
'layers_3/mlp/fc1/kernel'
>>> clip_vision.to_name('visual_projection/kernel')
'visual_projection.weight'
"""

from collections.abc import Sequence
import re

from dam_jax.checkpoint import NameMap

# Regular expressions for both directions; `{}` stands for a number or a name.
_RULES = [
  ('vision_model.embeddings.class_embedding', 'embeddings/class_embedding'),
  (
    'vision_model.embeddings.patch_embedding.weight',
    'embeddings/patch_embedding',
  ),
  (
    'vision_model.embeddings.position_embedding.weight',
    'embeddings/position_embedding',
  ),
  ('vision_model.pre_layrnorm.weight', 'pre_layernorm/scale'),
  ('vision_model.pre_layrnorm.bias', 'pre_layernorm/bias'),
  ('vision_model.post_layernorm.weight', 'post_layernorm/scale'),
  ('vision_model.post_layernorm.bias', 'post_layernorm/bias'),
  ('visual_projection.weight', 'visual_projection/kernel'),
]
_BLOCK = [
  *[
    (f'layer_norm{i}.{theirs}', f'layer_norm{i}/{ours}')
    for i in (1, 2)
    for theirs, ours in (('weight', 'scale'), ('bias', 'bias'))
  ],
  *[
    (f'{module}.{layer}.{theirs}', f'{module}/{layer}/{ours}')
    for module, layers in (
      ('self_attn', ('q_proj', 'k_proj', 'v_proj', 'out_proj')),
      ('mlp', ('fc1', 'fc2')),
    )
    for layer in layers
    for theirs, ours in (('weight', 'kernel'), ('bias', 'bias'))
  ],
]
_TO_PATH = dict(_RULES)
_TO_NAME = {path: name for name, path in _RULES}
_BLOCK_TO_PATH = dict(_BLOCK)
_BLOCK_TO_NAME = {path: name for name, path in _BLOCK}


class _ClipVision(NameMap):
  """`CLIPVisionModelWithProjection`'s names, and kernels `[in, out]`."""

  ignored = ('vision_model.embeddings.position_ids',)

  def to_path(self, name: str) -> str | None:
    block = re.fullmatch(r'vision_model\.encoder\.layers\.(\d+)\.(.*)', name)
    if not block:
      return _TO_PATH.get(name)
    path = _BLOCK_TO_PATH.get(block[2])
    return path and f'layers_{block[1]}/{path}'

  def to_name(self, path: str) -> str | None:
    block = re.fullmatch(r'layers_(\d+)/(.*)', path)
    if not block:
      return _TO_NAME.get(path)
    name = _BLOCK_TO_NAME.get(block[2])
    return name and f'vision_model.encoder.layers.{block[1]}.{name}'

  def axes(self, path: str) -> Sequence[int] | None:
    if path == 'embeddings/patch_embedding':
      return (2, 3, 1, 0)
    return (1, 0) if path.endswith('/kernel') else None


clip_vision = _ClipVision()
"""The map between `dam_jax.models.clip.VisionTower` and the hub's files."""
