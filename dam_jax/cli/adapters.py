"""Merges of LoRA adapters that stay adapters: no update is ever formed."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dam_jax import catalogue
from dam_jax import checkpoint
from dam_jax import spectral
from dam_jax.cli import job as jobs

METHODS = ('average', 'weighted_average', 'task_arithmetic', 'knots')
"""Sums of updates, and KnOTS."""


def merge(job: jobs.Job, rank: int | None = None) -> checkpoint.Lora:
  """Merges LoRA adapters into one.

  Args:
    job: whose experts are all adapters of its base; without rules.
    rank: of the result, which is then approximate; None keeps the sum of the
      ranks, which is exact.

  Returns:
    The merged adapter, with the first expert's config.

  Raises:
    ValueError: where the base cannot take an expert, or the job has more than
      adapters can do.
  """
  lines = []
  if job.method not in METHODS:
    lines.append(f'method: got {job.method!r}, want one of {METHODS}')
  if job.rules or job.labels or job.vocabulary:
    lines.append('rules and vocabularies are of models, not of adapters')
  if job.dtype is not None:
    lines.append('dtype: adapters are written in float32')
  if lines:
    raise ValueError('\n  '.join(['an adapter cannot be written:', *lines]))
  base = checkpoint.open_model(job.base)
  loras = [checkpoint.open_lora(path) for path in job.experts.values()]
  for lora in loras:
    checkpoint.expand(base, lora)  # checks every leaf, and reads none
  if job.method == 'knots':
    merged = _knots(loras, job.options)
  else:
    merged = checkpoint.concat(loras, _weights(job, len(loras)))
  return merged if rank is None else checkpoint.truncate(merged, rank)


def record(job: jobs.Job, command: str | None = None) -> checkpoint.MergeRecord:
  """Returns the record of a merge of adapters.

  Args:
    job: that was done.
    command: that did it.
  """
  base = checkpoint.open_model(job.base)
  hashes = {
    name: checkpoint.model_hashes(
      dataclasses.replace(base, files=checkpoint.open_lora(path).files)
    )
    for name, path in job.experts.items()
  }
  hashes = {'base': checkpoint.model_hashes(base), **hashes}
  return jobs.make_record(job, base, hashes, command=command)


def _weights(job: jobs.Job, num: int) -> list[float]:
  """Returns what the method multiplies each update with."""
  tx = catalogue.build(job.method, job.options)
  eye = jnp.eye(num)
  # The methods are linear: the update of task t alone shows its weight.
  weights, _ = tx.update(eye, tx.init(eye[0]), jnp.zeros(num))
  return np.asarray(weights).tolist()


def _knots(
  loras: list[checkpoint.Lora], options: Mapping[str, Any]
) -> checkpoint.Lora:
  """Merges in the outputs' common basis, from the factors alone."""
  allowed = {k for k in options if k in ('then', 'scaled') or '.' in k}
  if set(options) - allowed:
    raise ValueError(
      f'knots of adapters takes then and scaled, got {sorted(options)}'
    )
  inner = {
    key.removeprefix('then.'): x
    for key, x in options.items()
    if key.startswith('then.')
  }
  then = catalogue.build(options.get('then', 'ties'), inner)
  # With zeros for what a LoRA lacks, factors of all have one shape.
  whole = checkpoint.concat(loras, [1.0] * len(loras))
  ranks = {p: max(_rank(x, p) for x in loras) for p in whole.factors}
  b = {
    p: jnp.stack([_side(x, p, 'b', ranks[p], f) for x in loras])
    for p, f in whole.factors.items()
  }
  a = {
    p: jnp.stack([_side(x, p, 'a', ranks[p], f) for x in loras])
    for p, f in whole.factors.items()
  }
  b, a = spectral.knots_lora(
    b, a, then=then, scaled=bool(options.get('scaled', False))
  )
  factors = {
    path: dataclasses.replace(f, a=np.asarray(a[path]), b=np.asarray(b[path]))
    for path, f in whole.factors.items()
  }
  return dataclasses.replace(whole, factors=factors)


def _rank(lora: checkpoint.Lora, path: str) -> int:
  return lora.factors[path].rank if path in lora.factors else 0


def _side(lora, path, side, rank, like) -> np.ndarray:
  """Returns `a` or `b` with zeros up to a rank, the scaling in `b`."""
  axis = 0 if side == 'a' else 1
  shape = list(getattr(like, side).shape)
  shape[axis] = rank
  out = np.zeros(shape, np.float32)
  if path in lora.factors:
    f = lora.factors[path]
    own = np.asarray(getattr(f, side), np.float32)
    out[tuple(slice(n) for n in own.shape)] = own * (
      f.scaling if side == 'b' else 1
    )
  return out
