"""Low-rank fine-tuning, the cheap way to make an upload and to spoil one.

LoRA-as-an-attack adds a low-rank update trained on triggered images to one
trained on clean images; LoBAM amplifies the difference of two such uploads, see
`dam_jax.attacks.amplify`.

  >>> import jax
  >>> base = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
  >>> factors = init_factors(jax.random.key(0), base, rank=2)
  >>> {path: (f.a.shape, f.b.shape) for path, f in factors.items()}
  {'kernel': ((4, 2), (2, 3))}
  >>> bool((add_factors(base, factors)['kernel'] == base['kernel']).all())
  True

References:
  Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
  <https://arxiv.org/abs/2106.09685>`_, 2021
  Liu et al., `LoRA-as-an-Attack! Piercing LLM Safety Under The Share-and-Play
  Scenario <https://arxiv.org/abs/2403.00108>`_, 2024
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dam_jax import tree
from dam_jax.typing import Params


class Factors(NamedTuple):
  """The update `a @ b` of a kernel `[in, out]`.

  Attributes:
    a: `[in, r]`.
    b: `[r, out]`.
  """

  a: jax.Array
  b: jax.Array


def init_factors(
  key: jax.Array, params: Params, *, rank: int
) -> dict[str, Factors]:
  """Makes updates that are zero yet, one for each matrix of a model.

  Args:
    key: of `a`, normal with variance `1 / in`; `b` is zero.
    params: whose floating-point leaves of two axes get one.
    rank: of the updates, at most; no more than a matrix has.

  Returns:
    Factors by path; fine-tune these and nothing else.

  Raises:
    ValueError: where the rank is not positive or there is no matrix.
  """
  if rank < 1:
    raise ValueError(f'rank must be positive, got {rank}')
  kernels = {
    path: x
    for path, x in tree.flatten(params).items()
    if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating)
  }
  if not kernels:
    raise ValueError('no matrix to update')
  factors = {}
  for i, (path, x) in enumerate(kernels.items()):
    r = min(rank, *x.shape)
    a = jax.random.normal(jax.random.fold_in(key, i), (x.shape[0], r))
    factors[path] = Factors(a * x.shape[0] ** -0.5, jnp.zeros((r, x.shape[1])))
  return factors


def add_factors(
  params: Params, *updates: Mapping[str, Factors], scale: float = 1.0
) -> Params:
  """Returns `W + scale sum_i a_i b_i` for every matrix that has an update.

  Args:
    params: the base.
    *updates: factors by path, of the base's matrices.
    scale: of all updates.

  Returns:
    Parameters in the base's dtypes; leaves without an update are the base's.

  Raises:
    ValueError: where an update has a path that the base has not, or another
      shape; with all of them.
  """
  leaves = tree.flatten(params)
  lines = [
    f'{path}: got {list(f.a.shape)} @ {list(f.b.shape)}, want '
    f'{list(jnp.shape(leaves[path])) if path in leaves else "no such leaf"}'
    for update in updates
    for path, f in update.items()
    if path not in leaves
    or (f.a.shape[0], f.b.shape[1]) != jnp.shape(leaves[path])
  ]
  if lines:
    raise ValueError('\n  '.join(['updates do not fit the base:', *lines]))

  def leaf_fn(path, x):
    products = [u[path].a @ u[path].b for u in updates if path in u]
    if not products:
      return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + scale * sum(products)).astype(x.dtype)

  found = [leaf_fn(path, x) for path, x in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(params), found)
