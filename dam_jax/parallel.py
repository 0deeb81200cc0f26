"""One step for all layouts: a merge over a mesh, and one for `jax.pmap`."""

from collections.abc import Sequence
import dataclasses
import functools
import inspect
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dam_jax import sharding
from dam_jax import tree
from dam_jax import turns
from dam_jax.base import Merger
from dam_jax.layout import Layout
from dam_jax.sharding import Rules
from dam_jax.typing import Batch


@dataclasses.dataclass(frozen=True)
class _Forward:
  """Brings a raveled model to where a forward pass reads it."""

  mesh: Mesh
  dtype: Any
  splits: tuple[tuple[str, P], ...]

  def vector(self, vector: jax.Array) -> jax.Array:
    """Gathers all of it at once, which no leaf can do as fast."""
    vector = vector if self.dtype is None else vector.astype(self.dtype)
    return _constrain(vector, self.mesh, P())

  def leaf(self, name: str, leaf: jax.Array) -> jax.Array:
    """Splits a leaf as the rules say."""
    spec = dict(self.splits).get(name)
    return leaf if spec is None else _constrain(leaf, self.mesh, spec)


def _constrain(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def data_parallel(
  merger: Merger,
  mesh: Mesh,
  rules: Rules | None = None,
  *,
  shard_state: bool = True,
  forward_dtype: Any = None,
) -> Merger:
  """Makes a merge over all devices of a mesh, which learns the same.

  Args:
    merger: any; its functions are traced.
    mesh: from `sharding.make_mesh`, with Auto or Explicit axes.
    rules: how the merged weights are split over 'model' in a forward pass, and
      where there are no steps, in the result; None splits none of them in the
      former, and in the latter each as `sharding.fsdp` has it.
    shard_state: whether each device keeps only its rows of the task vectors,
      masks and moments, and the merged weights are gathered for each forward
      pass; False keeps all of them on every device.
    forward_dtype: to which the merged weights are cast before they are
      gathered, such as `jnp.bfloat16`; None leaves them.

  Returns:
    A merger of compiled functions. `step` donates its state, wants images that
    divide over 'data', and is fastest on models from `sharding.place`.

  Raises:
    ValueError: at the first call, where rules or images do not fit.

  Examples:
    >>> def logits_fn(params, images):
    ...   return jnp.mean(images, (-3, -2)) @ params['w']
    >>> mesh = dj.sharding.make_mesh({'data': 8})
    >>> merger = data_parallel(dj.adamerging(logits_fn, steps=1), mesh)
    >>> base, experts = {'w': jnp.zeros((3, 5))}, {'w': jnp.ones((2, 3, 5))}
    >>> state = merger.init(jax.random.key(0), base, experts)
    >>> images = jnp.ones((merger.plan.phases, 2, 16, 4, 4, 3))
    >>> state, _ = merger.step(state, base, experts, dj.Batch(images))
    >>> merger.finalize(state, base, experts)['w'].shape
    (3, 5)
  """
  mesh = sharding.auto(mesh)
  if not merger.plan.steps:
    return merger._replace(finalize=_split_result(merger, mesh, rules))
  shards = mesh.size if shard_state else 1

  def ravel(model, leading, dtype=forward_dtype):
    if not isinstance(model, tree.Raveled) or model.layout.shards != shards:
      model = tree.ravel(tree.unravel(model), leading=leading, shards=shards)
    layout = model.layout
    return dataclasses.replace(
      model,
      vector=_spread(model.vector, layout, mesh),
      placement=_Forward(mesh, dtype, _splits(layout, rules, mesh)),
    )

  def init_fn(key, base, experts):
    flat, stacked = ravel(base, 0), ravel(experts, 1)
    state = merger.init(key, flat, stacked)
    return jax.tree.map(lambda x: _spread(x, flat.layout, mesh), state)

  def step_fn(state, base, experts, batch):
    flat, stacked = ravel(base, 0), ravel(experts, 1)
    batch = jax.tree.map(lambda x: _split_images(x, mesh), batch)
    state, metrics = merger.step(state, flat, stacked, batch)
    state = jax.tree.map(lambda x: _spread(x, flat.layout, mesh), state)
    return state, metrics

  def finalize_fn(state, base, experts):
    whole = ravel(base, 0, dtype=None), ravel(experts, 1, dtype=None)
    return merger.finalize(state, *whole)

  return Merger(
    jax.jit(init_fn),
    jax.jit(step_fn, donate_argnums=0),
    jax.jit(finalize_fn),
    merger.plan,
  )


def _split_result(merger: Merger, mesh: Mesh, rules: Rules | None):
  """Returns `finalize`, compiled, whose result is split over a mesh."""

  def split(params):
    if rules is None:
      return sharding.fsdp(params, mesh)
    return sharding.specs(params, rules, mesh)

  def finalize_fn(state, base, experts):
    base, experts = tree.unravel(base), tree.unravel(experts)
    finalize = merger.finalize
    in_turns = mesh.size > 1 and merger.plan.leafwise
    if in_turns and merger.plan.placewise:
      in_turns = turns.asks(merger, state, base, experts)
    if in_turns:
      finalize = turns.finalize(merger, mesh, sharding.fsdp(base, mesh))
    params = finalize(state, base, experts)
    return _constrain_all(params, mesh, split(params))

  return jax.jit(finalize_fn)


def _constrain_all(params: Any, mesh: Mesh, splits: Any) -> Any:
  return jax.tree.map(lambda x, spec: _constrain(x, mesh, spec), params, splits)


def _splits(layout: Layout, rules: Rules | None, mesh: Mesh):
  """Returns how leaves are split in a forward pass, by path."""
  if rules is None:
    return ()
  leaves = {
    name: jax.ShapeDtypeStruct(shape, layout.dtype)
    for name, shape in zip(layout.names, layout.shapes, strict=True)
  }
  return tuple(tree.flatten(sharding.specs(leaves, rules, mesh)).items())


def state_spec(x: Any, layout: Layout, mesh: Mesh) -> P:
  """Says how `data_parallel` splits an array of a state, or a raveled model.

  Args:
    x: array or `jax.ShapeDtypeStruct`.
    layout: of the raveled models.
    mesh: of the devices.

  Returns:
    Its rows over all devices, where it has one for each entry of a model; a
    copy on each device otherwise.
  """
  if layout.shards > 1 and x.shape[-2:] == layout.shape:
    return sharding.row_spec(x.ndim, mesh)
  return P()


def _spread(x: jax.Array, layout: Layout, mesh: Mesh) -> jax.Array:
  return _constrain(x, mesh, state_spec(x, layout, mesh))


def restore(saves: Any, like: Any, layout: Layout, mesh: Mesh) -> Any:
  """Reads the newest save of a merge, which may be of another mesh.

  Args:
    saves: a `dam_jax.checkpoint.Saves`.
    like: a state of this run, from `init`.
    layout: of the models that it was made from, as `sharding.place` ravels
      them.
    mesh: of the devices.

  Returns:
    The `dam_jax.checkpoint.Save`, its state laid over this mesh; None where
    there is none.

  Raises:
    ValueError: as `Saves.restore` does.
  """
  if not saves.steps:
    return None
  known = saves.shapes()
  found = {
    _rows_of(known[path].shape, layout)
    for path, x in tree.flatten(like).items()
    if path in known and _is_raveled(x, layout)
  }
  old = dataclasses.replace(layout, shards=found.pop() if found else 1)
  if found or old.shards in (0, layout.shards):
    return saves.restore(like)  # which says what differs, if anything
  even = old.shards % mesh.size == 0

  def abstract(x):
    if not _is_raveled(x, layout):
      return x
    shape = (*x.shape[: x.ndim - len(layout.shape)], *old.shape)
    spec = sharding.row_spec(len(shape), mesh) if even else P()
    return jax.ShapeDtypeStruct(
      shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  save = saves.restore(jax.tree.map(abstract, like))

  def resplit(x):
    moved = _is_raveled(x, old)
    return _spread(old.resplit(x, layout.shards) if moved else x, layout, mesh)

  resplit_all = jax.jit(lambda state: jax.tree.map(resplit, state))
  return save._replace(state=resplit_all(save.state))


def _is_raveled(x: Any, layout: Layout) -> bool:
  return _ends_with(x.shape, layout.shape)


def _rows_of(shape: tuple[int, ...], layout: Layout) -> int:
  """Returns over how many shards an array was raveled, 0 if it was not."""
  for rows in (1, *shape[-2:-1]):
    other = dataclasses.replace(layout, shards=max(1, rows))
    if rows and _ends_with(shape, other.shape):
      return rows
  return 0


def _ends_with(shape: tuple[int, ...], end: tuple[int, ...]) -> bool:
  return shape[max(0, len(shape) - len(end)) :] == end


def _split_images(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Splits `[S, T, B, ...]` over images."""
  sharding.check_images(x.shape[2], mesh.shape['data'])
  return _constrain(x, mesh, P(None, None, 'data'))


def pmap_form(
  merger: Merger,
  axis_name: str = 'data',
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Merger:
  """Makes a merge for `jax.pmap`, which learns the same.

  Every device has all of the state and its part of the images: states, batches
  and metrics have a leading axis over devices, base and experts do not. New
  code is better off with `data_parallel`.

  Args:
    merger: a learned one, whose step takes an `axis_name`.
    axis_name: of the axis over devices.
    devices: None takes all local ones, `n`.

  Returns:
    A merger: `init` gives a state `[n, ...]`; `step` takes it, donated, with
    `Batch` leaves `[n, S, T, B / n, ...]`; `finalize` reads the first device's.

  Raises:
    ValueError: where the merger's step has no such argument.
  """
  if 'axis_name' not in inspect.signature(merger.step).parameters:
    raise ValueError(
      'this merge cannot average over devices: its step takes no axis_name'
    )
  devices = jax.local_devices() if devices is None else list(devices)
  each = functools.partial(jax.pmap, axis_name=axis_name, devices=devices)
  init = each(
    lambda _, *args: merger.init(*args), in_axes=(0, None, None, None)
  )
  step = each(
    functools.partial(merger.step, axis_name=axis_name),
    in_axes=(0, None, None, 0),
    donate_argnums=0,
  )

  def init_fn(key, base, experts):
    return init(np.arange(len(devices)), key, base, experts)

  def finalize_fn(state, base, experts):
    return merger.finalize(jax.tree.map(lambda x: x[0], state), base, experts)

  return Merger(init_fn, step, finalize_fn, merger.plan)


def split_batch(batch: Batch, num: int) -> Batch:
  """Gives each of `num` devices its images, for `pmap_form`.

  Args:
    batch: leaves `[S, T, B, ...]`.
    num: of devices, `n`.

  Returns:
    Leaves `[n, S, T, B / n, ...]`.

  Raises:
    ValueError: where images do not divide.

  Examples:
    >>> split_batch(dj.Batch(jnp.ones((1, 2, 16, 4, 4, 3))), 8).images.shape
    (8, 1, 2, 2, 4, 4, 3)
  """

  def split(x):
    sharding.check_images(x.shape[2], num)
    x = x.reshape(*x.shape[:2], num, -1, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)

  return jax.tree.map(split, batch)
