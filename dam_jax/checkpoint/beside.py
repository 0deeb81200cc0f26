"""What lies beside a Hugging Face model's weights, carried to a merged one."""

from collections.abc import Mapping
import fnmatch
import json
import pathlib
import shutil
from typing import Any

from absl import logging

from dam_jax.checkpoint import headers

_CARRIED = (
  'config.json',
  'generation_config.json',
  # Tokenizers.
  '*tokenizer*',
  'special_tokens_map.json',
  'added_tokens.json',
  '*vocab*',
  'merges.txt',
  'normalizer.json',
  '*.model',
  '*.spm',
  '*.codes',
  '*.tiktoken',
  # Processors and chat templates.
  '*processor_config.json',
  'chat_template*',
  'additional_chat_templates',
  # What licences want to travel with the weights.
  'LICENSE*',
  'LICENCE*',
  'NOTICE*',
  'USE_POLICY*',
)
_DTYPE_KEYS = ('dtype', 'torch_dtype')


def carry(
  source: pathlib.Path,
  target: pathlib.Path,
  dtype: str | None,
  vocab_sizes: Mapping[int, int],
) -> None:
  """Copies config, tokenizer, processor, chat templates and licences.

  The code of models that bring their own is copied where config.json names it.
  What is left is logged.

  Args:
    source: folder of a model.
    target: folder to copy to.
    dtype: what config.json is to say of the weights; None leaves it.
    vocab_sizes: what each vocab_size in config.json becomes; others stay.

  Raises:
    ValueError: where config.json is no JSON object.
  """
  config = source / 'config.json'
  found = headers.read_json(config) if config.exists() else {}
  patterns = (*_CARRIED, '*.py') if 'auto_map' in found else _CARRIED
  left = []
  for path in sorted(source.iterdir()):
    wanted = any(fnmatch.fnmatchcase(path.name, p) for p in patterns)
    if not wanted or headers.is_pickle(path):
      left.append(path.name)
    elif path.is_dir():
      shutil.copytree(path, target / path.name)
    else:
      shutil.copyfile(path, target / path.name)
  logging.info('not carried from %s: %s', source, ', '.join(left))
  changed = _changed(found, dtype, vocab_sizes)
  if changed != found:
    text = json.dumps(changed, indent=2)
    (target / 'config.json').write_text(text + '\n')


def _changed(
  config: dict[str, Any], dtype: str | None, vocab_sizes: Mapping[int, int]
) -> dict[str, Any]:
  """Changes what a config and the configs in it say of the weights."""

  def put(key, value):
    if key in _DTYPE_KEYS and isinstance(value, str):
      return dtype or value
    if key == 'vocab_size' and isinstance(value, int):
      return vocab_sizes.get(value, value)
    inner = isinstance(value, dict) and key != 'quantization_config'
    return _changed(value, dtype, vocab_sizes) if inner else value

  return {key: put(key, value) for key, value in config.items()}
