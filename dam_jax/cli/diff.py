"""`dam-jax diff`: how two models differ, leaf by leaf and layer by layer."""

import argparse
import concurrent.futures
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dam_jax import checkpoint
from dam_jax import streaming
from dam_jax.cli import command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('a', metavar='A', help='a model')
  parser.add_argument('b', metavar='B', help='another one like it')
  parser.add_argument(
    '--base',
    metavar='PATH',
    help='model that both come from: compares task vectors too',
  )
  parser.add_argument('--picture', metavar='FILE', help='a picture by layer')
  parser.add_argument('--leaves', action='store_true', help='list every leaf')


_SUMS = ('aa', 'bb', 'gap', 'xx', 'yy', 'xy', 'both', 'conflict')


@jax.jit
def _sums(a: jax.Array, b: jax.Array, base: jax.Array) -> dict[str, jax.Array]:
  """Returns what norms, cosines and conflicts are made of."""
  if not jnp.issubdtype(a.dtype, jnp.floating):
    # Counters have no norm, but they differ or not.
    most = jnp.max(jnp.abs(a - b), initial=0).astype(jnp.float32)
    return {**dict.fromkeys(_SUMS, jnp.zeros([])), 'most': most}
  a, b, base = (x.astype(jnp.float32) for x in (a, b, base))
  x, y, gap = a - base, b - base, a - b
  both = (x != 0) & (y != 0)
  return {
    'aa': jnp.sum(a * a),
    'bb': jnp.sum(b * b),
    'gap': jnp.sum(gap * gap),
    'most': jnp.max(jnp.abs(gap), initial=0),
    'xx': jnp.sum(x * x),
    'yy': jnp.sum(y * y),
    'xy': jnp.sum(x * y),
    'both': jnp.sum(both, dtype=jnp.float32),
    'conflict': jnp.sum(both & ((x > 0) != (y > 0)), dtype=jnp.float32),
  }


def _add(sums: list[dict[str, float]]) -> dict[str, float]:
  return {
    key: (max if key == 'most' else math.fsum)(s[key] for s in sums)
    for key in sums[0]
  }


def _figures(sums: dict[str, float], *, based: bool) -> dict[str, float | None]:
  """Turns sums into norms, a cosine and a share."""

  def ratio(over, under):
    return over / under if under else None

  found = {
    'norm_a': math.sqrt(sums['aa']),
    'norm_b': math.sqrt(sums['bb']),
    'norm_difference': math.sqrt(sums['gap']),
    'relative_difference': ratio(math.sqrt(sums['gap']), math.sqrt(sums['aa'])),
    'largest_difference': sums['most'],
  }
  if based:
    found |= {
      'norm_task_vector_a': math.sqrt(sums['xx']),
      'norm_task_vector_b': math.sqrt(sums['yy']),
      'cosine': ratio(sums['xy'], math.sqrt(sums['xx'] * sums['yy'])),
      'sign_conflicts': ratio(sums['conflict'], sums['both']),
    }
  return found


def layer(path: str) -> str:
  """Returns the part of a path up to its first number, or all but its end.

  Args:
    path: of a leaf.

  Examples:
    >>> layer('model/layers/3/mlp/weight'), layer('embed/weight')
    ('model/layers/3', 'embed')
  """
  parts = path.split('/')
  for i, part in enumerate(parts):
    if part.rpartition('_')[2].isdigit():
      return '/'.join(parts[: i + 1])
  return '/'.join(parts[:-1]) or path


def compare(a: Any, b: Any, base: Any = None) -> dict[str, Any]:
  """Compares two models leaf by leaf.

  Args:
    a: a source of leaves.
    b: another one with the same leaves.
    base: what both come from, to compare task vectors too.

  Returns:
    Figures of the `whole`, of `layers` and of `leaves` by path: norms, the norm
    of the difference and the largest difference of an entry; with a base the
    norms of the task vectors, their cosine, and the share of the entries that
    both move in which they move apart. None where a figure is not defined.

  Raises:
    ValueError: where the models do not fit each other, with all differences.
  """
  others = {'B': b} if base is None else {'B': b, 'base': base}
  streaming.check(a, others)

  def one(path: str) -> dict[str, float]:
    origin = a if base is None else base
    sums = _sums(a.read(path), b.read(path), origin.read(path))
    return {key: float(x) for key, x in sums.items()}

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = pool.map(one, a.leaves)
    sums = dict(zip(a.leaves, found, strict=True))
  layers: dict[str, list[dict[str, float]]] = {}
  for path, x in sums.items():
    layers.setdefault(layer(path), []).append(x)
  based = base is not None
  return {
    'whole': _figures(_add(list(sums.values())), based=based),
    'layers': {
      name: _figures(_add(parts), based=based) for name, parts in layers.items()
    },
    'leaves': {path: _figures(x, based=based) for path, x in sums.items()},
  }


def _cell(value: float | None) -> str:
  return '-' if value is None else f'{value:.3g}'


_HEADS = {
  'norm_difference': '|A - B|',
  'relative_difference': '/ |A|',
  'largest_difference': 'largest',
  'cosine': 'cosine',
  'sign_conflicts': 'conflicts',
}
"""Columns of the table; `--json` has all figures."""


def _show(found: dict[str, Any], rows: str, console: Console) -> None:
  names = [name for name in _HEADS if name in found['whole']]
  table = Table(box=None, pad_edge=False)
  table.add_column(rows, overflow='fold')
  for name in names:
    table.add_column(_HEADS[name], justify='right', no_wrap=True)
  for name, figures in [*found[rows].items(), ('whole', found['whole'])]:
    table.add_row(name, *(_cell(figures[key]) for key in names))
  console.print(table)


def draw(found: dict[str, Any], path: str) -> None:
  """Draws how layers differ.

  Args:
    found: from `compare`.
    path: of the picture, in a format that matplotlib knows.

  Raises:
    ValueError: where matplotlib is not installed.
  """
  try:
    from matplotlib import figure
  except ModuleNotFoundError as e:
    raise ValueError(
      "pictures need matplotlib: pip install 'dam_jax[experiments]'"
    ) from e
  kinds = {
    'relative_difference': 'norm of the difference / norm of A',
    'cosine': 'cosine of the task vectors',
    'sign_conflicts': 'share of entries that move apart',
  }
  shown = [key for key in kinds if key in found['whole']]
  names = list(found['layers'])
  height = 1.2 + 0.22 * len(names)
  canvas = figure.Figure(figsize=(3 + 3.4 * len(shown), height))
  axes = canvas.subplots(1, len(shown), sharey=True, squeeze=False)[0]
  for ax, key in zip(axes, shown, strict=True):
    values = [found['layers'][n][key] for n in names]
    ax.barh(names, [math.nan if x is None else x for x in values], color='C0')
    ax.axvline(
      found['whole'][key] or 0, color='0.3', linewidth=1, linestyle=':'
    )
    ax.set_xlabel(f'{kinds[key]}\n(dotted: whole model)')
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].invert_yaxis()
  canvas.tight_layout()
  with checkpoint.replacing(path) as temporary:
    kind = pathlib.Path(path).suffix.removeprefix('.') or 'png'
    canvas.savefig(temporary, format=kind, dpi=150)


def _run(args: argparse.Namespace) -> int:
  a, b = checkpoint.open_model(args.a), checkpoint.open_model(args.b)
  base = checkpoint.open_model(args.base) if args.base else None
  found = compare(a, b, base)
  if args.picture:
    draw(found, args.picture)
  if args.json:
    command.emit(found)
  else:
    _show(found, 'leaves' if args.leaves else 'layers', Console())
  return 1 if found['whole']['largest_difference'] else 0


DIFF = command.Command(
  'diff',
  'Compares two models: norms, task vectors, sign conflicts.',
  _add_arguments,
  _run,
)
