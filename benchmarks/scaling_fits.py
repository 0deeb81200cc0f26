"""Lines over the numbers of experts: fixed and marginal costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from benchmarks.pictures import median


def fits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Fits a line over the number of experts to time and memory.

  Args:
    rows: of `benchmarks.bench_scaling`.

  Returns:
    Rows {what, method, of, fixed, marginal, r2}; `of` is 'seconds' or 'peak'.
    None for a method of fewer than three numbers of experts, whose line would
    tell nothing.
  """
  kinds: dict[str, Callable[[Mapping[str, Any]], float]] = {
    'seconds': lambda row: median(row['runs']),
    'peak': lambda row: row['peak'],
  }
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    if row['axis'] == 'experts':
      groups.setdefault((row['what'], row['method']), []).append(row)
  found = []
  for (what, method), group in groups.items():
    experts = [row['experts'] for row in group]
    if len(set(experts)) < 3:
      continue
    for of, value in kinds.items():
      line = stats.linregress(experts, [value(row) for row in group])
      found.append(
        {
          **{'axis': 'fit', 'what': what, 'method': method, 'of': of},
          'fixed': float(line.intercept),
          'marginal': float(line.slope),
          'r2': float(line.rvalue**2),
        }
      )
  return found
