"""Our merges of files held in memory, for `benchmarks.worker`."""

from collections.abc import Iterator
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import merge_cases
from benchmarks.merge_runs import expert_paths
from benchmarks.worker import Job
import dam_jax as dj
from dam_jax import checkpoint


def _arrays(params: Any) -> Any:
  return jax.block_until_ready(jax.tree.map(jnp.array, params))


def _read(folder: Path, form: str, num: int) -> tuple[Any, Any]:
  base, paths = folder / 'base.safetensors', expert_paths(folder, num)
  if form.startswith('leaves'):
    models = [_arrays(checkpoint.load_params(path)) for path in (base, *paths)]
    return models[0], models[1:]
  named = {path.stem: path for path in paths}
  base, experts = checkpoint.load_experts(base, named)
  return _arrays(base), _arrays(experts)


def _draws(folder: Path, num: int) -> Iterator[tuple[Any, Any]]:
  """Yields models of random entries, each time others."""
  shapes = checkpoint.load_abstract(folder / 'base.safetensors')

  @jax.jit
  def draw(key):
    keys = dj.transforms.leaf_keys(key, shapes)
    normal = jax.random.normal
    return (
      jax.tree.map(lambda k, x: normal(k, x.shape), keys, shapes),
      jax.tree.map(lambda k, x: normal(k, (num, *x.shape)), keys, shapes),
    )

  for seed in itertools.count():
    yield jax.block_until_ready(draw(jax.random.key(seed)))


def load(
  *,
  folder: str,
  method: str,
  variant: str,
  form: str,
  num: int,
  threads: int,
) -> Job:
  """Reads a base and its experts; the threads are those of the process.

  Args:
    folder: of the models.
    method: its name in `dam_jax.catalogue`.
    variant: which of those of `benchmarks.merge_cases`.
    form: 'stacked': `dj.merge` jitted; 'donated': with the base donated;
      'device': the same, on random models; 'leaves': `dj.streaming.merge`;
      'leaves_donated': with the base donated.
    num: of experts.
    threads: that the process was given.

  Returns:
    The merge.
  """
  tx = merge_cases.find(method, variant, num).make()
  donated = form in ('donated', 'device', 'leaves_donated')
  if form == 'device':
    prepare = functools.partial(next, _draws(Path(folder), num))
  else:
    base, experts = _read(Path(folder), form, num)

    def prepare():
      return (_arrays(base) if donated else base), experts

  def whole(base, experts):
    if isinstance(tx, optax.GradientTransformation):
      return dj.merge(tx, base, experts).params
    return tx(base, experts)

  if form.startswith('leaves'):
    merge = functools.partial(dj.streaming.merge, tx, donate_base=donated)
  else:
    merge = jax.jit(whole, donate_argnums=(0,) if donated else ())
  return Job(
    prepare=prepare,
    run=lambda given: jax.block_until_ready(merge(*given)),
    about={
      'platform': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
      'threads': threads,
      'versions': checkpoint.versions(),
    },
    requests={
      'difference': functools.partial(
        _difference, Path(folder) / 'base.safetensors'
      )
    },
  )


def _difference(base_path: Path, params: Any, path: str) -> float:
  """Returns the norm of `ours - peer` by that of the peer's task vector."""
  base, model = map(checkpoint.open_model, (base_path, path))
  squares = np.zeros(2)
  for name, ours in dj.tree.flatten(params).items():
    peer = np.asarray(model.read(name), np.float64)
    gaps = ours - peer, peer - base.read(name)
    squares += [float(np.sum(np.square(gap))) for gap in gaps]
  return float(np.sqrt(squares[0] / (squares[1] or 1)))
