"""The command `dam-jax`: merge, check, diff and list methods.

  dam-jax merge --base B --expert a=PATH --expert b=PATH \
    --method ties --set density=0.2 --out OUT

Exit codes: 0, done; 1, `diff` found differences; 2, the input was refused and
nothing was written; 3, it failed while working and can go on; 130, interrupted
and can go on.
"""

import argparse
from collections.abc import Sequence
import shlex
import sys

from rich.console import Console
from rich.text import Text

from dam_jax.cli import diff
from dam_jax.cli import listing
from dam_jax.cli import merge

COMMANDS = (merge.MERGE, merge.CHECK, diff.DIFF, listing.METHODS)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: its arguments; those of the process where None.

  Returns:
    The exit code.
  """
  parser = argparse.ArgumentParser(
    prog='dam-jax',
    description='Merges fine-tuned models, leaf by leaf, from files to files.',
    epilog='Exit codes: 0 done; 1 diff found differences; 2 input refused, '
    'nothing written; 3 failed while working; 130 interrupted.',
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for command in COMMANDS:
    sub = commands.add_parser(
      command.name, help=command.help, description=command.help
    )
    command.add_arguments(sub)
    sub.add_argument(
      '--json', action='store_true', help='print one JSON object'
    )
    sub.set_defaults(run=command.run)
  args = parser.parse_args(argv)
  given = sys.argv[1:] if argv is None else argv
  args.command = shlex.join(['dam-jax', *given])
  errors = Console(stderr=True, soft_wrap=True)
  try:
    return args.run(args)
  except ValueError as e:
    errors.print(Text(f'dam-jax: {e}'))
    return 2
  except OSError as e:
    errors.print(Text(f'dam-jax: {e}'))
    return 3
  except KeyboardInterrupt:
    errors.print(Text('dam-jax: interrupted; the same command goes on'))
    return 130


def run() -> None:
  """Runs the command of this process and exits."""
  sys.exit(main())
