"""Merges of random models by ours and by peers, and how far they are apart."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import itertools
import json
import os
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import parity_cases
from benchmarks import runs
from benchmarks.parity_cases import Case
import dam_jax as dj
from dam_jax import checkpoint

SHAPES = {
  'embed/weight': (13, 6),
  'layers/0/wide/weight': (5, 12),
  'layers/0/wide/bias': (5,),
  'layers/1/tall/weight': (17, 4),
  'layers/1/tall/bias': (17,),
  'layers/2/square/weight': (8, 8),
  'norm/weight': (7,),
  'patch/weight': (3, 2, 4, 5),
}
EXPERTS = {'plain': 3, 'tied': 3, 'still': 3, 'pair': 2}
"""Number of experts by kind of problem, see `make_problem`."""
STILL = {'embed/weight': 3, 'layers/2/square/weight': 1, 'norm/weight': 2}
"""How many experts did not move a leaf of a 'still' problem."""


def make_problem(folder: Path, kind: str, seed: int) -> None:
  """Writes a base, its experts, and what some methods read beside them.

  Args:
    folder: to write safetensors files into: `base`, `expert_<k>`; and, with a
      leading task axis, `uniform` draws, `fisher` diagonals and `gram` matrices
      of the inputs of `layers`.
    kind: 'plain', or 'pair' for two experts: normal values, task vectors of
      different sizes; 'tied': multiples of 1/8, so that magnitudes are equal
      and sums are zero; 'still': leaves that not every expert, or none, moved.
    seed: of the values.
  """
  rng = np.random.default_rng([seed, *kind.encode()])
  num = EXPERTS[kind]
  sizes = np.linspace(0.2, 0.6, num)
  models = {name: {} for name in ('base', 'uniform', 'fisher', 'gram')}
  experts = [{} for _ in range(num)]
  for name, shape in SHAPES.items():
    base = rng.normal(size=shape)
    deltas = np.stack([size * rng.normal(size=shape) for size in sizes])
    if kind == 'tied':
      base, deltas = np.round(8 * base) / 8, np.round(8 * deltas) / 8
    if kind == 'still':
      deltas[: STILL.get(name, 0)] = 0
    models['base'][name] = base
    models['uniform'][name] = rng.uniform(size=deltas.shape)
    models['fisher'][name] = rng.gamma(0.5, size=deltas.shape)
    if name.startswith('layers') and len(shape) == 2:
      x = rng.normal(size=(num, 3 * shape[1], shape[1]))
      gram = x.swapaxes(1, 2) @ x / x.shape[1]
      models['gram'][name.removesuffix('/weight')] = gram
    for expert, delta in zip(experts, deltas, strict=True):
      expert[name] = base + delta
  models |= {f'expert_{k}': expert for k, expert in enumerate(experts)}
  for name, leaves in models.items():
    leaves = {path: x.astype(np.float32) for path, x in leaves.items()}
    checkpoint.save_params(folder / f'{name}.safetensors', leaves)


def load(path: Path) -> Any:
  """Reads a pytree of float32 arrays from a safetensors file."""
  return jax.tree.map(jnp.asarray, checkpoint.load_params(path))


def load_models(folder: Path) -> tuple[Any, Any]:
  """Reads the base and the stacked experts of a problem."""
  paths = sorted(folder.glob('expert_*.safetensors'))
  models = checkpoint.load_experts(
    folder / 'base.safetensors', {path.stem: path for path in paths}
  )
  return jax.tree.map(jnp.asarray, models)


def merge_ours(case: Case) -> jax.stages.Wrapped:
  """Returns `(base, experts, given) -> params`, as a case says."""

  def merge(base, experts, given):
    keywords = {
      keyword: _drawn(given[name]) if name == 'uniform' else given[name]
      for keyword, name in case.given.items()
    }
    tx = case.ours(**keywords)
    if isinstance(tx, optax.GradientTransformation):
      return dj.merge(tx, base, experts).params
    return tx(base, experts)

  return jax.jit(merge)


def _drawn(uniform):
  # `chain` asks for every leaf twice, first to know shapes, then for values.
  draws = itertools.cycle(jax.tree.leaves(uniform))
  return lambda key, leaf: next(draws)


class Difference(NamedTuple):
  """How far two models are apart.

  Attributes:
    error: the largest `|ours - peer| / max|peer|` over leaves.
    leaf: where that is.
    entries: number of entries that differ by more than `tolerance`.
  """

  error: float
  leaf: str
  entries: int


def difference(ours: Any, peer: Any, tolerance: float) -> Difference:
  """Compares two models.

  Args:
    ours: a pytree of arrays.
    peer: the same; an entry that is not finite must be equal in both.
    tolerance: relative to the leaf's largest magnitude in `peer`.

  Returns:
    The difference, with the largest error of any leaf.

  Raises:
    ValueError: where names, shapes or dtypes differ.
  """
  lines = dj.tree.differences(peer, ours)
  if lines:
    raise ValueError('\n  '.join(['ours is not of the shape of peer:', *lines]))
  worst, entries = Difference(0.0, '', 0), 0
  ours, peer = dj.tree.flatten(ours), dj.tree.flatten(peer)
  for name in peer:
    a, b = (np.asarray(x[name], np.float64) for x in (ours, peer))
    with np.errstate(invalid='ignore'):
      gap = np.where(a == b, 0.0, np.abs(a - b))
    gap[np.isnan(a) & np.isnan(b)] = 0
    errors = np.nan_to_num(gap, nan=np.inf) / (
      np.abs(b[np.isfinite(b)]).max(initial=0) or 1.0
    )
    entries += int((errors > tolerance).sum())
    if errors.max() > worst.error:
      worst = Difference(float(errors.max()), name, 0)
  return worst._replace(entries=entries)


def run_peer(
  name: str, python: str, folder: Path, jobs: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
  """Has a peer merge files in its own environment.

  Args:
    name: 'fusion_bench' or 'mergekit'.
    python: of an environment that has the peer.
    folder: of the problems; merged models go to its folder `merged`.
    jobs: fields of `benchmarks.peer_files.Job`.

  Returns:
    Versions of the peer's packages.

  Raises:
    ValueError: where there is no such Python.
    RuntimeError: where the peer fails, with the end of what it printed.
  """
  found = shutil.which(python)
  if found is None:
    raise ValueError(f'{name}: no such program: {python}')
  folder = folder.resolve()
  (folder / f'{name}.jobs.json').write_text(json.dumps(jobs))
  python = os.path.abspath(found)
  runs.check_module(name, python, f'peer_{name}', folder, name, cwd=folder)
  return json.loads((folder / f'{name}.versions.json').read_text())


class Row(NamedTuple):
  """A case and what came of it.

  Attributes:
    case: that was run.
    verdict: one of those of `judge`.
    worst: the largest difference of any problem; None without ours.
  """

  case: Case
  verdict: str
  worst: Difference | None


FAILURES = 'DIFFERS', 'GAP CLOSED'


def judge(case: Case, worst: Difference | None) -> str:
  """Returns 'same', 'known gap' or 'peer only', or one of `FAILURES`."""
  if worst is None:
    return 'peer only'
  if worst.error <= case.tolerance:
    return 'GAP CLOSED' if case.gap else 'same'
  return 'known gap' if case.gap else 'DIFFERS'


def compare(
  cases: Sequence[Case],
  pythons: Mapping[str, str],
  folder: Path,
  seeds: int,
) -> tuple[list[Row], dict[str, dict[str, str]]]:
  """Merges every problem of every case by both, and compares.

  Args:
    cases: of peers that `pythons` has.
    pythons: by peer.
    folder: for files.
    seeds: number of random models of each kind.

  Returns:
    One row a case, and the versions of each peer's packages.
  """
  wanted = dict.fromkeys(kind for case in cases for kind in case.problems)
  for kind, seed in itertools.product(wanted, range(seeds)):
    make_problem(folder / f'{kind}_{seed}', kind, seed)
  problems = {
    i: [f'{kind}_{seed}' for kind in case.problems for seed in range(seeds)]
    for i, case in enumerate(cases)
  }
  versions = {}
  for name, python in pythons.items():
    jobs = [
      {
        'folder': problem,
        'method': case.peer.method,
        'options': case.peer.options,
        'inputs': case.peer.inputs,
        'out': f'{i}_{problem}',
      }
      for i, case in enumerate(cases)
      for problem in problems[i]
      if case.peer.name == name
    ]
    if jobs:
      versions[name] = run_peer(name, python, folder, jobs)
  rows = []
  for i, case in enumerate(cases):
    worst = None
    if case.ours is not None:
      worst = max(_differences(i, case, folder, problems[i]))
    rows.append(Row(case, judge(case, worst), worst))
  return rows, versions


def _differences(i, case, folder, problems):
  merge = merge_ours(case)
  for problem in problems:
    at = folder / problem
    given = {n: load(at / f'{n}.safetensors') for n in case.given.values()}
    ours = merge(*load_models(at), given)
    peer = load(folder / 'merged' / f'{i}_{problem}.safetensors')
    yield difference(ours, peer, case.tolerance)


def select(methods: str, peers: Iterable[str]) -> list[Case]:
  """Returns the cases of some methods, 'all' or names with commas, and peers.

  Raises:
    ValueError: where there is no such method.
  """
  known = list(dict.fromkeys(case.method for case in parity_cases.CASES))
  wanted = known if methods == 'all' else methods.split(',')
  unknown = [name for name in wanted if name not in known]
  if unknown:
    raise ValueError(
      f'no such method: {", ".join(unknown)}; there are {", ".join(known)}'
    )
  peers = set(peers)
  return [
    case
    for case in parity_cases.CASES
    if case.method in wanted and case.peer.name in peers
  ]


def describe(fn: Any) -> str:
  """Returns a call, `ties(0.2, merge=sum)`, of a partial function or a peer."""
  if isinstance(fn, functools.partial):
    name, args, keywords = fn.func.__name__, fn.args, fn.keywords
  else:
    name, args, keywords = fn.method, (), fn.options
  parts = [_text(x) for x in args]
  parts += [f'{key}={_text(x)}' for key, x in keywords.items()]
  return f'{name}({", ".join(parts)})'


def _text(x: Any) -> str:
  if isinstance(x, functools.partial):
    return describe(x)
  if callable(x):
    return x.__name__
  return f'{x:g}' if isinstance(x, float) else str(x)


def record(row: Row) -> dict[str, Any]:
  """Returns a row as JSON values."""
  case, said, worst = row
  return {
    'method': case.method,
    'problems': case.problems,
    'ours': describe(case.ours) if case.ours else None,
    'program': case.peer.name,
    'peer': describe(case.peer),
    'verdict': said,
    'gap': case.gap,
    **(worst._asdict() if worst else {}),
  }
