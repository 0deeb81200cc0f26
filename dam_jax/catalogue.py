"""Every merge by its name: what it reads, what it costs, how it is tested.

`dam-jax methods` prints it, and the table of the README is made of it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
import math
import re
from typing import Any

import optax

from dam_jax import defences
from dam_jax import informed
from dam_jax import learned
from dam_jax import recipes
from dam_jax import spectral


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A merge method.

  Attributes:
    factory: makes it.
    least: how many experts it takes at least.
    most: how many at most.
    reads: what it needs beside the models.
    passes: how often it reads the models, merged leaf by leaf; of merges that
      learn, how often they go through the images.
    memory: what it holds at a time, of `K` experts; where that is leaves, for
      each leaf under way.
    tested: what its numbers are compared with, beside the equations in NumPy.
  """

  factory: Callable[..., Any]
  least: int = 1
  most: float = math.inf
  reads: str = '-'
  passes: str = '1'
  memory: str = '2K + 3 leaves'
  tested: str = '-'

  def takes(self, num: int) -> bool:
    """Whether it merges that many experts."""
    return self.least <= num <= self.most

  def check_number(self, name: str, num: int) -> None:
    """Raises unless it merges that many experts."""
    if not self.takes(num):
      more = '' if self.least == self.most else ' or more'
      raise ValueError(f'{name} merges {self.least}{more} experts, got {num}')

  @property
  def reference(self) -> tuple[str, str]:
    """Title and address of the paper, from the factory's docstring."""
    doc = inspect.getdoc(self.factory) or ''
    found = re.search(
      r'`([^`<]+?)\s*<([^>]+)>`_', doc[doc.find('References') :]
    )
    if found is None:
      raise ValueError(f'{self.factory.__name__}: no reference')
    return ' '.join(found[1].split()), found[2]

  @property
  def summary(self) -> str:
    """The first line of the factory's docstring."""
    return (inspect.getdoc(self.factory) or '').split('\n')[0]

  @property
  def options(self) -> Mapping[str, inspect.Parameter]:
    """The factory's arguments."""
    return inspect.signature(self.factory).parameters


_FB, _MK = 'FusionBench', 'mergekit'
_BOTH = f'{_FB}, {_MK}'
_GOLDEN = f'{_BOTH}, golden arrays'
_SVD = '5K + 5 leaves'

DATA_FREE: dict[str, Entry] = {
  'average': Entry(factory=recipes.average, tested=_GOLDEN),
  'weighted_average': Entry(factory=recipes.weighted_average, tested=_GOLDEN),
  'task_arithmetic': Entry(factory=recipes.task_arithmetic, tested=_GOLDEN),
  'slerp': Entry(factory=recipes.slerp, least=2, most=2, tested=_GOLDEN),
  'nuslerp': Entry(factory=recipes.nuslerp, least=2, most=2, tested=_MK),
  'karcher': Entry(factory=recipes.karcher, tested=_MK),
  'model_stock': Entry(factory=recipes.model_stock, least=2, tested=_BOTH),
  'ties': Entry(factory=recipes.ties, passes='4', tested=_GOLDEN),
  'dare': Entry(factory=recipes.dare, tested=_GOLDEN),
  'della': Entry(factory=recipes.della, passes='2', tested=_MK),
  'breadcrumbs': Entry(factory=recipes.breadcrumbs, tested=_MK),
  'magmax': Entry(factory=recipes.magmax, tested=_FB),
  'sce': Entry(factory=recipes.sce, tested=_MK),
  'pcb': Entry(factory=recipes.pcb, passes='5', memory='4K + 3 leaves'),
  'consensus': Entry(factory=recipes.consensus, tested=_FB),
  'emr': Entry(factory=recipes.emr, passes='2', tested=_FB),
  'tsv_m': Entry(factory=spectral.tsv_m, memory=_SVD, tested=_FB),
  'iso_c': Entry(factory=spectral.iso_c, memory=_SVD, tested=_FB),
  'iso_cts': Entry(factory=spectral.iso_cts, memory=_SVD, tested=_FB),
  'wudi': Entry(factory=spectral.wudi, memory=_SVD, tested=_FB),
  'knots': Entry(factory=spectral.knots, passes='4', memory=_SVD, tested=_FB),
}
"""Merges without data, by name."""


INFORMED: dict[str, Entry] = {
  'fisher': Entry(
    factory=informed.fisher,
    reads='images',
    passes='1',
    memory='2K + 2 models',
    tested=f'{_FB}, golden arrays',
  ),
  'regmean': Entry(
    factory=informed.regmean,
    reads='images',
    passes='1',
    memory='K + 2 models, K Grams',
    tested=f'{_FB}, golden arrays',
  ),
  'regmean_plus_plus': Entry(
    factory=informed.regmean_plus_plus,
    reads='images',
    passes='1 a level',
    memory='K + 3 models, K Grams',
  ),
}
"""Merges that weigh by statistics of unlabelled images, by name."""

LEARNED: dict[str, Entry] = {
  'adamerging': Entry(
    factory=learned.adamerging,
    reads='images',
    passes='1000 steps',
    memory='K + 3 models',
    tested='golden arrays',
  ),
  'concrete': Entry(
    factory=learned.concrete,
    reads='images',
    passes='2000 steps',
    memory='K + 8 models',
    tested='golden arrays',
  ),
  'dam_released': Entry(
    factory=learned.dam_released,
    reads='images',
    passes='2000 steps of 3 draws',
    memory='K + 8 models',
    tested='golden arrays',
  ),
  'dam_paper': Entry(
    factory=learned.dam_paper,
    reads='images',
    passes='2000 steps of 3 draws',
    memory='K + 12 models',
  ),
  'dam_robust': Entry(
    factory=learned.dam_robust,
    reads='images',
    passes='300 steps',
    memory='5K + 3 models',
  ),
  'repo_awm': Entry(
    factory=defences.repo_awm,
    reads='images',
    passes='2000 steps of 2 draws',
    memory='9 models',
    tested='golden arrays',
  ),
  'repo_sau': Entry(
    factory=defences.repo_sau,
    reads='images',
    passes='2000 steps of 2 draws',
    memory='9 models',
    tested='golden arrays',
  ),
}
"""Merges and repairs that learn on unlabelled images, by name.

Their memory is counted, not measured: experts, base, masks, their gradients and
Adam's moments, without the images' activations.
"""


def table() -> str:
  """Returns all methods as a table in Markdown."""
  head = ('method', 'reads', 'passes', 'memory', 'compared with', 'reference')
  lines = [head, ('---',) * len(head)]
  for name, entry in {**DATA_FREE, **INFORMED, **LEARNED}.items():
    _, url = entry.reference
    number = re.split(r'/abs/|doi.org/', url)[-1]
    lines.append(
      (
        f'`{name}`',
        entry.reads,
        entry.passes,
        entry.memory,
        entry.tested,
        f'[{number}]({url})',
      )
    )
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


_MERGES = ('then', 'others')
"""Arguments that are merges themselves."""


def build(
  name: str, options: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Makes a merge without data.

  Args:
    name: of the method.
    options: its arguments by name. `then` and `others`, where a method has
      them, are the name of another method, and `then.<key>` that one's.

  Returns:
    The transformation of task vectors.

  Raises:
    ValueError: where there is no such method or argument, with all that are,
      or an argument is missing or makes no sense.

  Examples:
    >>> tx = build('dare', {'rate': 0.2, 'then': 'ties', 'then.density': 0.1})
  """
  if name not in DATA_FREE:
    raise ValueError(f'no method {name!r}, there are {", ".join(DATA_FREE)}')
  own: dict[str, Any] = {}
  inner: dict[str, dict[str, Any]] = {key: {} for key in _MERGES}
  for key, value in options.items():
    outer, dot, rest = key.partition('.')
    if dot and outer in _MERGES:
      inner[outer][rest] = value
    else:
      own[key] = value
  parameters = DATA_FREE[name].options
  lines = [f'no option {key!r}' for key in own if key not in parameters]
  lines += [
    f'option {key!r} is missing'
    for key, p in parameters.items()
    if p.default is p.empty and key not in own
  ]
  lines += [
    f'options of {key}, {", ".join(found)}, without {key}'
    for key, found in inner.items()
    if found and own.get(key) is None
  ]
  if lines:
    names = ', '.join(parameters) or 'none'
    raise ValueError(f'{name}: {"; ".join(lines)}; its options are {names}')
  for key in _MERGES:
    if own.get(key) is not None:
      own[key] = build(own[key], inner[key])
  try:
    return DATA_FREE[name].factory(**own)
  except TypeError as e:
    raise ValueError(f'{name}: {e}') from e
