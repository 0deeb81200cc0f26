"""`dam-jax methods`."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from dam_jax import catalogue
from dam_jax.cli import command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('name', nargs='?', help='of one method, in full')


def _entry(name: str) -> dict[str, Any]:
  entry = catalogue.DATA_FREE[name]
  title, url = entry.reference
  defaults = {
    key: 'required' if p.default is p.empty else repr(p.default)
    for key, p in entry.options.items()
  }
  return {
    'name': name,
    'summary': entry.summary,
    'options': defaults,
    'reference': title,
    'url': url,
    'tested': entry.tested,
  }


def _run(args: argparse.Namespace) -> int:
  if args.name is not None and args.name not in catalogue.DATA_FREE:
    raise ValueError(
      f'no method {args.name!r}, there are {", ".join(catalogue.DATA_FREE)}'
    )
  console = Console()
  if args.json:
    names = [args.name] if args.name else list(catalogue.DATA_FREE)
    command.emit([_entry(name) for name in names])
  elif args.name:
    console.print(
      catalogue.DATA_FREE[args.name].factory.__doc__,
      markup=False,
      highlight=False,
    )
  else:
    table = Table('method', 'options', 'reference')
    for name in catalogue.DATA_FREE:
      found = _entry(name)
      options = ', '.join(f'{k}={v}' for k, v in found['options'].items())
      table.add_row(name, options, f'{found["reference"]}\n{found["url"]}')
    console.print(table)
  return 0


METHODS = command.Command(
  'methods', 'Lists the merge methods, or explains one.', _add_arguments, _run
)
