"""Names and layouts of CLIP on the Hugging Face hub: its towers, and both.

>>> clip_vision.to_path('vision_model.encoder.layers.3.mlp.fc1.weight')
'layers_3/mlp/fc1/kernel'
>>> clip_vision.to_name('visual_projection/kernel')
'visual_projection.weight'
>>> clip.to_path('text_model.encoder.layers.3.mlp.fc1.weight')
'text/layers_3/mlp/fc1/kernel'
"""

from collections.abc import Sequence
import re

from dam_jax.checkpoint import NameMap

_VISION = [
  ('embeddings.class_embedding', 'embeddings/class_embedding'),
  ('embeddings.patch_embedding.weight', 'embeddings/patch_embedding'),
  ('embeddings.position_embedding.weight', 'embeddings/position_embedding'),
  ('pre_layrnorm.weight', 'pre_layernorm/scale'),
  ('pre_layrnorm.bias', 'pre_layernorm/bias'),
  ('post_layernorm.weight', 'post_layernorm/scale'),
  ('post_layernorm.bias', 'post_layernorm/bias'),
]
_TEXT = [
  ('embeddings.token_embedding.weight', 'embeddings/token_embedding'),
  ('embeddings.position_embedding.weight', 'embeddings/position_embedding'),
  ('final_layer_norm.weight', 'final_layer_norm/scale'),
  ('final_layer_norm.bias', 'final_layer_norm/bias'),
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
_BLOCK_TO_PATH = dict(_BLOCK)
_BLOCK_TO_NAME = {path: name for name, path in _BLOCK}


class _Tower(NameMap):
  """One tower's names, and kernels `[in, out]`."""

  def __init__(
    self,
    prefix: str,
    rules: Sequence[tuple[str, str]],
    *projection: str,
  ):
    self.ignored = (f'{prefix}embeddings.position_ids',)
    self._layers = f'{prefix}encoder.layers'
    self._to_path = {f'{prefix}{name}': path for name, path in rules}
    self._to_path |= {f'{name}.weight': f'{name}/kernel' for name in projection}
    self._to_name = {path: name for name, path in self._to_path.items()}

  def to_path(self, name: str) -> str | None:
    block = re.fullmatch(rf'{re.escape(self._layers)}\.(\d+)\.(.*)', name)
    if not block:
      return self._to_path.get(name)
    path = _BLOCK_TO_PATH.get(block[2])
    return path and f'layers_{block[1]}/{path}'

  def to_name(self, path: str) -> str | None:
    block = re.fullmatch(r'layers_(\d+)/(.*)', path)
    if not block:
      return self._to_name.get(path)
    name = _BLOCK_TO_NAME.get(block[2])
    return name and f'{self._layers}.{block[1]}.{name}'

  def axes(self, path: str) -> Sequence[int] | None:
    if path == 'embeddings/patch_embedding':
      return (2, 3, 1, 0)
    return (1, 0) if path.endswith('/kernel') else None


class _Clip(NameMap):
  """`CLIPModel`'s names: each tower's, its paths below the tower's name."""

  _SCALE = 'logit_scale'

  def __init__(self, **towers: NameMap):
    self._towers = towers
    self.ignored = [x for tower in towers.values() for x in tower.ignored]

  def to_path(self, name: str) -> str | None:
    if name == self._SCALE:
      return name
    found = {key: x.to_path(name) for key, x in self._towers.items()}
    return next((f'{key}/{x}' for key, x in found.items() if x), None)

  def to_name(self, path: str) -> str | None:
    if path == self._SCALE:
      return path
    key, _, own = path.partition('/')
    return self._towers[key].to_name(own) if key in self._towers else None

  def axes(self, path: str) -> Sequence[int] | None:
    key, _, own = path.partition('/')
    return self._towers[key].axes(own) if key in self._towers else None


clip_vision = _Tower('vision_model.', _VISION, 'visual_projection')
"""The map between `dam_jax.models.clip.VisionTower` and the hub's files."""

clip_vision_bare = _Tower('', _VISION)
"""The same of a `CLIPVisionModel` as transformers 5 writes it."""

clip_text = _Tower('text_model.', _TEXT, 'text_projection')
"""The map between `dam_jax.models.text.TextTower` and the hub's files."""

clip = _Clip(vision=clip_vision, text=clip_text)
"""The map between `dam_jax.models.towers.CLIP` and the hub's files."""
