"""The merges that `benchmarks.bench_merge` times, from the table of parity.

Of each method one merge, or two where FusionBench and mergekit mean different
things by its name. A program of `benchmarks.worker`, which says what there is
to time: the command itself loads neither JAX nor torch.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import inspect
import itertools
from pathlib import Path
import tempfile
from typing import Any

import optax

from benchmarks import parity_cases
from benchmarks import parity_runs
from benchmarks.parity_cases import Case
from benchmarks.worker import Job
from dam_jax import catalogue

CHOSEN = {
  'consensus': {'prun_thre_k': (2,)},
  'dare': {'method': ('dare_task_arithmetic', 'dare_linear')},
  'della': {'method': ('della_linear',)},
  'karcher': {'max_iter': (10,)},
  'slerp': {'t': (0.5,)},
}
"""What a peer's merge must have to be timed; elsewhere the first one is."""
TOLERANCE = 2e-5
"""Of the norm of a difference by that of the peer's task vector."""
LOOSER = {
  **dict.fromkeys(('breadcrumbs', 'consensus', 'sce', 'ties'), 2e-3),
  **dict.fromkeys(('iso_c', 'iso_cts', 'tsv_m', 'wudi'), 1e-3),
  'knots': 1e-2,
  **dict.fromkeys(('karcher', 'model_stock', 'slerp'), 1e-3),
}
"""The same where entries near a threshold, or singular vectors of values that
are close, may go either way (in KnOTS both), and where angles between whole
models count, of which task vectors are a small part."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """A merge to time.

  Attributes:
    method: its name in `dam_jax.catalogue`.
    name: empty, or whose meaning of the method it is.
    ours: makes our transformation, or a function `(base, experts) -> params`.
    cases: what peers call it, by peer.
  """

  method: str
  name: str
  ours: functools.partial
  cases: Mapping[str, Case]

  @property
  def random(self) -> bool:
    return any(case.given for case in self.cases.values())

  def make(self) -> Any:
    """Makes ours, which draws for itself what is drawn."""
    return self.ours()


def _weights(num: int) -> tuple[float, ...]:
  return tuple(itertools.islice(itertools.cycle(parity_cases.WEIGHTS), num))


def _fitted(case: Case, num: int) -> Case:
  """Returns a case whose weights are those of as many experts."""

  def fit(x):
    return _weights(num) if x is parity_cases.WEIGHTS else x

  ours = case.ours
  keywords = {key: fit(x) for key, x in ours.keywords.items()}
  options = {key: fit(x) for key, x in case.peer.options.items()}
  return dataclasses.replace(
    case,
    ours=functools.partial(ours.func, *map(fit, ours.args), **keywords),
    peer=case.peer._replace(options=options),
  )


def _case(method: str, peer: str) -> Case | None:
  """Returns the first case of a method and a peer that is wanted."""
  wanted = CHOSEN.get(method, {})
  for case in parity_cases.CASES:
    has = {**case.peer.options, 'method': case.peer.method}
    if (case.method, case.peer.name) == (method, peer) and all(
      has.get(key) in among for key, among in wanted.items()
    ):
      return case
  return None


def variants(method: str, num: int) -> list[Variant]:
  """Returns the merges of a method to time, none if it takes other numbers.

  Args:
    method: its name in `dam_jax.catalogue`.
    num: of experts.
  """
  entry = catalogue.DATA_FREE[method]
  if not entry.takes(num):
    return []
  found = {peer: _case(method, peer) for peer in ('fusion_bench', 'mergekit')}
  cases = {p: _fitted(case, num) for p, case in found.items() if case}
  if not cases:
    return [Variant(method, '', functools.partial(entry.factory), {})]
  groups: dict[str, dict[str, Case]] = {}
  for peer, case in cases.items():
    groups.setdefault(parity_runs.describe(case.ours), {})[peer] = case
  return [
    Variant(
      method,
      f'as {" ".join(group)}' if groups.keys() - {said} else '',
      next(iter(group.values())).ours,
      group,
    )
    for said, group in groups.items()
  ]


def find(method: str, name: str, num: int) -> Variant:
  """Returns one merge of a method by its variant's name."""
  return next(v for v in variants(method, num) if v.name == name)


def _bound(fn: functools.partial) -> dict[str, Any]:
  return inspect.signature(fn.func).bind(*fn.args, **fn.keywords).arguments


def options(ours: functools.partial) -> dict[str, Any] | None:
  """Returns the options of a merge for our command, None where it has none."""
  if ours.func is parity_cases.averaging:
    factory, *args = ours.args
    inner = options(functools.partial(factory, *args, **ours.keywords))
    return None if inner is None else {**inner, 'others': 'average'}
  if ours.func is parity_cases.dropped:
    bound = _bound(ours)
    then = bound.pop('then')  # and it draws for itself
    names = {e.factory: name for name, e in catalogue.DATA_FREE.items()}
    inner = {f'then.{key}': x for key, x in _bound(then).items()}
    return {**bound, 'then': names[then.func], **inner}
  factories = {entry.factory for entry in catalogue.DATA_FREE.values()}
  return _bound(ours) if ours.func in factories else None


def forms(variant: Variant) -> list[str]:
  """Returns how a merge can run in memory, see `benchmarks.merges_ours`."""
  found = ['stacked', 'donated']
  if isinstance(variant.make(), optax.GradientTransformation):
    found += ['leaves', 'leaves_donated']
  return found


def tolerance(variant: Variant) -> float:
  if variant.random:
    return max(case.tolerance for case in variant.cases.values())
  return LOOSER.get(variant.method, TOLERANCE)


def _describe(variant: Variant) -> dict[str, Any]:
  """Returns what the command must know, JSON values."""
  peers = {p: case.peer._asdict() for p, case in variant.cases.items()}
  if variant.method in ('average', 'task_arithmetic'):
    peers['numpy'] = {'method': variant.method, 'options': _bound(variant.ours)}
  # Our command has defaults for what its options cannot say.
  settled = options(variant.ours)
  return {
    'method': variant.method,
    'variant': variant.name,
    'says': parity_runs.describe(variant.ours),
    'forms': forms(variant),
    'peers': peers,
    'random': variant.random,
    'exact': settled is not None and not variant.random,
    'options': settled or {},
    'tolerance': tolerance(variant),
  }


def agree(
  method: str, name: str, num: int, pythons: Mapping[str, str]
) -> dict[str, float]:
  """Compares a random merge with peers, on given draws and small models.

  Args:
    method: its name.
    name: of the variant.
    num: of experts of the variant.
    pythons: by peer.

  Returns:
    The largest error relative to a leaf's largest entry, by peer.
  """
  cases = find(method, name, num).cases
  errors = {}
  for peer, case in cases.items():
    if peer in pythons:
      with tempfile.TemporaryDirectory() as folder:
        [row], _ = parity_runs.compare([case], pythons, Path(folder), 1)
      errors[peer] = row.worst.error
  return errors


def load(*, methods: Sequence[str], experts: Sequence[int]) -> Job:
  """Plans what is timed.

  Args:
    methods: names, or 'all'.
    experts: numbers of them.

  Returns:
    A job that says of itself `plan`, merges by number of experts, and
    `unknown`, methods that there are not.
  """
  known = list(catalogue.DATA_FREE)
  wanted = known if 'all' in methods else list(methods)
  unknown = [name for name in wanted if name not in known]
  plan = {
    num: [
      _describe(variant)
      for name in wanted
      if name in known
      for variant in variants(name, num)
    ]
    for num in experts
  }
  return Job(
    prepare=lambda: None,
    run=lambda _: None,
    about={'plan': plan, 'unknown': unknown},
    requests={'agree': lambda _, *args: agree(*args)},
  )
