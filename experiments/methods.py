"""Every merge that experiments know by name, and what its options are.

A name says the method and, where there is a choice, what coefficients the task
vectors get: `_task_arithmetic` fixed ones, `_task_wise` one a task,
`_layer_wise` (or no suffix, for DAM) one a task and leaf.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import typing
from typing import Any

from ml_collections import config_dict

import dam_jax as dj
from dam_jax import catalogue
from experiments import repairs
from experiments import settings

STATIC = ('average', 'task_arithmetic', 'ties', 'dare', 'slerp')
"""Names of the merges without data that papers compare with most."""

DATA_FREE = {
  name: entry.factory
  for name, entry in catalogue.DATA_FREE.items()
  if name != 'weighted_average'  # its weights have no default
}
"""Builders of transformations of task vectors, by name."""

_GRANULARITIES = {
  'task_arithmetic': 'arithmetic',
  'task_wise': 'task',
  'layer_wise': 'leaf',
}


def _learned() -> dict[str, Callable[..., dj.Merger]]:
  families = {
    'adamerging': (dj.adamerging, ('task_wise', 'layer_wise')),
    'concrete': (dj.concrete, tuple(_GRANULARITIES)),
    'dam_released': (dj.dam_released, ('', 'task_arithmetic', 'task_wise')),
    'dam_paper': (dj.dam_paper, ('', 'task_arithmetic', 'task_wise')),
    'dam_robust': (dj.dam_robust, ('', 'task_arithmetic', 'task_wise')),
  }
  return {
    f'{family}_{suffix}'.rstrip('_'): functools.partial(
      build, granularity=_GRANULARITIES.get(suffix, 'leaf')
    )
    for family, (build, suffixes) in families.items()
    for suffix in suffixes
  }


LEARNED = _learned()
"""Builders of mergers that learn on unlabelled images, by name."""

INFORMED: dict[str, Callable[..., dj.Merger]] = {
  'fisher': dj.fisher,
  'regmean': dj.regmean,
  'regmean_plus_plus': dj.regmean_plus_plus,
}
"""Builders of mergers that weigh by statistics of unlabelled images, by name.

A step only reads a batch, and `steps` of them make a pass.
"""

REPAIRS = repairs.BUILDERS
"""Builders of defences, most of which repair the plain merge, by name.

`experiments.repairs` makes mergers of them.
"""

_BUILDERS: dict[str, Callable[..., Any]] = {
  **DATA_FREE,
  **LEARNED,
  **INFORMED,
  **REPAIRS,
}

ALL = tuple(_BUILDERS)
"""All names."""

BATCH = {'dam_robust': 4}
"""Images a task and draw, where a family departs from the config's `batch`."""


def parse(names: str, num_experts: int) -> list[str]:
  """Reads a list of methods.

  Args:
    names: names with commas between them. 'static' is the usual merges without
      data, 'data_free' all of them, 'informed' those that weigh by statistics
      of images, 'learned' those that learn on images, 'repairs' defences of
      the plain merge, and 'all' everything; each leaves out what needs another
      number of experts.
    num_experts: `K`.

  Returns:
    Names without duplicates, in the order given.

  Raises:
    ValueError: where a name is unknown, with all that are allowed, or a method
      does not take `K` experts.

  Examples:
    >>> parse('ties,static', num_experts=6)
    ['ties', 'average', 'task_arithmetic', 'dare']
  """
  fit = [n for n in DATA_FREE if catalogue.DATA_FREE[n].takes(num_experts)]
  groups = {
    'static': [n for n in STATIC if n in fit],
    'data_free': fit,
    'learned': list(LEARNED),
    'informed': list(INFORMED),
    'repairs': list(REPAIRS),
    'all': [*fit, *LEARNED, *INFORMED, *REPAIRS],
  }
  given = settings.split(names)
  unknown = [n for n in given if n not in {*groups, *ALL}]
  if unknown or not given:
    raise ValueError(
      (f'unknown methods {unknown}' if given else 'no methods')
      + ', allowed are '
      + ', '.join([*ALL, *groups])
    )
  for name in given:
    if name in DATA_FREE and name not in fit:
      catalogue.DATA_FREE[name].check_number(name, num_experts)
  found = [n for g in given for n in groups.get(g, [g])]
  return list(dict.fromkeys(found))


_CODE = ('then', 'others', 'task_logits_fn', 'trigger', 'shared')
"""Arguments that a config cannot set."""

_GLOBAL = ('steps', 'warmup_ascents', 'coefficient_steps', 'batch')
"""Options that a config's own `steps` and `batch` say for all methods."""


def options(name: str) -> dict[str, Any]:
  """Returns the options of a method that a config can set, by their defaults.

  Args:
    name: of the method.

  Returns:
    Options that are numbers, strings, tuples of these, None, or a dict of such
    for each mask and for the quirks.
  """
  found = {key: _plain(p.default) for key, p in _parameters(name).items()}
  if name not in DATA_FREE and repairs.takes_batch(name):
    found['batch'] = next(
      (b for family, b in BATCH.items() if name.startswith(family)), None
    )
  return found


def is_random(name: str) -> bool:
  """Whether what a method gives depends on a seed.

  Args:
    name: of the method.
  """
  return not {'seed', 'batch'}.isdisjoint(options(name))


def reads(name: str) -> str:
  """Says what data a method looks at beside the models.

  Args:
    name: of the method.

  Returns:
    'none', 'unlabelled' or 'labelled clean'.
  """
  if name in REPAIRS:
    return repairs.reads(name)
  return 'none' if name in DATA_FREE else 'unlabelled'


def spreads(name: str) -> bool:
  """Whether a method learns masks or coefficients, over a mesh if there is one.

  Args:
    name: of a method.
  """
  return name in LEARNED or name in repairs.MERGERS


def _parameters(name: str) -> dict[str, inspect.Parameter]:
  build = _BUILDERS[name]
  fixed = build.keywords if isinstance(build, functools.partial) else {}
  return {
    key: p
    for key, p in inspect.signature(build).parameters.items()
    if key not in (*fixed, *_CODE) and _is_plain(p.default)
  }


def _is_plain(value: Any) -> bool:
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  if dataclasses.is_dataclass(value):
    return True
  return value is None or isinstance(value, (int, float, str))


def _plain(value: Any) -> Any:
  """Returns the fields of a mask or of the quirks that a config can set."""
  if not dataclasses.is_dataclass(value):
    return value
  fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  return {key: x for key, x in fields.items() if _is_plain(x)}


def config_options(name: str) -> config_dict.ConfigDict:
  """Returns what a config offers to set of a method.

  Args:
    name: of the method.

  Returns:
    Options by name at their defaults; None for what the config's own `steps`
    and `batch` say.
  """
  out = config_dict.ConfigDict()
  for key, default in options(name).items():
    parameter = _parameters(name).get(key)
    if key in _GLOBAL or parameter is None:
      out[key] = config_dict.placeholder(int)
    elif isinstance(default, dict):
      kinds = typing.get_type_hints(type(parameter.default))
      out[key] = {k: _field(x, kinds[k]) for k, x in default.items()}
    else:
      out[key] = _field(default, parameter.annotation)
  return out


def _field(default: Any, annotation: Any) -> Any:
  """Returns a default, for None a placeholder of the type it stands for."""
  if default is not None:
    return default
  kinds = typing.get_args(annotation)
  kind = next(k for k in kinds if k is not type(None))
  if typing.get_origin(kind) is Sequence:
    kind = tuple
  return config_dict.placeholder(kind)


def resolve(
  names: Sequence[str],
  given: Mapping[str, Mapping[str, Any]],
  *,
  steps: int,
  batch: int,
  images: int = 0,
) -> dict[str, dict[str, Any]]:
  """Settles every option of some methods.

  Args:
    names: of the methods.
    given: what the config sets, by method and option; None leaves the default.
    steps: all steps that a learned method may take, 0 for its own default.
      Masks and coefficients share them as they do by default; ascents before
      the first step of masks (`warmup_ascents`) take a quarter of them at most.
      An informed method takes its own default in each pass, or as many as these
      where they are fewer. So do the loops of a repair; rounds over all images
      are made fewer.
    batch: images a task and draw.
    images: of each task, that a repair may read.

  Returns:
    Options by method.

  Raises:
    ValueError: with all unknown methods and options, and what is allowed.
  """
  given = {name: _settled(chosen) for name, chosen in given.items()}
  lines = [
    f'  options.{name}: no such method, allowed are {", ".join(ALL)}'
    for name in given
    if name not in ALL
  ]
  for name in filter(ALL.__contains__, given):
    lines += _unknown(f'  options.{name}', given[name], options(name))
  if steps < 0 or batch < 1:
    lines.append(
      f'  steps must not be negative and batch positive, got {steps} and '
      f'{batch}'
    )
  if lines:
    raise ValueError('\n'.join(['methods:', *lines]))
  out = {}
  for name in names:
    chosen = options(name)
    if 'batch' in chosen:
      chosen['batch'] = chosen['batch'] or batch
    if name in REPAIRS and steps:
      chosen |= repairs.within(chosen, steps, images)
    if name in LEARNED and steps:
      chosen |= _split(name, steps, {**chosen, **given.get(name, {})})
    if name in INFORMED and steps:
      chosen['steps'] = min(chosen['steps'], steps)
    for key, value in given.get(name, {}).items():
      nested = isinstance(value, dict)
      chosen[key] = chosen[key] | value if nested else value
    out[name] = chosen
  return out


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is set, without what is None, as dicts."""
  plain = config_dict.ConfigDict(given).to_dict()
  return {
    key: _settled(x) if isinstance(x, dict) else x
    for key, x in plain.items()
    if x is not None
  }


def _unknown(
  where: str, given: Mapping[str, Any], allowed: Mapping[str, Any]
) -> list[str]:
  """Returns a line for each option that there is not."""
  lines = []
  for key, value in given.items():
    if key not in allowed:
      names = ', '.join(allowed) or 'none'
      lines.append(f'{where}.{key}: no such option, allowed are {names}')
    elif isinstance(allowed[key], dict) != isinstance(value, dict):
      lines.append(f'{where}.{key}: got {value!r}, want {allowed[key]!r}')
    elif isinstance(value, dict):
      lines += _unknown(f'{where}.{key}', value, allowed[key])
  return lines


def _split(name: str, steps: int, chosen: Mapping[str, Any]) -> dict[str, int]:
  if 'warmup_ascents' in chosen:
    ascents = max(chosen['ascents'], 1)  # the method refuses fewer
    alone = min(-(-chosen['warmup_ascents'] // ascents), steps // 4)
    return {'steps': steps - alone, 'warmup_ascents': alone * ascents}
  if 'coefficient_steps' not in chosen:
    return {'steps': steps}
  if name.endswith('task_arithmetic'):
    return {'steps': steps, 'coefficient_steps': 0}
  return {'steps': steps - steps // 2, 'coefficient_steps': steps // 2}


def build(
  name: str,
  chosen: Mapping[str, Any],
  *,
  logits_fn: dj.typing.LogitsFn,
  task_logits_fn: dj.typing.TaskLogitsFn,
  preprocess_fn: dj.typing.PreprocessFn,
  image_shape: tuple[int, int, int],
  inputs_fn: dj.typing.InputsFn,
  levels: Sequence[str],
  seeds: dj.perturbations.Seeds | None = None,
) -> dj.Merger:
  """Makes a merger.

  Args:
    name: of the method.
    chosen: its options, from `resolve`.
    logits_fn: one forward pass for all tasks, of preprocessed images.
    task_logits_fn: one for one task, likewise.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.
    image_shape: `(H, W, C)`.
    inputs_fn: what linear layers read in a forward pass for one task.
    levels: of the leaves, from the lowest.
    seeds: triggers that were found on the experts, if any were searched.

  Returns:
    The merger.

  Raises:
    ValueError: where an option's value makes no sense.
  """
  if name in DATA_FREE:
    return dj.from_transform(DATA_FREE[name](**chosen))
  if chosen.get('labels') == 'true':
    raise ValueError(
      f"options.{name}.labels: merges read no labels here, 'true' needs them"
    )
  kwargs = {key: value for key, value in chosen.items() if key != 'batch'}
  more = {
    'logits_fn': logits_fn,
    'task_logits_fn': task_logits_fn,
    'preprocess_fn': preprocess_fn,
    'image_shape': image_shape,
    'inputs_fn': inputs_fn,
    'levels': levels,
    'seeds': seeds,
  }
  parameters = inspect.signature(_BUILDERS[name]).parameters
  for key, value in kwargs.items():
    if isinstance(value, dict):
      kwargs[key] = dataclasses.replace(parameters[key].default, **value)
  kwargs |= {key: x for key, x in more.items() if key in parameters}
  return _BUILDERS[name](**kwargs)
