"""What the commands of `dam-jax` share."""

import argparse
from collections.abc import Callable
import json
import sys
from typing import Any, NamedTuple


class Command(NamedTuple):
  """A command of `dam-jax`.

  Attributes:
    name: of it.
    help: one line.
    add_arguments: adds its arguments to a parser.
    run: runs it and returns the exit code.
  """

  name: str
  help: str
  add_arguments: Callable[[argparse.ArgumentParser], None]
  run: Callable[[argparse.Namespace], int]


def size(number: float) -> str:
  """Returns a number of bytes as people read it.

  Args:
    number: of bytes.

  Examples:
    >>> size(352_000_000)
    '352 MB'
  """
  for unit in ('B', 'kB', 'MB', 'GB'):
    if number < 1000:
      return f'{number:.3g} {unit}'
    number /= 1000
  return f'{number:.3g} TB'


def emit(found: Any) -> None:
  """Writes JSON values to the standard output, for machines."""
  sys.stdout.write(json.dumps(found) + '\n')
