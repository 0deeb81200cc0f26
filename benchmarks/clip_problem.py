"""CLIPs to compare, their weights, inputs and a tokenizer of a few words.

Draws are the same in any environment. Imports neither JAX nor torch.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

_MERGES = ('o f</w>', 'c a', 'ca t</w>', 'd o', 'do g</w>', 'p h', 'ph o')
VOCABULARY = 2 * 256 + len(_MERGES) + 2
TEXTS = (
  'a photo of a cat.',
  "A  Dog's\n\tphoto, it'll be 2026!",
  '##',
  '',
  'caf\u00e9 cafe\u0301 \u732b \U0001f431 \u0130\u00df',
  'a <|endoftext|> in the <|startoftext|> text',
  'do cat-dogs of 3.5 kg see photos_of_cats?',
  'photo ' * 90,
)
"""What tokenizers may disagree on; the last one is too long."""


def _preset(patch: int, width: int, layers: int, text: int) -> dict[str, Any]:
  return {
    'projection_dim': text,
    'vision_config': {
      'hidden_size': width,
      'intermediate_size': 4 * width,
      'num_hidden_layers': layers,
      'num_attention_heads': width // 64,
      'image_size': 224,
      'patch_size': patch,
    },
    'text_config': {
      'hidden_size': text,
      'intermediate_size': 4 * text,
      'num_hidden_layers': 12,
      'num_attention_heads': text // 64,
    },
  }


def tiny(*, eos_token_id: int = VOCABULARY - 1, act: str = 'quick_gelu'):
  """Returns the config of a CLIP of 14,000 parameters."""
  common = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'hidden_act': act}
  return {
    'projection_dim': 6,
    'vision_config': {
      **{'hidden_size': 16, 'intermediate_size': 20, **common},
      **{'image_size': 6, 'patch_size': 3},
    },
    'text_config': {
      **{'hidden_size': 12, 'intermediate_size': 14, **common},
      **{'vocab_size': VOCABULARY, 'max_position_embeddings': 16},
      **{'bos_token_id': VOCABULARY - 2, 'eos_token_id': eos_token_id},
    },
  }


SIZES: dict[str, dict[str, Any]] = {
  'tiny': tiny(),
  'vit_b32': _preset(32, 768, 12, 512),
  'vit_b16': _preset(16, 768, 12, 512),
  'vit_l14': _preset(14, 1024, 24, 768),
}
"""Configs of `CLIPModel`, less what are its defaults."""

GOLDEN = {
  'new': tiny(),
  'legacy': tiny(eos_token_id=2, act='gelu'),
}
"""Configs of tests/models/clip_golden.npz."""


def leaf(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Returns float32 entries of a tensor, large enough to tell inputs apart."""
  rng = np.random.default_rng([seed, *name.encode()])
  values = rng.uniform(-1, 1, size=shape)
  if not shape:
    values = 2 + values  # the logarithm of a scale
  elif len(shape) == 1 and 'embedding' not in name:
    values = values / 4 + name.endswith('weight')
  elif 'embedding' not in name:
    values /= np.sqrt(np.prod(shape[1:]) / 3)
  return np.asarray(values, np.float32)


def inputs(config: Mapping[str, Any], num: int) -> dict[str, np.ndarray]:
  """Returns what CLIPs read, and what their outputs are multiplied by.

  That is `pixels` `[num, H, W, 3]`, `tokens` `[num, L]`, and `by/images`,
  `by/texts` and `by/logits`: a weighted sum has a gradient in every output,
  whereas CLIP's own loss takes differences, of logits that random towers make
  nearly alike.
  """
  rng = np.random.default_rng([7, num])
  side = config['vision_config']['image_size']
  text = config['text_config']
  length = text.get('max_position_embeddings', 77)
  end = text.get('vocab_size', 49408) - 1
  tokens = np.full((num, length), end, np.int32)
  for row, size in zip(tokens, rng.integers(3, length, num), strict=True):
    row[1 : size - 1] = rng.integers(0, end - 1, size - 2)
  tokens[:, 0] = end - 1
  tokens[0, 1] = 2  # the end that files name wrongly, here a word
  drawn = {'pixels': rng.normal(size=(num, side, side, 3))}
  for name in ('images', 'texts'):
    drawn[f'by/{name}'] = rng.normal(size=(num, config['projection_dim']))
  drawn['by/logits'] = rng.normal(size=(num, num))
  return {
    'tokens': tokens,
    **{name: x.astype(np.float32) for name, x in drawn.items()},
  }


def write_tokenizer(folder: Path) -> None:
  """Writes vocab.json and merges.txt of a byte-level vocabulary."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, *(f'{x}</w>' for x in letters)]
  words += [''.join(merge.split()) for merge in _MERGES]
  words += ['<|startoftext|>', '<|endoftext|>']
  folder.mkdir(parents=True, exist_ok=True)
  vocabulary = {word: i for i, word in enumerate(words)}
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  merges = '\n'.join(['#version: 0.2', *_MERGES, ''])
  (folder / 'merges.txt').write_text(merges)
