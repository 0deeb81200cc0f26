"""The folders of Hugging Face's PEFT: LoRAs read and written."""

import collections
from collections.abc import Mapping
import dataclasses
import json
import math
import pathlib
import re
import tempfile
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dam_jax.checkpoint import headers
from dam_jax.checkpoint import models
from dam_jax.checkpoint.lora import Factors
from dam_jax.checkpoint.lora import Full
from dam_jax.checkpoint.lora import Lora

_CONFIG, _FILE = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_SUFFIXES = {
  'linear': ('.lora_A.weight', '.lora_B.weight'),
  'embedding': ('.lora_embedding_A', '.lora_embedding_B'),
}
_FACTOR = re.compile(
  r'base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))'
)
# What a config may say without changing what the factors mean.
_HARMLESS = {
  'alpha_pattern',
  'auto_mapping',
  'base_model_name_or_path',
  'bias',
  'corda_config',
  'ensure_weight_tying',
  'eva_config',
  'exclude_modules',
  'fan_in_fan_out',
  'inference_mode',
  'init_lora_weights',
  'layers_pattern',
  'layers_to_transform',
  'loftq_config',
  'lora_alpha',
  'lora_dropout',
  'lora_ga_config',
  'megatron_core',
  'modules_to_save',
  'peft_type',
  'peft_version',
  'qalora_group_size',
  'r',
  'rank_pattern',
  'revision',
  'target_modules',
  'task_type',
  'use_rslora',
  'velora_config',
}
# Other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base.
_INITS = (True, False, None, 'eva', 'gaussian', 'mica', 'orthogonal')


def open_lora(
  path: epath.PathLike, *, name_map: headers.NameMap = headers.PATHS
) -> Lora:
  """Reads a PEFT folder.

  Args:
    path: of the folder, with adapter_config.json and adapter_model.safetensors.
    name_map: the base's names and layouts.

  Returns:
    The updates by the paths of the base's leaves, memory-mapped.

  Raises:
    ValueError: where a file cannot be read, the method is not plain LoRA, a
      tensor is not of a LoRA, or ranks are not what the config says; with all
      that is wrong.
  """
  folder = pathlib.Path(path)
  config = headers.read_json(folder / _CONFIG)
  _check_config(config, folder / _CONFIG)
  file, pickle = folder / _FILE, folder / 'adapter_model.bin'
  if not file.exists() and pickle.exists():
    raise ValueError(headers.pickled(pickle))
  model = models.open_model(file)
  lines: list[str] = []
  full: dict[str, Full] = {}
  pairs: dict[tuple[str, str], dict[str, np.ndarray]] = {}
  for path in model.leaves:
    name = path.replace('/', '.')
    factor = _FACTOR.fullmatch(name)
    if factor:
      kind = 'linear' if factor[2] else 'embedding'
      pair = pairs.setdefault((factor[1], kind), {})
      pair[factor[2] or factor[3]] = model.read(path)
    elif '.original_module.' not in name:  # the base's own, saved once more
      leaf = _full_leaf(name, name_map)
      if leaf is None:
        lines.append(f'{name}: unexpected tensor')
      else:
        axes, value = _axes(name_map, leaf), model.read(path)
        value = value if axes is None else value.transpose(axes)
        full[leaf] = Full(value=value, name=name, axes=axes)
  factors: dict[str, Factors] = {}
  for (module, kind), pair in pairs.items():
    leaf = name_map.to_path(f'{module}.weight')
    if leaf is None or len(pair) < 2:
      lines.append(f'{module}: want lora_A, lora_B and a leaf of the base')
      continue
    made = _factors(module, kind, pair['A'], pair['B'], config)
    if isinstance(made, str):
      lines.append(made)
    else:
      axes = _axes(name_map, leaf)
      factors[leaf] = dataclasses.replace(made, axes=axes)
  headers.raise_if(lines, f'{file}: not a plain LoRA:')
  return Lora(
    factors=factors,
    full=full,
    config=config,
    files=(file, folder / _CONFIG),
    folder=folder,
  )


def _check_config(config: Mapping[str, Any], path: pathlib.Path) -> None:
  """Raises unless a config is that of a plain LoRA."""
  if config.get('peft_type') != 'LORA':
    raise ValueError(f'{path}: want LORA, got {config.get("peft_type")!r}')
  lines = [
    f'{key} is {value!r}, which is not supported'
    for key, value in config.items()
    if key not in _HARMLESS and value
  ]
  if config.get('bias', 'none') != 'none':
    lines.append(f'bias is {config["bias"]!r}, want none')
  init = config.get('init_lora_weights', True)
  if init not in _INITS:
    lines.append(
      f'init_lora_weights is {init!r}, which changes the base: save it again '
      'with path_initial_model_for_weight_conversion'
    )
  headers.raise_if(lines, f'{path}: not a plain LoRA:')


def _full_leaf(name: str, name_map: headers.NameMap) -> str | None:
  """Returns the path of a leaf that is held in full, or None if unknown."""
  if not name.startswith(_PREFIX) or '.lora_' in name:
    return None
  name = name.removeprefix(_PREFIX)
  for wrapper in ('.modules_to_save.', '.base_layer.'):
    name = name.replace(wrapper, '.')
  return name_map.to_path(name)


def _axes(name_map: headers.NameMap, leaf: str) -> tuple[int, ...] | None:
  axes = name_map.axes(leaf)
  return None if axes is None else tuple(axes)


def _of_module(
  config: Mapping[str, Any], key: str, patterns: str, module: str
) -> Any:
  """Returns a module's rank or alpha as PEFT does: the first pattern counts."""
  for pattern, value in (config.get(patterns) or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return config.get(key, 8)


def _factors(
  module: str,
  kind: str,
  a: np.ndarray,
  b: np.ndarray,
  config: Mapping[str, Any],
) -> Factors | str:
  """Makes a module's factors, or says what is wrong with them."""
  r = _of_module(config, 'r', 'rank_pattern', module)
  alpha = _of_module(config, 'lora_alpha', 'alpha_pattern', module)
  # A convolution's B is of one pixel.
  fits = a.ndim >= 2 and b.ndim == a.ndim and math.prod(b.shape[2:]) == 1
  fits &= all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b))
  if not fits or not a.shape[0] == b.shape[1] == r:
    shapes = f'A {a.dtype}{list(a.shape)}, B {b.dtype}{list(b.shape)}'
    return f'{module}: {shapes} do not fit rank {r}'
  return Factors(
    a=a.reshape(r, -1),
    b=b.reshape(-1, r),
    scaling=alpha / r ** (0.5 if config.get('use_rslora') else 1),
    module=module,
    kind=kind,
    inner=a.shape[1:],
  )


def save_lora(
  folder: epath.PathLike, lora: Lora, *, like: Lora | None = None
) -> None:
  """Writes a PEFT folder, at once or not at all.

  Args:
    folder: to be made.
    lora: updates.
    like: whose config is written, with the ranks, alphas and modules that the
      updates have; None is `lora`.

  Raises:
    ValueError: where the folder exists.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise ValueError(f'{folder} exists')
  tensors = {}
  for f in lora.factors.values():
    kernel = (1,) * (len(f.inner) - 1)
    names = (f'{_PREFIX}{f.module}{suffix}' for suffix in _SUFFIXES[f.kind])
    shapes = (f.rank, *f.inner), (*f.b.shape, *kernel)
    for name, factor, shape in zip(names, (f.a, f.b), shapes, strict=True):
      tensors[name] = np.asarray(factor.reshape(shape), order='C')
  for held in lora.full.values():
    value = held.value
    if held.axes is not None:
      value = value.transpose(np.argsort(held.axes))
    tensors[held.name] = np.asarray(value, order='C')
  config = _config_of(lora, like or lora)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    made = pathlib.Path(temporary) / folder.name
    made.mkdir()
    save_file(tensors, made / _FILE, metadata={'format': 'pt'})
    text = json.dumps(config, indent=2, sort_keys=True)
    (made / _CONFIG).write_text(text + '\n')
    made.rename(folder)


def _config_of(lora: Lora, like: Lora) -> dict[str, Any]:
  """Returns the config with which PEFT reads these factors as they are."""
  power = 0.5 if like.config.get('use_rslora') else 1
  ranks = {f.module: f.rank for f in lora.factors.values()}
  alphas = {
    f.module: _whole(f.scaling * f.rank**power) for f in lora.factors.values()
  }
  usual = {
    key: collections.Counter(values.values()).most_common(1)[0][0]
    for key, values in (('r', ranks), ('lora_alpha', alphas))
    if values
  }

  def patterns(values, default):
    return {
      f'^{re.escape(module)}': value
      for module, value in values.items()
      if value != default
    }

  return {
    **like.config,
    **usual,
    'rank_pattern': patterns(ranks, usual.get('r')),
    'alpha_pattern': patterns(alphas, usual.get('lora_alpha')),
    'target_modules': sorted(ranks),
    'exclude_modules': None,
    'layers_pattern': None,
    'layers_to_transform': None,
    'init_lora_weights': True,
    'modules_to_save': like.config.get('modules_to_save')
    if lora.full
    else None,
  }


def _whole(x: float) -> float:
  """Returns an integer where rounding alone is between it and `x`."""
  return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x
