"""What lies beside a Hugging Face model's weights, carried to a merged one."""

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
  source: pathlib.Path, target: pathlib.Path, dtype: str | None
) -> None:
  """Copies config, tokenizer, processor, chat templates and licences.

  The code of models that bring their own is copied where config.json names it.
  What is left is logged.

  Args:
    source: folder of a model.
    target: folder to copy to.
    dtype: what config.json is to say of the weights; None leaves it.

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
  if found and dtype is not None:
    text = json.dumps(_with_dtype(found, dtype), indent=2)
    (target / 'config.json').write_text(text + '\n')


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
  """Puts the dtype where a config and the configs in it have one."""

  def put(key, value):
    if key in _DTYPE_KEYS and isinstance(value, str):
      return dtype
    inner = isinstance(value, dict) and key != 'quantization_config'
    return _with_dtype(value, dtype) if inner else value

  return {key: put(key, value) for key, value in config.items()}
