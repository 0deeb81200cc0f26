"""Every merge by its name: what it reads, what it costs, how it is tested.

`dam-jax methods` prints it, and the table of the README is made of it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
import re
from typing import Any

import optax

from dam_jax import recipes
from dam_jax import spectral


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A merge method.

  Attributes:
    factory: makes it.
    num: how many experts it takes; None for any number.
    memory: beside the models themselves, in models (`P` numbers each) or in
      terms of a leaf where it works leaf by leaf.
    tested: what its numbers are compared with.
  """

  factory: Callable[..., Any]
  num: int | None = None
  memory: str = 'a leaf'
  tested: str

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


REFERENCE, PEERS = "DAM authors' code", 'FusionBench, mergekit'

STATIC: dict[str, Entry] = {
  'average': Entry(factory=recipes.average, tested=PEERS),
  'weighted_average': Entry(factory=recipes.weighted_average, tested=PEERS),
  'task_arithmetic': Entry(factory=recipes.task_arithmetic, tested=PEERS),
  'ties': Entry(factory=recipes.ties, tested=PEERS),
  'dare': Entry(factory=recipes.dare, tested=PEERS),
  'slerp': Entry(factory=recipes.slerp, num=2, tested=PEERS),
  'tsv_m': Entry(factory=spectral.tsv_m, tested='FusionBench'),
  'iso_c': Entry(factory=spectral.iso_c, tested='FusionBench'),
  'iso_cts': Entry(factory=spectral.iso_cts, tested='FusionBench'),
  'wudi': Entry(factory=spectral.wudi, tested='FusionBench'),
  'knots': Entry(factory=spectral.knots, tested='FusionBench'),
}
"""Merges without data, by name."""


def build(
  name: str, options: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Makes a merge without data.

  Args:
    name: of the method.
    options: its arguments by name. `then`, where a method has it, is the name
      of another method, and `then.<key>` that one's arguments.

  Returns:
    The transformation of task vectors.

  Raises:
    ValueError: where there is no such method or argument, with all that are,
      or an argument is missing or makes no sense.

  Examples:
    >>> tx = build('dare', {'rate': 0.2, 'then': 'ties', 'then.density': 0.1})
  """
  if name not in STATIC:
    raise ValueError(f'no method {name!r}, there are {", ".join(STATIC)}')
  inner = {
    key.removeprefix('then.'): x
    for key, x in options.items()
    if key.startswith('then.')
  }
  own = {k: x for k, x in options.items() if not k.startswith('then.')}
  parameters = STATIC[name].options
  lines = [f'no option {key!r}' for key in own if key not in parameters]
  lines += [
    f'option {key!r} is missing'
    for key, p in parameters.items()
    if p.default is p.empty and key not in own
  ]
  if inner and 'then' not in own:
    lines.append(f'options of then, {", ".join(inner)}, without then')
  if lines:
    names = ', '.join(parameters) or 'none'
    raise ValueError(f'{name}: {"; ".join(lines)}; its options are {names}')
  if 'then' in own:
    own['then'] = build(own['then'], inner)
  try:
    return STATIC[name].factory(**own)
  except TypeError as e:
    raise ValueError(f'{name}: {e}') from e
