"""Sizes of CLIP's towers as Hugging Face's config.json has them."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, TypeVar

from etils import epath

from dam_jax.checkpoint.headers import read_json
from dam_jax.models.transformer import BlockConfig

Config = TypeVar('Config', bound=BlockConfig)

# By the model_type of a tower's own config: its key in a whole CLIP's, and
# what transformers takes for a key that a file leaves out.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
  'clip_vision_model': (
    'vision_config',
    {
      'hidden_size': 768,
      'intermediate_size': 3072,
      'num_hidden_layers': 12,
      'num_attention_heads': 12,
      'image_size': 224,
      'patch_size': 32,
      'projection_dim': 512,
    },
  ),
  'clip_text_model': (
    'text_config',
    {
      'hidden_size': 512,
      'intermediate_size': 2048,
      'num_hidden_layers': 12,
      'num_attention_heads': 8,
      'vocab_size': 49408,
      'max_position_embeddings': 77,
      'eos_token_id': 49407,
      'projection_dim': 512,
    },
  ),
}


def load(path: epath.PathLike) -> dict[str, Any]:
  """Reads a config.json of CLIP.

  Args:
    path: of it.

  Returns:
    What it holds.

  Raises:
    ValueError: where it cannot be read or is of another kind of model.
  """
  raw = read_json(pathlib.Path(path))
  known = (None, 'clip', *_KINDS)
  if raw.get('model_type') not in known:
    raise ValueError(
      f'{path} is of a model_type {raw["model_type"]!r}, want one of '
      f'{known[1:]}'
    )
  return raw


def tower(
  raw: Mapping[str, Any], kind: type[Config], *, where: epath.PathLike
) -> Config:
  """Returns the sizes of one tower.

  What transformers' files leave out has transformers' defaults; files that do
  not say of which model they are must have all sizes.

  Args:
    raw: of a tower or a whole CLIP, from `load`.
    kind: of the sizes.
    where: the file, for errors.

  Raises:
    ValueError: where it is of another tower, or lacks something; with all that
      is wrong.
  """
  own = f'clip_{kind.tower}_model'
  key, defaults = _KINDS[own]
  model = raw.get('model_type')
  if model not in (None, 'clip', own):
    raise ValueError(f'{where} is of a {model}, want a {own} or a whole CLIP')
  whole = model == 'clip' or key in raw
  found = dict(raw.get(key) or {}) if whole else dict(raw)
  before = raw.get(f'{key}_dict') if whole else None
  if before is not None:  # in files of 2022; its defaults win, too
    found |= {**defaults, **before}
  if model or found.get('model_type'):
    found = {**defaults, **found}
  if whole and (model or 'projection_dim' in raw):
    size = raw.get('projection_dim', defaults['projection_dim'])
    found['projection_dim'] = size
  fields = dataclasses.fields(kind)
  missing = [
    f.name
    for f in fields
    if f.default is dataclasses.MISSING and f.name not in found
  ]
  if missing:
    raise ValueError(f'{where} lacks {", ".join(missing)}')
  return kind(**{f.name: found[f.name] for f in fields if f.name in found})


def read(path: epath.PathLike, kind: type[Config]) -> Config:
  """Reads the sizes of one tower from a config.json, as `tower` takes them."""
  return tower(load(path), kind, where=path)


def written(config: BlockConfig) -> dict[str, Any]:
  """Returns a tower's sizes as its part of a config.json."""
  model = f'clip_{config.tower}_model'
  return {'model_type': model, **dataclasses.asdict(config)}
