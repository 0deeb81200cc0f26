"""Task vectors as pytrees: stack, subtract, add back, label and ravel.

A set of `K` fine-tuned models is one pytree whose leaves carry a leading task
axis, `[K, *param_shape]`. Names of leaves are paths with slashes, as in
`layers_0/mlp/fc1/kernel`.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.zeros(2), 'step': jnp.array(3)}
  >>> experts = dj.tree.stack([
  ...     {'w': jnp.array([1., 0.]), 'step': jnp.array(7)},
  ...     {'w': jnp.array([0., 2.]), 'step': jnp.array(9)},
  ... ])
  >>> deltas = dj.tree.task_vectors(base, experts)
  >>> deltas['w'].tolist()
  [[1.0, 0.0], [0.0, 2.0]]

Leaves that are not floating point (counters, position ids) have no task
vector: their entry is zero, and `apply_delta` copies them from the base.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax.layout import Layout
from dam_jax.layout import Placement
from dam_jax.typing import Deltas, Params


def names(tree: Any) -> list[str]:
  """Returns the path of every leaf, in the order of `jax.tree.leaves`.

  Args:
    tree: any pytree.

  Returns:
    Paths such as `'layers_0/mlp/kernel'`.

  Examples:
    >>> names({'a': {'b': 1, 'c': [2, 3]}})
    ['a/b', 'a/c/0', 'a/c/1']
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in paths
  ]


def flatten(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path.

  Args:
    tree: any pytree.

  Returns:
    A dict from path to leaf, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: where two leaves have the same path.

  Examples:
    >>> flatten({'a': {'b': 1}, 'c': 2})
    {'a/b': 1, 'c': 2}
  """
  leaves = dict(zip(paths := names(tree), jax.tree.leaves(tree), strict=True))
  if len(leaves) < len(paths):
    twice = sorted({p for p in paths if paths.count(p) > 1})
    raise ValueError(f'two leaves have the same path: {", ".join(twice)}')
  return leaves


def _dtype(x: Any) -> Any:
  # Not jnp.result_type, which takes float64 for float32 while x64 is off.
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


def is_float(x: Any) -> bool:
  """Whether a leaf is floating point, and so has a task vector."""
  return jnp.issubdtype(_dtype(x), jnp.floating)


def _describe(x: Any) -> str:
  return f'{_dtype(x).name}{list(jnp.shape(x))}'


def differences(
  want: Any, got: Any, *, leading: int = 0, dtypes: bool = True
) -> list[str]:
  """Lists every difference in names, shapes and dtypes of two pytrees.

  Args:
    want: the reference; arrays or `jax.ShapeDtypeStruct`s.
    got: what is compared with it.
    leading: how many leading axes `got` has that `want` has not.
    dtypes: whether dtypes must agree too.

  Returns:
    One line a difference, empty where there is none.

  Examples:
    >>> differences({'w': jnp.zeros(2)}, {'v': jnp.zeros(3)})
    ['w: missing', 'v: unexpected']
  """
  want, got = flatten(want), flatten(got)
  lines = [f'{name}: missing' for name in want if name not in got]
  lines += [f'{name}: unexpected' for name in got if name not in want]
  for name in want:
    if name not in got:
      continue
    shape, dtype = jnp.shape(got[name]), _dtype(got[name])
    same = shape[leading:] == jnp.shape(want[name]) and len(shape) >= leading
    if dtypes:
      same &= dtype == _dtype(want[name])
    if not same:
      axes = ', '.join(['K'] * leading + list(map(str, jnp.shape(want[name]))))
      lines.append(
        f'{name}: got {_describe(got[name])}, '
        f'want {_dtype(want[name]).name}[{axes}]'
      )
  return lines


def check_compatible(base: Params, experts: Mapping[str, Params]) -> None:
  """Raises unless every expert has the base's names, shapes and dtypes.

  Args:
    base: the model that all experts were fine-tuned from; arrays or
      `jax.ShapeDtypeStruct`s.
    experts: models by name, the same.

  Raises:
    ValueError: with all differences of all experts.

  Examples:
    >>> check_compatible({'w': jnp.zeros(2)}, {'cars': {'w': jnp.ones(3)}})
    Traceback (most recent call last):
      ...
    ValueError: experts differ from the base:
      cars: w: got float32[3], want float32[2]
  """
  if not experts:
    raise ValueError('no experts: a merge needs at least one')
  lines = [
    f'  {name}: {line}'
    for name, expert in experts.items()
    for line in differences(base, expert)
  ]
  if lines:
    raise ValueError('\n'.join(['experts differ from the base:', *lines]))


def check_stacked(base: Params, experts: Params) -> int:
  """Returns the number of experts, or raises where `[K, ...]` does not hold.

  Args:
    base: parameters.
    experts: the same with a leading task axis on every leaf.

  Returns:
    `K`.

  Raises:
    ValueError: with all differences, or where leaves disagree on `K`.
  """
  lines = differences(base, experts, leading=1)
  sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(experts) if jnp.ndim(x)}
  if not lines and len(sizes) != 1:
    lines = [f'leading axes are {sorted(sizes)}, want one number of experts']
  if not lines and sizes == {0}:
    lines = ['no experts: a merge needs at least one']
  if lines:
    raise ValueError('\n  '.join(['experts do not fit the base:', *lines]))
  return sizes.pop()


def stack(experts: Sequence[Params]) -> Params:
  """Stacks models on a new leading task axis.

  Args:
    experts: `K` models of equal structure.

  Returns:
    A pytree with leaves `[K, *param_shape]`.

  Raises:
    ValueError: where there is none, or names, shapes or dtypes differ.

  Examples:
    >>> stack([{'w': jnp.zeros(3)}, {'w': jnp.ones(3)}])['w'].shape
    (2, 3)
  """
  if not experts:
    raise ValueError('no experts: a merge needs at least one')
  check_compatible(experts[0], {str(k): e for k, e in enumerate(experts)})
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def unstack(experts: Params) -> list[Params]:
  """Splits a stacked pytree into its models: the inverse of `stack`.

  Args:
    experts: a pytree with leaves `[K, ...]`.

  Returns:
    `K` pytrees.

  Examples:
    >>> [e['w'].tolist() for e in unstack({'w': jnp.eye(2)})]
    [[1.0, 0.0], [0.0, 1.0]]
  """
  num = jax.tree.leaves(experts)[0].shape[0]
  return [jax.tree.map(lambda x, k=k: x[k], experts) for k in range(num)]


def task_vectors(
  base: Params, experts: Params, *, unrolled: bool = False
) -> Deltas:
  """Returns `tau_t = theta_t - theta_0`, leaf by leaf.

  Args:
    base: parameters.
    experts: stacked models, leaves `[K, *param_shape]`.
    unrolled: subtract expert by expert. A compiled sum of such task vectors
      overwrites a base that is donated; what needs them as one array takes `K`
      models more memory.

  Returns:
    Leaves `[K, *param_shape]`, in float32 at least, which the difference of
    two numbers of half precision needs; zero where a leaf is not floating
    point.

  Raises:
    ValueError: where experts do not fit the base.

  References:
    Ilharco et al., `Editing Models with Task Arithmetic
    <https://arxiv.org/abs/2212.04089>`_, 2023
  """
  check_stacked(base, experts)

  def leaf_fn(b, e):
    if not is_float(b):
      return jnp.zeros_like(e)
    wide = np.promote_types(b.dtype, np.float32)
    b, e = b.astype(wide), e.astype(wide)
    return jnp.stack([x - b for x in e]) if unrolled else e - b[None]

  return jax.tree.map(leaf_fn, base, experts)


def apply_delta(base: Params, delta: optax.Updates) -> Params:
  """Adds a merged update to the base, keeping the base's dtypes.

  Args:
    base: parameters.
    delta: a pytree like it.

  Returns:
    `base + delta`; leaves that are not floating point are the base's.

  Raises:
    ValueError: where names or shapes differ, with all differences.
  """
  lines = differences(base, delta, dtypes=False)
  if lines:
    raise ValueError(
      '\n  '.join(['the merged update does not fit the base:', *lines])
    )
  return jax.tree.map(
    lambda b, d: (b.astype(d.dtype) + d).astype(b.dtype) if is_float(b) else b,
    base,
    delta,
  )


def label_by_path(
  tree: Any, rules: Sequence[tuple[str, Any]], *, default: Any = None
) -> Any:
  """Labels every leaf by the first rule that matches its whole path.

  Args:
    tree: any pytree.
    rules: pairs of a regular expression and a label, tried in order.
    default: the label of leaves that no rule matches; None makes that an
      error.

  Returns:
    A pytree of labels, for `optax.partition`.

  Raises:
    ValueError: where a leaf matches no rule and there is no default, or a
      rule matches no leaf; all of them at once.

  Examples:
    >>> label_by_path({'head': 0, 'body': 1}, [('head', 'keep')],
    ...               default='merge')
    {'body': 'merge', 'head': 'keep'}
  """
  paths = names(tree)
  hits = [[bool(re.fullmatch(rule, p)) for rule, _ in rules] for p in paths]
  unused = [
    rule for i, (rule, _) in enumerate(rules) if not any(hit[i] for hit in hits)
  ]
  missed = [p for p, hit in zip(paths, hits, strict=True) if not any(hit)]
  lines = [f'  rule {rule!r} matches no leaf' for rule in unused]
  if default is None:
    lines += [f'  leaf {path!r} matches no rule' for path in missed]
  if lines:
    raise ValueError('\n'.join(['labels by path:', *lines]))
  labels = [rules[hit.index(True)][1] if any(hit) else default for hit in hits]
  return jax.tree.unflatten(jax.tree.structure(tree), labels)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['vector', 'rest'],
  meta_fields=['layout', 'placement'],
)
@dataclasses.dataclass(frozen=True)
class Raveled:
  """A pytree whose floating-point leaves lie in one vector.

  Elementwise work over a model (sampling a mask, summing task vectors, an
  Adam step) is then one fused pass, not one for each of hundreds of leaves,
  which on a CPU takes XLA minutes to compile.

  Attributes:
    vector: `[..., P]`, the leaves in C order, the smallest first; with shards
      `[..., N, Q]`, see `Layout`.
    rest: the leaves that are not floating point, untouched.
    layout: how to put the pytree together again.
    placement: where its leaves go when they are; None leaves them.
  """

  vector: jax.Array
  rest: tuple[jax.Array, ...]
  layout: Layout
  placement: Placement | None = None

  def unravel(self, vector: jax.Array | None = None) -> Params:
    """Returns the pytree, with `vector` in place of this one if given.

    Args:
      vector: `[..., P]`, its leading axes become those of every leaf.

    Returns:
      A pytree of the original structure, shapes and dtypes.
    """
    vector = self.vector if vector is None else vector
    layout, place = self.layout, self.placement
    lead = vector.shape[: vector.ndim - len(layout.shape)]
    vector = vector if place is None else place.vector(vector)
    leaves = list(self.rest)
    # Not slices: the gradient of a split is one concatenation.
    parts = jax.lax.split(vector, layout.widths, axis=vector.ndim - 1)
    pieces = zip(
      layout.order,
      layout.names,
      parts,
      layout.sizes,
      layout.shapes,
      layout.dtypes,
      strict=True,
    )
    for i, name, part, size, shape, dtype in sorted(
      pieces, key=lambda piece: piece[0]
    ):
      part = part.reshape(*lead, -1)[..., :size]
      leaf = part.reshape(*lead, *shape).astype(dtype)
      leaves.insert(i, leaf if place is None else place.leaf(name, leaf))
    return jax.tree.unflatten(layout.treedef, leaves)


def ravel(
  tree: Params | Raveled, *, leading: int = 0, shards: int = 1
) -> Raveled:
  """Lays the floating-point leaves of a pytree into one vector.

  Args:
    tree: a pytree, or what `ravel` returned, which is passed through: ravel
      once, and every later call costs nothing.
    leading: how many leading axes all leaves share; 1 for stacked experts.
    shards: rows of the vector, each with an equal part of every leaf; see
      `Layout`.

  Returns:
    The raveled pytree, its vector `[*leading, P]`, or `[*leading, N, Q]` with
    several shards, in float32, or in float64 where a leaf has it.

  Raises:
    ValueError: where there is no floating-point leaf.

  Examples:
    >>> flat = ravel({'b': jnp.ones(2), 'w': jnp.zeros((2, 2))})
    >>> flat.vector.tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    >>> flat.unravel()['w'].shape
    (2, 2)
  """
  if isinstance(tree, Raveled):
    return tree
  layout = layout_of(tree, leading=leading, shards=shards)
  leaves, wide = jax.tree.leaves(tree), layout.dtype

  def part(i, size, width):
    lead = leaves[i].shape[:leading]
    x = leaves[i].reshape(*lead, size).astype(wide)
    if pad := width * shards - size:
      x = jnp.pad(x, [(0, 0)] * leading + [(0, pad)])
    return x.reshape(*lead, *layout.shape[:-1], width)

  parts = map(part, layout.order, layout.sizes, layout.widths)
  vector = jnp.concatenate(list(parts), axis=-1)
  return Raveled(vector, rest_of(tree), layout)


def unravel(tree: Params | Raveled) -> Params:
  """Returns the pytree of what may be raveled."""
  return tree.unravel() if isinstance(tree, Raveled) else tree


def layout_of(tree: Params, *, leading: int = 0, shards: int = 1) -> Layout:
  """Says where `ravel` lays the leaves of a pytree.

  Args:
    tree: a pytree of arrays or `jax.ShapeDtypeStruct`s.
    leading: how many leading axes all leaves share.
    shards: rows of the vector.

  Returns:
    The layout.

  Raises:
    ValueError: where there is no floating-point leaf.

  Examples:
    >>> layout_of({'w': jax.ShapeDtypeStruct((3, 5), jnp.float32)}).sizes
    (15,)
  """
  leaves, treedef = jax.tree.flatten(tree)
  paths = names(tree)
  shapes = [jnp.shape(x)[leading:] for x in leaves]
  order = [i for i, x in enumerate(leaves) if is_float(x)]
  if not order:
    raise ValueError('no floating-point parameter to merge')
  order.sort(key=lambda i: math.prod(shapes[i]))
  return Layout(
    treedef=treedef,
    names=tuple(paths[i] for i in order),
    shapes=tuple(shapes[i] for i in order),
    dtypes=tuple(jnp.result_type(leaves[i]) for i in order),
    order=tuple(order),
    shards=shards,
  )


def rest_of(tree: Params) -> tuple[Any, ...]:
  """Returns the leaves that are not floating point, which `ravel` leaves."""
  return tuple(x for x in jax.tree.leaves(tree) if not is_float(x))
