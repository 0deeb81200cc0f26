"""Merges leaf by leaf, for models that are larger than memory.

A transformation of task vectors is applied to one leaf after the other: what is
held at a time is `K + 2` leaves a worker, and what it computed with them. The
leaves may come from memory-mapped files, and each merged leaf is handed on as
soon as it is there, so that reading, computing and writing overlap. On a CPU,
one that is `dam_jax.base.Entrywise` is applied to blocks of as many entries,
which may end within a leaf: one program serves all leaves, where compiling one
for each shape takes longer than to merge a model of 88 million parameters.

  >>> import numpy as np
  >>> import dam_jax as dj
  >>> base = {'a': np.zeros(2, np.float32), 'b': np.ones(1, np.float32)}
  >>> experts = [{k: x + t for k, x in base.items()} for t in (1, 2)]
  >>> merged = dj.streaming.merge(dj.ties(density=0.5), base, experts)
  >>> {k: x.tolist() for k, x in merged.items()}
  {'a': [1.5, 1.5], 'b': [2.5]}

What a transformation needs to know of the whole model (TIES: a threshold for
each task vector, and the sign that most entries have) it asks for by
`sum_parts`. Each such question costs one more pass over the leaves: the update
is run up to the question, what it asks for is summed over all leaves, and the
next pass runs with the answer. A merge by leaves is thus the merge as a whole,
entry by entry. Everything is computed in float32.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import concurrent.futures
import functools
import json
import threading
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import blocks
from dam_jax import distributed
from dam_jax import selection
from dam_jax import tree
from dam_jax.base import Entrywise
from dam_jax.typing import Params, Source

Put = Callable[[str, Any], None]
"""Takes a merged leaf by its path; called from several threads."""

Tx = optax.GradientTransformation


def differences(base: Source, expert: Source) -> list[str]:
  """Lists what keeps an expert from being merged with a base.

  Args:
    base: the model that the expert was fine-tuned from.
    expert: a model.

  Returns:
    One line a difference in names, in shapes, or between floating-point and
    other dtypes; floating-point dtypes may differ.
  """
  lines = tree.differences(base.leaves, expert.leaves, dtypes=False)
  for path, want in base.leaves.items():
    got = expert.leaves.get(path, want)
    if tree.is_float(got) != tree.is_float(want):
      lines.append(f'{path}: got {got.dtype.name}, want {want.dtype.name}')
  return lines


def check(base: Source, experts: Mapping[str, Source]) -> None:
  """Raises unless experts can be merged leaf by leaf.

  Args:
    base: the model that all experts were fine-tuned from.
    experts: models by name.

  Raises:
    ValueError: with all differences of all experts, or leaves in float64.
  """
  if not experts:
    raise ValueError('no experts: a merge needs at least one')
  lines = [
    f'  {name}: {line}'
    for name, expert in experts.items()
    for line in differences(base, expert)
  ]
  lines += [
    f'  {name}: {path}: float64, but merges are computed in float32'
    for name, model in {'base': base, **experts}.items()
    for path, struct in model.leaves.items()
    if struct.dtype == np.float64
  ]
  if lines:
    raise ValueError('\n'.join(['experts differ from the base:', *lines]))


def tied(base: Source, experts: Sequence[Source]) -> dict[str, str]:
  """Finds leaves that are one parameter under several paths.

  Random draws depend on a leaf's path, so tied leaves must be merged once.

  Args:
    base: a model.
    experts: models like it.

  Returns:
    The first path by every other path of the same parameter: those of two axes
    or more whose values agree bit for bit in the base and in each expert.
  """
  models = (base, *experts)
  groups: dict[Any, list[str]] = {}
  for path, struct in base.leaves.items():
    if len(struct.shape) > 1 and tree.is_float(struct):
      # Most leaves differ in their first row already.
      first_row = np.asarray(base.read(path)[0]).tobytes()
      key = (struct.shape, struct.dtype, first_row)
      groups.setdefault(key, []).append(path)

  def same(a, b):
    return all(np.array_equal(m.read(a), m.read(b)) for m in models)

  found: dict[str, str] = {}
  for paths in groups.values():
    for i, path in enumerate(paths):
      firsts = [p for p in paths[:i] if p not in found]
      first = next((p for p in firsts if same(p, path)), None)
      if first is not None:
        found[path] = first
  return found


def _update(tx, answers, salt, base, experts, *, on_question=None):
  """Returns what the next question asks of a leaf, or the merged leaf."""
  wide = base.astype(jnp.float32)
  deltas = jnp.stack([x.astype(jnp.float32) - wide for x in experts])
  try:
    update, _ = tx.update(
      deltas,
      tx.init(wide),
      wide,
      sum_parts=selection.Answers(answers),
      salt=salt,
    )
  except selection.Asked as asked:
    if on_question is not None:
      on_question(asked)
    return {'part': asked.part, 'args': asked.args}
  # A sum finds what is not finite many times faster than isfinite().all().
  sums = [jnp.sum(x, dtype=jnp.float32) for x in (base, *experts)]
  return {'merged': wide + update, 'finite': jnp.isfinite(jnp.stack(sums))}


def merge_leaves(
  tx: Tx | Mapping[str, Tx | str | None],
  base: Source,
  experts: Mapping[str, Source],
  put: Put,
  *,
  labels: Mapping[str, str] | None = None,
  skip: Collection[str] = (),
  workers: int = 2,
  on_leaf: Callable[[str, int], None] | None = None,
  hosts: distributed.Hosts | None = None,
) -> None:
  """Merges leaf by leaf.

  Args:
    tx: maps task vectors `[K, ...]` to one update; or one for each label, where
      None stands for the base's own leaf, bit for bit, and a name for that
      expert's.
    base: the model that all experts were fine-tuned from.
    experts: models by name; their order is that of the task axis.
    put: takes each merged leaf, in float32, by its path. Leaves that are not
      floating point are the base's own.
    labels: of leaves by path, as `dam_jax.tree.label_by_path` gives them; a
      whole-model threshold is then one for each label, as in
      `optax.partition`.
    skip: paths that are not handed to `put`, such as those already written.
    workers: how many leaves are under way at a time.
    on_leaf: called with a leaf's path and the bytes read for it, each time that
      it was read.
    hosts: processes that call this with the same arguments: each reads and puts
      its leaves alone (`dam_jax.distributed.share`).

  Raises:
    ValueError: before a leaf is read, where experts do not fit the base (all
      differences) or labels do not fit `tx`; after, where inputs are not finite
      (all of them).
  """
  check(base, experts)
  txs = tx if isinstance(tx, Mapping) else {'': tx}
  labels = dict.fromkeys(base.leaves, '') if labels is None else labels
  own = distributed.share(base.leaves, hosts)
  written = own - set(skip)
  unlabelled = sorted(set(base.leaves) - set(labels))
  unknown = sorted({x for x in labels.values() if x not in txs})
  owners = {label: t for label, t in txs.items() if isinstance(t, str)}
  strangers = sorted(set(owners.values()) - set(experts))
  if unlabelled or unknown or strangers:
    raise ValueError(
      f'leaves without a label: {unlabelled}; labels without a '
      f'transformation: {unknown}; not experts: {strangers}'
    )
  group = {
    label: [p for p in base.leaves if labels[p] == label] for label in txs
  }
  bad: list[str] = []

  def copy(path):
    owner = owners.get(labels[path])
    put(path, (base if owner is None else experts[owner]).read(path))

  def finish(path, merged, finite):
    for name, fine in zip(('base', *experts), finite, strict=True):
      if not fine:
        bad.append(f'{name}: {path}')
    put(path, merged)

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    try:
      for label, paths in group.items():
        whole = txs[label] is None or label in owners
        moved = [
          p for p in paths if not whole and tree.is_float(base.leaves[p])
        ]
        list(pool.map(copy, sorted(written & {*paths} - {*moved})))
        if moved:
          sources = base, *experts.values()
          sweep = _Sweep(txs[label], sources, pool, workers, on_leaf, hosts)
          answers = sweep.answers(moved, own)
          sweep.merge(answers, [p for p in moved if p in written], finish)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  if hosts is not None:
    sent = hosts.exchange(json.dumps(bad).encode())
    bad = [line for each in sent for line in json.loads(each)]
  if bad:
    raise ValueError('\n  '.join(['weights are not finite:', *sorted(bad)]))


class _Question(NamedTuple):
  """What a transformation asks of all leaves of a group; see `Asked`."""

  group: str
  finish: Callable[..., Any]
  largest: bool
  part: Any
  args: Any


def _question(update, answers, structs):
  """Returns the next question of a leaf, its part and args as structs."""
  asked = []
  out = jax.eval_shape(
    functools.partial(update, on_question=asked.append),
    answers,
    jax.ShapeDtypeStruct((), jnp.uint32),
    structs[0],
    structs[1:],
  )
  if not asked:
    return None
  group, finish, largest = asked[0].group, asked[0].finish, asked[0].largest
  return _Question(group, finish, largest, out['part'], out['args'])


def _with(answers, group, answer):
  return {**answers, group: (*answers.get(group, ()), answer)}


def passes(tx: Tx, num: int) -> int:
  """Counts how often a merge by leaves reads a matrix.

  Args:
    tx: maps task vectors `[K, ...]` to one update.
    num: `K`.

  Returns:
    One, and one more for each question about the whole model.

  Examples:
    >>> passes(dj.average(), 3), passes(dj.ties(), 3)
    (1, 4)
  """
  update = functools.partial(_update, optax.with_extra_args_support(tx))
  structs = [jax.ShapeDtypeStruct((2, 2), jnp.float32)] * (1 + num)
  count, answers = 1, {}
  while (asked := _question(update, answers, structs)) is not None:
    answer = jax.eval_shape(asked.finish, asked.part, *asked.args)
    count, answers = count + 1, _with(answers, asked.group, answer)
  return count


@functools.lru_cache(maxsize=8)
def _program(tx: Tx) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns the update of a transformation, and the same compiled, once."""
  update = functools.partial(_update, optax.with_extra_args_support(tx))
  return update, jax.jit(update)


class _Sweep:
  """Passes over the leaves of one transformation."""

  def __init__(self, tx, sources, pool, workers, on_leaf, hosts):
    self._update, self._jitted = _program(tx)
    self._sources, self._pool, self._workers = sources, pool, workers
    self._hosts = hosts
    self._on_leaf = on_leaf or (lambda path, size: None)
    self._cut = isinstance(tx, Entrywise) and jax.default_backend() == 'cpu'

  def merge(self, answers, paths, finish):
    """Calls `finish(path, leaf, finite)` for every merged leaf."""

    def whole(path, out):
      finish(path, out['merged'], out['finite'])

    def pieces(block, out):
      found = map(np.asarray, (out['merged'], out['finite']))
      for leaf in blocks.collect(block, *found):
        finish(*leaf)

    self._run(answers, paths, pieces if self._cut else whole)

  def _run(self, answers, paths, use):
    """Runs the update with what is known of the model, part by part.

    `use` takes a part, which is a leaf's path or a block, and what came of it.
    """
    run = self._run_blocks if self._cut else self._run_leaves
    run(answers, paths, use)

  def _run_leaves(self, answers, paths, use):
    def one(path):
      base, *experts = [s.read(path) for s in self._sources]
      salt = np.uint32(zlib.crc32(path.encode()))
      out = self._jitted(answers, salt, base, experts)
      use(path, jax.block_until_ready(out))
      self._on_leaf(path, sum(x.nbytes for x in (base, *experts)))

    list(self._pool.map(one, paths))

  def _run_blocks(self, answers, paths, use):
    def one(buffer, block):
      base, *experts = blocks.fill(buffer, block)
      out = self._jitted(answers, np.uint32(0), base, experts)
      use(block, jax.block_until_ready(out))

    found = blocks.cut(self._sources, paths, self._on_leaf)
    blocks.work(found, one, len(self._sources), self._pool, self._workers)

  def answers(self, paths, own):
    """Answers all questions about the whole model, a pass for each.

    Of `paths` this process reads those that are its `own`.
    """
    answers = {}
    while asking := self._asking(answers, paths):
      questions = {asked.group: asked for asked in asking.values()}
      found = self._total(
        answers, {p: q for p, q in asking.items() if p in own}
      )
      if self._hosts is not None:
        found = distributed.total_over(
          self._hosts,
          found,
          {group: (q.part, q.args) for group, q in questions.items()},
          largest={group for group, q in questions.items() if q.largest},
        )
      for group, (total, args) in found.items():
        # Counts of the entries of a large model do not fit 32 bits.
        with jax.enable_x64(True):
          finish = questions[group].finish
          answer = finish(total, *jax.tree.map(np.asarray, args))
          answers = _with(answers, group, jax.tree.map(np.asarray, answer))
    return answers

  def _asking(self, answers, paths):
    """Returns the next `_Question` of the leaves that have one."""
    kinds, found = {}, {}
    block = jax.ShapeDtypeStruct((blocks.SIZE,), jnp.float32)
    for path in paths:
      structs = [block if self._cut else s.leaves[path] for s in self._sources]
      kind = tuple((s.shape, s.dtype) for s in structs)
      if kind not in kinds:
        kinds[kind] = _question(self._update, answers, structs)
      if kinds[kind] is not None:
        found[path] = kinds[kind]
    return found

  def _total(self, answers, asking):
    """Returns what is asked of leaves, by group, and what to finish it with."""
    found, lock = {}, threading.Lock()
    questions = [*asking.values()]

    def add(part, out):
      # Blocks are entries of any leaves, which all ask the same.
      question = questions[0] if self._cut else asking[part]
      group, combine = question.group, distributed.combiner(question.largest)
      with lock:
        if group not in found:
          found[group] = jax.tree.map(_wide, out['part']), out['args']
          return
        jax.tree.map(
          lambda total, x: combine(total, np.asarray(x), out=total),
          found[group][0],
          out['part'],
        )

    self._run(answers, list(asking), add)
    return found


def _wide(x: jax.Array) -> np.ndarray:
  integer = jnp.issubdtype(x.dtype, jnp.integer)
  return np.array(x, np.int64 if integer else np.float64)


class _Tree:
  """A `Source` of a pytree in memory."""

  def __init__(self, params: Params):
    self._arrays = tree.flatten(params)
    self.leaves = {
      path: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)
      for path, x in self._arrays.items()
    }

  def read(self, path: str) -> Any:
    """Returns the array of a path."""
    return self._arrays[path]


def _check_donated(base: Source, experts: Mapping[str, Source]) -> None:
  lines = []
  for path in base.leaves:
    leaf = base.read(path)
    if not isinstance(leaf, jax.Array):
      lines.append(f'{path}: got {type(leaf).__name__}, want jax.Array')
    lines += [
      f'{path}: the same array as the one of expert {name}'
      for name, expert in experts.items()
      if path in expert.leaves and expert.read(path) is leaf
    ]
  if lines:
    raise ValueError('\n  '.join(['the base cannot be donated:', *lines]))


def merge(
  tx: optax.GradientTransformation,
  base: Params,
  experts: Sequence[Params],
  *,
  workers: int = 2,
  donate_base: bool = False,
) -> Params:
  """Merges models in memory leaf by leaf.

  Gives what `dam_jax.merge` gives for the experts stacked, and holds no stack
  and no task vectors of the whole model: beside the models themselves and the
  result only a few leaves. With the base donated that is `K + 1` models.

  Args:
    tx: maps task vectors `[K, ...]` to one update.
    base: the model that all experts were fine-tuned from.
    experts: `K` models like it.
    workers: how many leaves are under way at a time.
    donate_base: whether each of the base's leaves is deleted once it is merged,
      as `jax.jit` does with a donated argument.

  Returns:
    The merged model, in the base's structure and dtypes.

  Raises:
    ValueError: where experts do not fit the base or are not finite, or where a
      donated base has leaves that cannot be deleted: NumPy's, or an expert's.
  """
  merged: dict[str, Any] = {}
  source = _Tree(base)
  named = {str(k): _Tree(expert) for k, expert in enumerate(experts)}
  if donate_base:
    _check_donated(source, named)

  def put(path, leaf):
    struct = source.leaves[path]
    if not tree.is_float(struct):
      merged[path] = leaf
      return
    merged[path] = jnp.asarray(leaf).astype(struct.dtype)
    if donate_base:
      source.read(path).delete()

  merge_leaves(tx, source, named, put, workers=workers)
  leaves = [merged[path] for path in source.leaves]
  return jax.tree.unflatten(jax.tree.structure(base), leaves)
