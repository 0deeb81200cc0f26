"""Models whose vocabularies differ in size, brought to one.

A row of an embedding or of a language model's head is a token. Models that were
fine-tuned from one base keep its tokens and append their own, so rows are the
same token where both models have them; that is taken for granted here.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import numpy as np

from dam_jax.checkpoint import headers
from dam_jax.checkpoint import models

RULES = ('keep', 'pad', 'intersect')
"""Keep the base's rows, all rows that any model has, or those that all have."""


def fit_rows(
  base: models.Model,
  experts: Mapping[str, models.Model],
  rules: Mapping[str, str],
) -> tuple[models.Model, dict[str, models.Model]]:
  """Gives leaves the same number of rows in all models.

  Args:
    base: the model that all experts were fine-tuned from.
    experts: models by name.
    rules: one of `RULES` by the leaf's path. 'keep' takes the base's leaf for
      every expert. 'pad' brings all to the most rows: rows that an expert lacks
      are the base's, so its task vector is zero there; rows that the base lacks
      are the mean of the experts that have them. 'intersect' cuts all to the
      fewest rows.

  Returns:
    The base and the experts; leaves without a rule are untouched.

  Raises:
    ValueError: where a leaf is missing, a rule is unknown, or leaves differ in
      more than their rows; with all of it.
  """
  lines = []
  named = {'base': base, **experts}
  for path, rule in rules.items():
    if rule not in RULES:
      lines.append(f'{path}: the rule must be one of {RULES}, got {rule!r}')
    found = {n: m.leaves[path] for n, m in named.items() if path in m.leaves}
    lines += [f'{n}: {path}: missing' for n in named if n not in found]
    rests = {tuple(x.shape[1:]) for x in found.values()}
    if len(rests) > 1 or any(not x.shape for x in found.values()):
      shapes = {n: list(x.shape) for n, x in found.items()}
      lines.append(f'{path}: differs in more than its rows: {shapes}')
  headers.raise_if(lines, 'vocabularies cannot be fitted:')
  fitted = {
    name: _with_rows(
      model,
      {
        path: _Rows(path, base, tuple(experts.values()), rule)
        for path, rule in rules.items()
      },
    )
    for name, model in named.items()
  }
  return fitted.pop('base'), fitted


@dataclasses.dataclass(frozen=True)
class _Rows:
  """How many rows a leaf is to have, and what to fill them with."""

  path: str
  base: models.Model
  experts: Sequence[models.Model]
  rule: str

  @property
  def size(self) -> int:
    sizes = [m.leaves[self.path].shape[0] for m in (self.base, *self.experts)]
    choose = {'keep': lambda s: s[0], 'pad': max, 'intersect': min}[self.rule]
    return choose(sizes)

  def fit(self, model: models.Model) -> np.ndarray:
    if self.rule == 'keep':
      return self.base.read(self.path)
    own = model.read(self.path)
    missing = self.size - own.shape[0]
    if missing <= 0:
      return own[: self.size]
    return np.concatenate([own, self._padding(own.shape[0]).astype(own.dtype)])

  def _padding(self, begin: int) -> np.ndarray:
    """Returns the rows from `begin` on that a model without them gets."""
    base = self.base.read(self.path)
    rows = [np.asarray(base[begin:], np.float32)]
    start = max(begin, base.shape[0])
    tails = [
      np.asarray(e.read(self.path)[start:], np.float32) for e in self.experts
    ]
    width = self.size - start
    total = np.zeros((width, *base.shape[1:]), np.float32)
    count = np.zeros((width,) + (1,) * (base.ndim - 1), np.float32)
    for tail in tails:
      total[: len(tail)] += tail
      count[: len(tail)] += 1
    return np.concatenate([*rows, total / count])


def _with_rows(model: models.Model, rows: Mapping[str, _Rows]) -> models.Model:
  leaves = dict(model.leaves)
  for path, how in rows.items():
    own = leaves[path]
    dtype = how.base.leaves[path].dtype if how.rule == 'keep' else own.dtype
    leaves[path] = jax.ShapeDtypeStruct((how.size, *own.shape[1:]), dtype)

  def read(path):
    return rows[path].fit(model) if path in rows else model.read(path)

  return dataclasses.replace(model, leaves=leaves, read=read)
