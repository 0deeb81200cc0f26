"""Merges over many devices: meshes, rules, and one step for all layouts.

A mesh has the axes 'data', over which a step's images are split, and 'model'.
The state of a learned merge (task vectors, masks, their moments) is raveled,
and cut into as many rows as there are devices, over both axes. Only the merged
weights are gathered, once a forward pass and in half precision where asked;
rules may leave them split over 'model' there.

  >>> mesh = make_mesh({'data': 4, 'model': 2})
  >>> dict(mesh.shape)
  {'data': 4, 'model': 2}

`dam_jax.parallel` makes a merge that runs on such a mesh.

References:
  Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion
  Parameter Models <https://arxiv.org/abs/1910.02054>`_, 2020
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dam_jax import tree
from dam_jax.typing import Params

Rules = Sequence[tuple[str, P]]
"""Regular expressions of whole paths, and how what they match is split."""

AXES = ('data', 'model')
"""Of every mesh: the first splits images, both split state."""

VIT = (
  (r'.*/(q_proj|k_proj|v_proj|fc1)/kernel', P(None, 'model')),
  (r'.*/(q_proj|k_proj|v_proj|fc1)/bias', P('model')),
  (r'.*/(out_proj|fc2)/kernel', P('model', None)),
  (r'.*', P()),
)
"""Rules for `dam_jax.models.clip.VisionTower`: each block's heads and hidden
units are split, and two sums a block put it together."""

CLIP = ((r'text/embeddings/token_embedding', P('model', None)), *VIT)
"""Rules for `dam_jax.models.towers.CLIP`: those of `VIT`, which hold for the
blocks of both towers, and the rows of the vocabulary are split."""


def make_mesh(
  sizes: Mapping[str, int] | None = None,
  *,
  devices: Sequence[jax.Device] | None = None,
  explicit: bool = False,
) -> Mesh:
  """Makes a mesh of `AXES`.

  Args:
    sizes: of axes by name; -1, for one of them, takes what is left, and an axis
      that is not named is 1. None is `{'data': -1}`.
    devices: in order; None takes all, of all hosts.
    explicit: whether arrays' types are to show how they are split.

  Returns:
    The mesh.

  Raises:
    ValueError: where an axis is unknown, or sizes do not fit the devices.

  Examples:
    >>> make_mesh({'model': 2}, devices=jax.devices()[:2]).size
    2
  """
  sizes = {'data': -1} if sizes is None else dict(sizes)
  devices = jax.devices() if devices is None else list(devices)
  lines = [
    f'axis {name!r} is none of {AXES}' for name in sizes if name not in AXES
  ]
  lines += [
    f'axis {name!r} must be positive, or -1, got {size}'
    for name, size in sizes.items()
    if size < 1 and size != -1
  ]
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    lines.append(f'only one axis can be -1, got {" and ".join(free)}')
  if not lines:
    known = math.prod(size for size in sizes.values() if size != -1)
    for name in free:
      sizes[name] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
      lines.append(
        f'{" x ".join(f"{k}={v}" for k, v in sizes.items())} is not the number '
        f'of devices, {len(devices)}'
      )
  if lines:
    raise ValueError('\n  '.join(['a mesh:', *lines]))
  kind = AxisType.Explicit if explicit else AxisType.Auto
  shape = tuple(sizes.get(name, 1) for name in AXES)
  return jax.make_mesh(
    shape, AXES, devices=devices, axis_types=(kind,) * len(AXES)
  )


def auto(mesh: Mesh) -> Mesh:
  """Returns a mesh of the same devices whose arrays do not show their split."""
  kinds = (AxisType.Auto,) * len(mesh.axis_names)
  return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def check_images(num: int, devices: int) -> None:
  """Raises unless a draw's images divide over devices.

  Args:
    num: images a task.
    devices: that each get as many of them.

  Raises:
    ValueError: where they do not divide.
  """
  if num % devices:
    raise ValueError(
      f'{num} images a task do not divide over {devices} devices'
    )


def specs(params: Params, rules: Rules, mesh: Mesh, *, leading: int = 0) -> Any:
  """Says how each leaf of a pytree is split, by the first rule that matches.

  Args:
    params: any pytree; arrays or `jax.ShapeDtypeStruct`s.
    rules: tried in order on whole paths; every leaf must match one, and every
      rule a leaf.
    mesh: of the devices.
    leading: how many leading axes leaves have that rules do not speak of, such
      as the task axis of stacked experts; they are not split.

  Returns:
    A pytree of `PartitionSpec`s.

  Raises:
    ValueError: with all leaves that match no rule or do not divide, or all
      rules that match no leaf.

  Examples:
    >>> mesh = make_mesh({'data': 4, 'model': 2})
    >>> rules = [('.*/w', P(None, 'model'))]
    >>> split = specs({'fc': {'w': jnp.zeros((4, 6))}}, rules, mesh)
    >>> split['fc']['w'] == P(None, 'model')
    True
  """
  labels = tree.label_by_path(params, rules)
  found = jax.tree.map(lambda spec: P(*(None,) * leading, *spec), labels)
  lines = [
    line
    for (path, leaf), spec in zip(
      tree.flatten(params).items(), jax.tree.leaves(found), strict=True
    )
    for line in _misfits(path, jnp.shape(leaf), spec, mesh)
  ]
  if lines:
    raise ValueError('\n  '.join(['leaves that cannot be split so:', *lines]))
  _log(params, found)
  return found


def parts(spec: P, mesh: Mesh) -> list[int]:
  """Returns into how many parts a spec splits each axis it speaks of."""
  groups = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
  return [math.prod(mesh.shape[axis] for axis in axes) for axes in groups]


def _misfits(path, shape, spec: P, mesh: Mesh) -> list[str]:
  nums = parts(spec, mesh)
  if len(nums) > len(shape):
    return [f'{path}: {spec} speaks of more axes than {list(shape)} has']
  return [
    f'{path}: axis {i} of {list(shape)} does not divide into {num}, as {spec} '
    'says'
    for i, num in enumerate(nums)
    if shape[i] % num
  ]


def _log(params: Params, found: Any) -> None:
  leaves = tree.flatten(params)
  for (path, leaf), spec in zip(
    leaves.items(), jax.tree.leaves(found), strict=True
  ):
    logging.info('%s %s: %s', path, list(jnp.shape(leaf)), spec)


def fsdp(
  params: Params, mesh: Mesh, *, leading: int = 0, least: int = 1024
) -> Any:
  """Splits each leaf of any pytree over all devices, along its first axis.

  Parts along the first axis are runs of bytes in a file, and what flattens a
  leaf leaves them where they are. Where it does not divide over the devices the
  next one that does is split.

  Args:
    params: any pytree; arrays or `jax.ShapeDtypeStruct`s.
    mesh: of the devices.
    leading: how many leading axes are not to be split, such as the task axis.
    least: entries, without those axes, below which a leaf is not split.

  Returns:
    A pytree of `PartitionSpec`s; a leaf none of whose axes divides is not
    split.

  Examples:
    >>> mesh = make_mesh({'data': 8})
    >>> params = {'w': jnp.zeros((24, 64)), 'b': jnp.zeros(64)}
    >>> fsdp(params, mesh) == {'b': P(), 'w': P(('data', 'model'))}
    True
  """

  def spec(leaf):
    shape = jnp.shape(leaf)[leading:]
    even = [i for i, size in enumerate(shape) if size % mesh.size == 0]
    if not even or math.prod(shape) < least:
      return P()
    return P(*(None,) * (leading + even[0]), mesh.axis_names)

  found = jax.tree.map(spec, params)
  _log(params, found)
  return found


def put(params: Params, mesh: Mesh, splits: Any) -> Params:
  """Places a pytree on a mesh.

  Args:
    params: arrays, of NumPy or JAX; the same on all hosts.
    mesh: of the devices.
    splits: a pytree of `PartitionSpec`s like it, from `specs` or `fsdp`.

  Returns:
    The same, split.
  """
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, splits
  )


def place(
  base: Params | tree.Raveled, experts: Params | tree.Raveled, mesh: Mesh
) -> tuple[tree.Raveled, tree.Raveled]:
  """Ravels a base and its experts, each device's rows on that device alone.

  No device ever holds more than its rows, and the host one row at a time
  beside the models it was given.

  Args:
    base: parameters, of NumPy or JAX; the same on all hosts.
    experts: stacked `[K, ...]`, likewise.
    mesh: of the devices.

  Returns:
    Both raveled, over as many shards as there are devices: what a merger from
    `data_parallel` reads without moving it.

  Raises:
    ValueError: where experts do not fit the base.

  Examples:
    >>> base, experts = {'w': jnp.zeros(16)}, {'w': jnp.ones((3, 16))}
    >>> flat, stacked = place(base, experts, make_mesh())
    >>> stacked.vector.shape, stacked.vector.sharding.shard_shape((3, 8, 2))
    ((3, 8, 2), (3, 1, 2))
  """
  base, experts = tree.unravel(base), tree.unravel(experts)
  tree.check_stacked(base, experts)
  mesh = auto(mesh)
  return _place(base, 0, mesh), _place(experts, 1, mesh)


def _place(model: Params, leading: int, mesh: Mesh) -> tree.Raveled:
  layout = tree.layout_of(model, leading=leading, shards=mesh.size)
  leaves = jax.tree.leaves(model)
  lead = jnp.shape(leaves[layout.order[0]])[:leading]

  def rows(index):
    first, last, _ = index[leading].indices(layout.shards)
    parts = []
    for i, size, width in zip(
      layout.order, layout.sizes, layout.widths, strict=True
    ):
      flat = np.asarray(leaves[i]).reshape(*lead, size)
      part = flat[..., first * width : last * width].astype(layout.dtype)
      pad = (last - first) * width - part.shape[-1]
      part = np.pad(part, [(0, 0)] * leading + [(0, pad)])
      parts.append(part.reshape(*lead, last - first, width))
    return np.concatenate(parts, axis=-1)

  shape = (*lead, layout.shards, sum(layout.widths))
  sharding = NamedSharding(mesh, row_spec(len(shape), mesh))
  vector = jax.make_array_from_callback(shape, sharding, rows)
  if layout.shards == 1:
    vector = vector[..., 0, :]
  rest = [
    jax.device_put(x, NamedSharding(mesh, P())) for x in tree.rest_of(model)
  ]
  return tree.Raveled(vector, tuple(rest), layout)


def row_spec(ndim: int, mesh: Mesh) -> P:
  """Splits the rows `[..., N, Q]` of a raveled vector over all devices."""
  return P(*(None,) * (ndim - 2), mesh.axis_names, None)
