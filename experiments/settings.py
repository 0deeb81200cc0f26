"""What config files share, and the checks of what they say."""

from collections.abc import Collection, Mapping, Sequence

from ml_collections import config_dict


def is_local(arg: str) -> bool:
  """Reads the argument of a config file, what stands behind its colon.

  Args:
    arg: '' or 'runlocal', which asks for a run that is short.

  Returns:
    Whether the run is to be short.

  Raises:
    ValueError: where it is something else.
  """
  if arg not in ('', 'runlocal'):
    raise ValueError(
      f"the config's argument is 'runlocal' or none, got {arg!r}"
    )
  return arg == 'runlocal'


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
