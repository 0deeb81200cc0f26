"""What config files share, and the checks of what they say."""

from collections.abc import Callable, Collection, Mapping, Sequence
import difflib
import functools
import shlex
from typing import Any

from ml_collections import config_dict

Config = config_dict.ConfigDict

Scalar = bool | int | float | str

GetConfig = Callable[..., Config]
"""What a config file has under the name `get_config`."""


def arguments(**named: Scalar) -> Callable[[Callable[..., Config]], GetConfig]:
  """Makes a config file's `get_config`, which reads what is behind the colon.

  That is names and values between commas, as in
  `--config=configs/pool.py:runlocal,steps=20,options.ties.density=0.1`. A name
  is one of those given here, on which the config depends as a whole, or a key
  of the config with dots, which is set last. A name alone is `name=True`, and
  what holds a comma stands in quotes: `methods='average,ties'`.

  Args:
    **named: names and defaults, whose types are theirs.

  Returns:
    A decorator of a function of these names, by keyword, that returns a config.
    What it makes takes the text or, from other config files, the names; it
    raises ValueError with all that is unknown or of another type.

  Examples:
    >>> @arguments(runlocal=False)
    ... def get_config(*, runlocal):
    ...   return config_dict.ConfigDict({'steps': 4 if runlocal else 400})
    >>> get_config('runlocal').steps, get_config('steps=7').steps
    (4, 7)
    >>> get_config(runlocal=True).steps
    4
  """

  def decorate(make: Callable[..., Config]) -> GetConfig:
    @functools.wraps(make)
    def get_config(arg: str | None = '', **chosen: Scalar) -> Config:
      pairs, lines = _pairs(arg or '')
      chosen = {**named, **chosen}
      for name in [*pairs]:
        if name in named:
          found = _typed(name, pairs.pop(name), named[name], lines)
          chosen[name] = named[name] if found is None else found
      config = make(**chosen)
      lines += override(config, pairs, also=tuple(named))
      if lines:
        raise ValueError(
          '\n  '.join([f'argument {arg!r} of the config:', *lines])
        )
      return config

    return get_config

  return decorate


def split_quoted(text: str) -> list[str]:
  """Splits at commas that are not in quotes, and takes the quotes away.

  Raises:
    ValueError: where a quote is not closed.
  """
  lexer = shlex.shlex(text, posix=True)
  lexer.whitespace, lexer.whitespace_split = ',', True
  lexer.commenters = lexer.escape = ''
  return [part.strip() for part in lexer]


def _pairs(arg: str) -> tuple[dict[str, str], list[str]]:
  """Returns values by name, and a line for each name that comes twice."""
  try:
    parts = split_quoted(arg)
  except ValueError as e:
    return {}, [f'{e}: {arg}']
  pairs, lines = {}, []
  for part in filter(None, parts):
    name, equals, value = part.partition('=')
    if name in pairs:
      lines.append(f'{name} comes twice')
    pairs[name] = value if equals else 'True'
  return pairs, lines


def _typed(name: str, text: str, like: Any, lines: list[str]) -> Any:
  """Returns a text as a value of a type; adds a line where it is none."""
  try:
    if isinstance(like, bool):
      return {'true': True, 'false': False}[text.lower()]
    if isinstance(like, int | float | str):
      return type(like)(text)
    if isinstance(like, tuple) and like:
      return tuple(type(like[0])(x) for x in split(text.strip('()[]')))
  except (KeyError, ValueError):
    pass
  if isinstance(like, config_dict.ConfigDict):
    lines.append(f'{name} is a section: name one of {", ".join(like)}')
  else:
    lines.append(f'{name} is {type(like).__name__}, got {text!r}')
  return None


def override(
  config: Config, pairs: Mapping[str, Any], *, also: Sequence[str] = ()
) -> list[str]:
  """Sets values of a config, all or none of them.

  Args:
    config: to change.
    pairs: values by key, with dots; texts are read as the type of what is
      there, others must be of that type.
    also: what else may be named in its place, for the message.

  Returns:
    A line for each key that is unknown and each value of another type.

  Examples:
    >>> config = config_dict.ConfigDict({'merge': {'scale': 0.3}, 'seed': 0})
    >>> override(config, {'merge.scale': '1', 'seed': 4})
    []
    >>> config.merge.scale, config.seed
    (1.0, 4)
    >>> override(config, {'merge.scal': '1'})
    ['merge.scal is unknown: did you mean merge.scale?']
  """
  there, lines, found = flat(config), [], {}
  for key, value in pairs.items():
    if key not in there:
      near = difflib.get_close_matches(key, [*also, *there], n=1)
      hint = f'did you mean {near[0]}?' if near else 'there are '
      hint += '' if near else ', '.join([*also, *config])
      lines.append(f'{key} is unknown: {hint}')
      continue
    text = value if isinstance(value, str) else repr(value)
    found[key] = _typed(key, text, there[key], lines)
  if not lines:
    for key, value in found.items():
      config.update_from_flattened_dict({key: value})
  return lines


def flat(config: Config, prefix: str = '') -> dict[str, Any]:
  """Returns sections and values by key, with dots."""
  out = {}
  for key in config:
    out[f'{prefix}{key}'] = config[key]
    if isinstance(config[key], config_dict.ConfigDict):
      out |= flat(config[key], f'{prefix}{key}.')
  return out


def split(text: str) -> list[str]:
  """Returns what stands between commas.

  Args:
    text: as of a flag; spaces and empty parts are dropped.
  """
  return [x.strip() for x in str(text).split(',') if x.strip()]


def mesh_sizes(text: str) -> dict[str, int] | None:
  """Reads the sizes of a mesh.

  Args:
    text: such as 'data=4,model=2'; '' has none.

  Returns:
    Sizes of axes by name, for `dam_jax.sharding.make_mesh`.

  Raises:
    ValueError: where it does not read so.

  Examples:
    >>> mesh_sizes('data=4,model=-1')
    {'data': 4, 'model': -1}
  """
  try:
    pairs = [part.split('=') for part in split(text)]
    return {name.strip(): int(size) for name, size in pairs} or None
  except ValueError:
    raise ValueError(
      f"mesh must be like 'data=4,model=2' or empty, got {text!r}"
    ) from None


def wrong_keys(
  config: config_dict.ConfigDict, keys: Mapping[str, str]
) -> list[str]:
  """Says which keys of a config are missing or unknown.

  Args:
    config: to check.
    keys: what each key means.

  Returns:
    A line for each.
  """
  return [
    *(f'{key} is missing' for key in keys if key not in config),
    *(f'{key} is unknown' for key in config if key not in keys),
  ]


def not_positive(
  config: config_dict.ConfigDict, *, but: Collection[str]
) -> list[str]:
  """Says which numbers of a config are not positive.

  Args:
    config: to check.
    but: keys that may be anything.

  Returns:
    A line for each.
  """
  return [
    f'{key} must be positive, got {value}'
    for key, value in config.items()
    if key not in but and isinstance(value, int | float) and not value > 0
  ]


def raise_if(lines: Sequence[str]) -> None:
  """Raises ValueError with lines that say what is wrong with a config."""
  if lines:
    raise ValueError('\n  '.join(['config:', *lines]))
