"""Names and layouts of encoders on the Hugging Face hub.

>>> clip_vision.to_path('vision_model.encoder.layers.3.mlp.fc1.weight')
'layers_3/mlp/fc1/kernel'
>>> clip_vision.to_name('visual_projection/kernel')
'visual_projection.weight'
>>> clip.to_path('text_model.encoder.layers.3.mlp.fc1.weight')
'text/layers_3/mlp/fc1/kernel'
>>> bert.to_path('encoder.layer.3.attention.self.query.weight')
'layers_3/attention/query/kernel'
"""

from collections.abc import Mapping, Sequence
import re
from types import MappingProxyType

from dam_jax.checkpoint import NameMap

# Names and paths.
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
_CLIP_BLOCK = [
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
_BERT_RULES = [
  *[
    (f'embeddings.{kind}_embeddings.weight', f'embeddings/{kind}/embedding')
    for kind in ('word', 'position', 'token_type')
  ],
  ('embeddings.LayerNorm.weight', 'embeddings/norm/scale'),
  ('embeddings.LayerNorm.bias', 'embeddings/norm/bias'),
]
_BERT_BLOCK = [
  *[
    (f'{theirs}.{kind}', f'{ours}/{leaf}')
    for theirs, ours in (
      ('attention.self.query', 'attention/query'),
      ('attention.self.key', 'attention/key'),
      ('attention.self.value', 'attention/value'),
      ('attention.output.dense', 'attention/out'),
      ('intermediate.dense', 'fc1'),
      ('output.dense', 'fc2'),
    )
    for kind, leaf in (('weight', 'kernel'), ('bias', 'bias'))
  ],
  *[
    (f'{theirs}.{kind}', f'{ours}/{leaf}')
    for theirs, ours in (
      ('attention.output.LayerNorm', 'attention_norm'),
      ('output.LayerNorm', 'mlp_norm'),
    )
    for kind, leaf in (('weight', 'scale'), ('bias', 'bias'))
  ],
]


class _Blocks(NameMap):
  """Names of an encoder of numbered blocks, and kernels `[in, out]`.

  Args:
    prefix: of the blocks' names, before the number.
    rules: names and paths outside of blocks.
    block: names and paths inside of one.
    turned: axes of leaves by path, beside kernels.
    ignored: names of tensors that are not read.
  """

  def __init__(
    self,
    prefix: str,
    rules: Sequence[tuple[str, str]],
    block: Sequence[tuple[str, str]],
    *,
    turned: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ignored: Sequence[str] = (),
  ):
    self.ignored = ignored
    self._prefix, self._turned = prefix, turned
    self._to_path, self._block_to_path = dict(rules), dict(block)
    self._to_name = {path: name for name, path in rules}
    self._block_to_name = {path: name for name, path in block}

  def to_path(self, name: str) -> str | None:
    block = re.fullmatch(rf'{re.escape(self._prefix)}(\d+)\.(.*)', name)
    if not block:
      return self._to_path.get(name)
    path = self._block_to_path.get(block[2])
    return path and f'layers_{block[1]}/{path}'

  def to_name(self, path: str) -> str | None:
    block = re.fullmatch(r'layers_(\d+)/(.*)', path)
    if not block:
      return self._to_name.get(path)
    name = self._block_to_name.get(block[2])
    return name and f'{self._prefix}{block[1]}.{name}'

  def axes(self, path: str) -> Sequence[int] | None:
    if path in self._turned:
      return self._turned[path]
    return (1, 0) if path.endswith('/kernel') else None


def _tower(
  prefix: str, rules: Sequence[tuple[str, str]], *projection: str
) -> _Blocks:
  """Returns the names of one of CLIP's towers."""
  return _Blocks(
    f'{prefix}encoder.layers.',
    [
      *((f'{prefix}{name}', path) for name, path in rules),
      *((f'{name}.weight', f'{name}/kernel') for name in projection),
    ],
    _CLIP_BLOCK,
    turned={'embeddings/patch_embedding': (2, 3, 1, 0)},
    ignored=(f'{prefix}embeddings.position_ids',),
  )


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


clip_vision = _tower('vision_model.', _VISION, 'visual_projection')
"""The map between `dam_jax.models.clip.VisionTower` and the hub's files."""

clip_vision_bare = _tower('', _VISION)
"""The same of a `CLIPVisionModel` as transformers 5 writes it."""

clip_text = _tower('text_model.', _TEXT, 'text_projection')
"""The map between `dam_jax.models.text.TextTower` and the hub's files."""

clip = _Clip(vision=clip_vision, text=clip_text)
"""The map between `dam_jax.models.towers.CLIP` and the hub's files."""

bert = _Blocks(
  'encoder.layer.',
  _BERT_RULES,
  _BERT_BLOCK,
  ignored=(
    'embeddings.position_ids',
    'pooler.dense.weight',
    'pooler.dense.bias',
  ),
)
"""`BertModel`'s names without its pooler, `dam_jax.models.bert.Encoder`'s
paths."""
