"""Merges over a mesh whose devices take turns at whole leaves.

What ranks the entries of a unit or decomposes a matrix wants that leaf whole,
and no other. Leaves of one shape and split are taken as many at a time as there
are devices: each device gives the others its part of theirs and gets theirs of
its own, merges the one leaf that it then has whole, and gives the parts back.
So every entry travels once there and once back, no two devices do the same, and
none holds more than its share of all models, that share once more, and one leaf
of each expert with what the merge computes of it.

What does to every entry the same (`dam_jax.base.Entrywise`) sends no entries:
where it asks for totals over the model, a device goes through its share block
by block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np

from dam_jax import selection
from dam_jax import tree
from dam_jax.base import Merger

BLOCK = 1 << 22
"""Entries of a block."""


def finalize(merger: Merger, mesh: Mesh, splits: Any) -> Callable[..., Any]:
  """Returns `finalize` of a merge, its leaves split and merged in turns.

  Args:
    merger: whose plan is leafwise.
    mesh: of the devices.
    splits: a pytree of `PartitionSpec`s like the base, each of which splits one
      axis over all devices, or none, as `dam_jax.sharding.fsdp` has it.

  Returns:
    `(state, base, experts) -> params`, to be traced.
  """

  def local(state, base, experts):
    return _Turns(merger, mesh, state, splits).merge(base, experts)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(), splits, jax.tree.map(lambda spec: P(None, *spec), splits)),
    out_specs=splits,
    # Loops of merges begin with zeros, which are the same on all devices.
    check_vma=False,
  )


def asks(merger: Merger, state: Any, base: Any, experts: Any) -> bool:
  """Whether to merge a leaf one must know of others, or of all entries."""
  finalize: Any = merger.finalize
  run = functools.partial(finalize, sum_parts=selection.Answers({}), salt=0)
  leaves = zip(jax.tree.leaves(base), jax.tree.leaves(experts), strict=True)
  moved = [pair for pair in leaves if tree.is_float(pair[0]) and pair[0].size]
  try:
    for pair in moved[:1]:
      jax.eval_shape(run, state, *pair)
  except selection.Asked:
    return True
  return False


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
  """Leaves of one shape, or blocks of entries, on one device.

  Attributes:
    num: how many turns they take, `R`.
    turn: of each its base `[N, ...]`, experts `[N, K, ...]`, salts `[N]`, and
      whether there is such a leaf `[N]`.
    axis: that is exchanged; None where a leaf is merged as it lies.
    alike: whether all devices have the same, of which one counts for totals.
  """

  num: int
  turn: Callable[[Any], tuple[Any, ...]]
  axis: int | None = None
  alike: bool = False


class _Pack(NamedTuple):
  """Leaves of the model by their places, laid into groups.

  Attributes:
    places: among the leaves.
    groups: that they are in.
    unpack: makes leaves of what was merged of each group, `[R N, ...]`.
  """

  places: Sequence[int]
  groups: Sequence[_Group]
  unpack: Callable[[list[jax.Array]], Iterable[jax.Array]]


class _Turns:
  """A merge as one device sees it."""

  def __init__(self, merger: Merger, mesh: Mesh, state: Any, splits: Any):
    self._finalize: Any = merger.finalize
    self._state = state
    self._entrywise = merger.plan.entrywise
    self._axes, self._size = mesh.axis_names, mesh.size
    self._splits = jax.tree.leaves(splits)
    self._x64 = jax.config.read('jax_enable_x64')

  def merge(self, base: Any, experts: Any) -> Any:
    """Merges this device's part of all leaves."""
    leaves = [jax.tree.leaves(x) for x in (base, experts)]
    kinds: dict[Any, list[int]] = {}
    for i, (leaf, spec) in enumerate(zip(leaves[0], self._splits, strict=True)):
      if tree.is_float(leaf) and leaf.size:
        shape = () if self._entrywise else leaf.shape
        kinds.setdefault((leaf.dtype, len(spec), shape), []).append(i)
    salts = [np.uint32(zlib.crc32(p.encode())) for p in tree.names(base)]
    packs = []
    for (_, axes, _), places in kinds.items():
      own = [[x[i] for i in places] for x in (*leaves, salts)]
      pack = self._blocks if self._entrywise else self._whole
      packs.append(pack(places, axes, *own))
    answers = self._answers([group for pack in packs for group in pack.groups])
    merged = [*leaves[0]]
    for pack in packs:
      found = pack.unpack([self._merged(x, answers) for x in pack.groups])
      for place, leaf in zip(pack.places, found, strict=False):
        merged[place] = leaf
    return jax.tree.unflatten(jax.tree.structure(base), merged)

  def _whole(self, places, axes: int, base, experts, salts) -> _Pack:
    """Lays out leaves of one shape, which devices have in parts."""
    num = self._size if axes else 1
    real = [np.True_] * len(places)
    turns = tuple(_in_turns(x, num) for x in (base, experts, salts, real))
    group = _Group(
      len(turns[0]),
      lambda i: jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), turns
      ),
      axis=axes - 1 if axes else None,
      alike=not axes,
    )
    return _Pack(places, [group], lambda merged: merged[0])

  def _blocks(self, places, axes: int, base, experts, salts) -> _Pack:
    """Lays out a device's entries of leaves, as blocks of one size and a rest.

    A rest, not padding: it would count in totals.
    """
    del salts
    flat = jnp.concatenate([x.reshape(-1) for x in base])
    rows = jnp.concatenate([x.reshape(x.shape[0], -1) for x in experts], axis=1)
    end = flat.size - flat.size % BLOCK

    def group(num, start, size):
      def turn(i):
        # A device may have more entries than 32 bits count.
        with jax.enable_x64(True):
          begin = start + jnp.asarray(i, jnp.int64) * size
          part = lax.dynamic_slice_in_dim(flat, begin, size)
          parts = lax.dynamic_slice_in_dim(rows, begin, size, axis=1)
        return (
          part[None],
          parts[None],
          jnp.zeros(1, jnp.uint32),
          jnp.ones(1, bool),
        )

      return _Group(num, turn, alike=not axes)

    groups = [group(end // BLOCK, 0, BLOCK)] if end else []
    if rest := flat.size - end:
      groups.append(group(1, end, rest))

    def unpack(merged):
      vector = jnp.concatenate([x.reshape(-1) for x in merged])
      parts = lax.split(vector, [x.size for x in base])
      return [y.reshape(x.shape) for x, y in zip(base, parts, strict=True)]

    return _Pack(places, groups, unpack)

  def _take(self, group: _Group, i: Any) -> tuple[Any, ...]:
    """Returns a whole leaf, its experts' and salt, and whether it counts."""
    base, experts, salt, real = group.turn(i)
    own = lax.axis_index(self._axes)
    if group.axis is None:
      return base[0], experts[0], salt[0], (own == 0) | (not group.alike)
    base = self._exchange(base, 0, 1 + group.axis)
    experts = self._exchange(experts, 0, 2 + group.axis)
    return base[0], experts[0], salt[own], real[own]

  def _exchange(self, x: jax.Array, split: int, concat: int) -> jax.Array:
    return lax.all_to_all(x, self._axes, split, concat, tiled=True)

  def _run(self, answers: Any, base: Any, experts: Any, salt: Any) -> Any:
    """Merges a leaf; raises `Asked` where more must be known."""
    with jax.enable_x64(self._x64):
      return self._finalize(
        self._state,
        base,
        experts,
        sum_parts=selection.Answers(answers),
        salt=salt,
      )

  def _asked(self, leaf: tuple[Any, ...]) -> selection.Asked | None:
    """Returns what a merge asks next, its part without values."""
    found: list[selection.Asked] = []

    def part(leaf):
      if (asked := self._ask(*leaf)) is None:
        return None
      found.append(asked)
      return asked.part

    shapes = jax.eval_shape(part, leaf)
    if not found:
      return None
    asked = found[0]
    return selection.Asked(asked.group, shapes, asked.finish, (), asked.largest)

  def _ask(self, *leaf: Any) -> selection.Asked | None:
    try:
      self._run(*leaf)
    except selection.Asked as asked:
      return asked
    return None

  def _merged(self, group: _Group, answers: Any) -> jax.Array:
    """Merges the leaves of a group, `[R N, ...]` as this device has them."""

    def turn(i):
      leaf = self._run(answers, *self._take(group, i)[:3])[None]
      if group.axis is None:
        return leaf
      return self._exchange(leaf, 1 + group.axis, 0)

    leaves = lax.map(turn, jnp.arange(group.num))
    return leaves.reshape(-1, *leaves.shape[2:])

  def _answers(self, groups: Iterable[_Group]) -> Mapping[str, Any]:
    """Answers all that is asked about the whole model, by group of leaves."""
    answers: dict[str, tuple[Any, ...]] = {}
    while True:
      asked: dict[str, Any] = {}
      totals: dict[str, Any] = {}
      for group in groups:
        if (question := self._question(group, answers)) is None:
          continue
        name, combine = question.group, _combine(question.largest)
        total, args = self._total(group, answers, question)
        with jax.enable_x64(True):
          if name in totals:
            total = jax.tree.map(combine, totals[name], total)
        asked[name], totals[name] = (question, args), total
      if not asked:
        return answers
      for name, (question, args) in asked.items():
        over = lax.pmax if question.largest else lax.psum
        with jax.enable_x64(True):
          answer = question.finish(over(totals[name], self._axes), *args)
        answers[name] = (*answers.get(name, ()), answer)

  def _question(self, group: _Group, answers: Any) -> selection.Asked | None:
    """Returns what the leaves of a group ask next."""
    leaf = jax.eval_shape(lambda: self._take(group, 0)[:3])
    return self._asked((answers, *leaf))

  def _total(
    self, group: _Group, answers: Any, question: selection.Asked
  ) -> tuple[Any, Any]:
    """Returns what this device has of a total, and what to finish it with."""
    combine = _combine(question.largest)

    def turn(total, i):
      *leaf, counts = self._take(group, i)
      asked: Any = self._ask(answers, *leaf)
      # Counts of the entries of a large model do not fit 32 bits.
      total = jax.tree.map(
        lambda t, x: jnp.where(counts, combine(t, x.astype(t.dtype)), t),
        total,
        asked.part,
      )
      return total, asked.args

    def start(x):
      if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.zeros(x.shape, jnp.int64)
      return jnp.full(x.shape, -jnp.inf if question.largest else 0, x.dtype)

    with jax.enable_x64(True):
      begin = jax.tree.map(start, question.part)
      total, args = lax.scan(turn, begin, jnp.arange(group.num))
    return total, jax.tree.map(lambda x: x[0], args)


def _combine(largest: bool) -> Callable[..., jax.Array]:
  return jnp.maximum if largest else jnp.add


def _in_turns(arrays: list[Any], num: int) -> jax.Array:
  """Stacks arrays as `[R, num, ...]`, zeros where there is none left."""
  x = jnp.stack(arrays)
  pad = -len(arrays) % num
  x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, num, *x.shape[1:])
