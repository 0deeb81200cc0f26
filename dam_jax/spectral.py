"""Merges by singular values, as transformations of task vectors.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.zeros((2, 2))}
  >>> experts = {'w': jnp.array([[[4., 0.], [0., 0.]], [[0., 0.], [0., 2.]]])}
  >>> dj.merge(dj.iso_c(), base, experts).params['w'].round().tolist()
  [[3.0, 0.0], [0.0, 3.0]]

A matrix is a floating-point leaf of two axes; `others` merges what is none. The
authors also leave embeddings and projections out, by name. Say so by path:

  >>> def label(params):
  ...   rules = [(r'.*(embedding|projection).*', 'average')]
  ...   return dj.tree.label_by_path(params, rules, default='merge')
  >>> txs = {'merge': dj.tsv_m(), 'average': dj.average()}
  >>> tx = optax.partition(txs, label)

Equations here are the papers', of matrices `[out, in]`. What is not the same
for the transpose takes `input_axis`: 0 for Flax kernels `[in, out]`, 1 for
weights `[out, in]`, as torch and Hugging Face's files have them.

A direction whose singular value is zero, up to rounding, is no direction: it
takes part in nothing. What an SVD has in its place depends on the machine.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from dam_jax import aggregators
from dam_jax import base
from dam_jax import matrices
from dam_jax import transforms
from dam_jax import tree

SOLVERS = ('adam', 'exact')  # how `wudi` minimises


def _check(name: str, value: Any, holds: Callable[[Any], Any], want: str):
  """Raises unless a value, where it is known, is what is wanted."""
  if base.is_concrete(value) and not holds(value):
    raise ValueError(f'{name} must {want}, got {value!r}')


def _merge(
  tx: optax.GradientTransformation,
  others: optax.GradientTransformation | None,
  scale: ArrayLike,
) -> optax.GradientTransformation:
  """Merges matrices by `tx`, other leaves by `others`, then scales."""
  return matrices.scaled(
    matrices.split(tx, others or aggregators.mean()), scale
  )


def tsv_m(
  scale: ArrayLike = 1.0,
  *,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """TSV-M: keep each task's largest singular directions and decorrelate them.

  Of each `tau_t = U_t S_t V_t^T` it keeps the largest `1/K` of the triplets,
  rounded down and at least one. With `U = [U_1 ... U_K]` and `V` alike,
  `delta = polar(U) diag(S_1, ..., S_K) polar(V)^T`, where `polar(U) = P Q^T` of
  `U = P D Q^T` is the nearest matrix with orthonormal columns (Procrustes).

  Args:
    scale: of the merged update.
    others: merges the leaves that are no matrices; averages them where None,
      as the authors do.

  Returns:
    The transformation; the same for transposed matrices.

  Raises:
    ValueError: where the scale is not finite.

  Examples:
    >>> base = {'w': jnp.zeros((2, 2))}
    >>> experts = {'w': jnp.array([[[3., 0], [0, 0]], [[0, 0], [0, 1.]]])}
    >>> dj.merge(tsv_m(), base, experts).params['w'].round().tolist()
    [[3.0, 0.0], [0.0, 1.0]]

  References:
    Gargiulo et al., `Task Singular Vectors: Reducing Task Interference in Model
    Merging <https://arxiv.org/abs/2412.00081>`_, 2025
  """
  _check('scale', scale, np.isfinite, 'be finite')

  def matrix_fn(x):
    each = max(1, min(x.shape[1:]) // x.shape[0])
    u, s, vt = matrices.svd(x)
    left = matrices.orthogonal(matrices.side_by_side(u[:, :, :each]))
    right = matrices.orthogonal(vt[:, :each].reshape(-1, x.shape[2]))
    return left * s[:, :each].reshape(1, -1) @ right

  return _merge(matrices.each(matrix_fn), others, scale)


def _flat(u: jax.Array, s: jax.Array, vt: jax.Array) -> jax.Array:
  """Returns `U V^T` times the mean of the singular values there are."""
  return jnp.sum(s) / jnp.maximum(jnp.sum(s > 0), 1).astype(s.dtype) * (u @ vt)


def iso_c(
  scale: ArrayLike = 1.0,
  *,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Iso-C: sum the task vectors, make the singular values of the sum equal.

  `delta = mean(S) U V^T`, where `U S V^T = sum_t tau_t` and the mean is over
  the singular values that are not zero.

  Args:
    scale: of the merged update; the authors choose it on held-out data, 1.3 to
      1.5 for 8 tasks and 0.8 to 1.0 for 20.
    others: merges the leaves that are no matrices; averages them where None,
      as the authors do.

  Returns:
    The transformation; the same for transposed matrices.

  Raises:
    ValueError: where the scale is not finite.

  Examples:
    >>> base = {'w': jnp.zeros((2, 2))}
    >>> experts = {'w': jnp.array([[[3., 0], [0, 0]], [[0, 0], [0, 1.]]])}
    >>> dj.merge(iso_c(), base, experts).params['w'].round().tolist()
    [[2.0, 0.0], [0.0, 2.0]]

  References:
    Marczak et al., `No Task Left Behind: Isotropic Model Merging with Common
    and Task-Specific Subspaces <https://arxiv.org/abs/2502.04959>`_, 2025
  """
  _check('scale', scale, np.isfinite, 'be finite')

  def matrix_fn(x):
    return _flat(*matrices.svd(functools.reduce(jnp.add, x)))

  return _merge(matrices.each(matrix_fn), others, scale)


def iso_cts(
  scale: ArrayLike = 1.0,
  common: float = 0.8,
  *,
  input_axis: int = 0,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Iso-CTS: Iso-C, its smallest directions replaced by those of each task.

  Of `sum_t tau_t` it keeps the `k` largest triplets, `U_0, S_0, V_0`; of each
  `tau_t - U_0 U_0^T tau_t` the `s` largest, `U_t, S_t, V_t`, where `k + K s` is
  the number of singular values. Then `delta = mean(S_0, ..., S_K) polar([U_0
  ... U_K]) polar([V_0 ... V_K])^T`, as `tsv_m` has it. The common directions
  are taken out on the side of the outputs only.

  Args:
    scale: of the merged update; the authors choose it on held-out data, 1.5 to
      1.9 for 8 tasks and 1.1 to 1.2 for 20.
    common: `k` as a share of the singular values, in [0, 1], before rounding
      to what the tasks can share equally; 1 is `iso_c`.
    input_axis: of a matrix; 0 for Flax kernels, 1 for torch's weights.
    others: merges the leaves that are no matrices; averages them where None,
      as the authors do.

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  Examples:
    >>> base = {'w': jnp.zeros((2, 2))}
    >>> experts = {'w': jnp.array([[[3., 0], [0, 0]], [[0, 0], [0, 1.]]])}
    >>> dj.merge(iso_cts(), base, experts).params['w'].round().tolist()
    [[2.0, 0.0], [0.0, 2.0]]

  References:
    Marczak et al., `No Task Left Behind: Isotropic Model Merging with Common
    and Task-Specific Subspaces <https://arxiv.org/abs/2502.04959>`_, 2025
  """
  _check('scale', scale, np.isfinite, 'be finite')
  _check('input_axis', input_axis, (0, 1).__contains__, 'be 0 or 1')
  _check('common', common, lambda c: 0 <= c <= 1, 'be in [0, 1]')

  def matrix_fn(x):
    num, size = x.shape[0], min(x.shape[1:])
    each = min(round((size - int(size * common)) / num), size // num)
    u, s, vt = matrices.svd(functools.reduce(jnp.add, x))
    shared = size - num * each
    u, s, vt = u[:, :shared], s[:shared], vt[:shared]
    # Where nothing is left of a task, two to six of these are.
    rounding = jnp.finfo(x.dtype).eps * jnp.linalg.norm(x, axis=(1, 2))[:, None]
    own_u, own_s, own_vt = matrices.svd(x - u @ (u.T @ x), floor=16 * rounding)
    left = jnp.concatenate(
      [u, matrices.side_by_side(own_u[:, :, :each])], axis=1
    )
    values = jnp.concatenate([s, own_s[:, :each].reshape(-1)])
    right = jnp.concatenate([vt, own_vt[:, :each].reshape(-1, x.shape[2])])
    return _flat(matrices.orthogonal(left), values, matrices.orthogonal(right))

  return _merge(matrices.each(matrix_fn, input_axis), others, scale)


def _inverse_squares(x: jax.Array) -> jax.Array:
  """Returns `1 / ||x_t||^2`, `[K, 1, 1]`; zero where that norm is."""
  squares = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
  return jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1), 0)


def _descend(
  x: jax.Array, ridge: jax.Array, learning_rate: jax.Array, iterations: int
) -> jax.Array:
  """Minimises what `wudi` says by Adam, from the sum of the task vectors."""
  weights, total = _inverse_squares(x), functools.reduce(jnp.add, x)
  rows = (jnp.sqrt(weights) * x).reshape(-1, x.shape[2])
  gram = rows.T @ rows + ridge * jnp.sum(weights) * jnp.eye(
    x.shape[2], dtype=x.dtype
  )
  # The gradient is 2 (offset @ gram + start), for the offset from the sum.
  apart = total[None] - x
  pulls = weights * ((apart @ x.swapaxes(1, 2)) @ x + ridge * apart)
  start = functools.reduce(jnp.add, pulls)
  tx = optax.adam(learning_rate)

  def step(_, carry):
    offset, state = carry
    updates, state = tx.update(2 * (offset @ gram + start), state)
    return optax.apply_updates(offset, updates), state

  carry = jnp.zeros_like(total), tx.init(total)
  return total + lax.fori_loop(0, iterations, step, carry)[0]


def _solve(x: jax.Array, ridge: jax.Array) -> jax.Array:
  """Minimises what `wudi` says by least squares, the smallest solution.

  The rows `tau_t / ||tau_t||` themselves, not their Gram matrix, whose
  condition is the square of theirs.
  """
  weights = _inverse_squares(x)
  rows = jnp.sqrt(weights) * x
  total = jnp.sum(weights)
  eye = jnp.sqrt(ridge * total) * jnp.eye(x.shape[2], dtype=x.dtype)
  middle = functools.reduce(jnp.add, weights * x)
  middle *= jnp.sqrt(ridge / jnp.where(total > 0, total, 1))
  u, s, vt = matrices.svd(jnp.concatenate([*rows, eye]))
  wanted = jnp.concatenate([*(rows @ x.swapaxes(1, 2)), middle.T])
  solved = (u.T @ wanted) / jnp.where(s > 0, s, 1)[:, None]
  return (vt.T @ solved).T


def wudi(
  learning_rate: ArrayLike = 1e-5,
  *,
  iterations: int = 300,
  solver: str = 'adam',
  ridge: ArrayLike = 0.0,
  input_axis: int = 0,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """WUDI: the update that disturbs each task least on the inputs it saw.

  `min_delta sum_t ||(delta - tau_t) tau_t^T||^2 / ||tau_t||^2` of each matrix,
  by Adam from `sum_t tau_t`: the rows of `tau_t` stand for the inputs, of which
  gradients are made. That steps are few and small is part of the method: what
  hardly matters to the sum hardly changes, and no entry moves by more than
  about their product.

  It needs memory for the square of the inputs' number: leave embeddings out.

  Args:
    learning_rate: of Adam.
    iterations: of Adam.
    solver: 'adam', or 'exact' for the minimum itself, of the least norm, which
      the authors find worse: `delta = (sum_t tau_t G_t) (sum_t G_t)^-1`, where
      `G_t = (tau_t^T tau_t + ridge I) / ||tau_t||^2`.
    ridge: weight of `||delta - tau_t||^2 / ||tau_t||^2` in the sum, the paper's
      omega, not negative; 'exact' is steadier with some.
    input_axis: of a matrix; 0 for Flax kernels, 1 for torch's weights.
    others: merges the leaves that are no matrices; keeps the base where None,
      as the authors do. FusionBench averages them: `average()`.

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  Examples:
    >>> base = {'w': jnp.zeros((2, 2))}
    >>> experts = {'w': jnp.array([[[3., 0], [0, 0]], [[0, 0], [0, 1.]]])}
    >>> tx = wudi(solver='exact')
    >>> dj.merge(tx, base, experts).params['w'].round().tolist()
    [[3.0, 0.0], [0.0, 1.0]]

  References:
    Cheng et al., `Whoever Started the Interference Should End It: Guiding
    Data-Free Model Merging via Task Vectors
    <https://arxiv.org/abs/2503.08099>`_, 2025
  """
  positive, natural = 'be positive and finite', 'not be negative or infinite'
  _check('learning_rate', learning_rate, lambda r: 0 < r < np.inf, positive)
  _check('iterations', iterations, lambda n: n >= 0, 'not be negative')
  _check('solver', solver, SOLVERS.__contains__, f'be one of {SOLVERS}')
  _check('ridge', ridge, lambda r: 0 <= r < np.inf, natural)
  _check('input_axis', input_axis, (0, 1).__contains__, 'be 0 or 1')

  def matrix_fn(x):
    omega, rate = (jnp.asarray(v, x.dtype) for v in (ridge, learning_rate))
    if solver == 'exact':
      return _solve(x, omega)
    return _descend(x, omega, rate, iterations)

  others = others or aggregators.keep_base()
  return matrices.split(matrices.each(matrix_fn, input_axis), others)


def _merging(
  then: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
  """Returns what `knots` merges with: TIES by default."""
  ties = base.chain(transforms.trim(0.2), aggregators.elect_mean())
  return optax.with_extra_args_support(ties if then is None else then)


def _knit(
  x: jax.Array, rank: int | None, scaled: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the basis `[out, R]` and what each task has of it, `[K, R, in]`."""
  u, s, vt = matrices.svd(matrices.side_by_side(x))
  u, s, vt = u[:, :rank], s[None, :rank], vt[:rank]
  v = jnp.moveaxis(vt.reshape(-1, x.shape[0], x.shape[2]), 1, 0)
  return (u, s[..., None] * v) if scaled else (u * s, v)


def knots(
  then: optax.GradientTransformation | None = None,
  *,
  rank: int | None = None,
  scaled: bool = False,
  input_axis: int = 0,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """KnOTS: merge in a basis of the outputs that all task vectors share.

  `[tau_1 ... tau_K] = U S [V_1^T ... V_K^T]`, then
  `delta = U S then(V_1^T, ..., V_K^T)`, where the merge sees the `V_t^T` of all
  matrices at once. Here a leaf of more than two axes is a matrix too, as a
  convolution's kernel is: its inputs are all axes but the last, in torch's
  layout all but the first. Reshape kernels whose outputs have several axes.

  An election feels how singular vectors of near values are turned, of which
  float32 knows little: the update differs from float64's by up to a per cent.

  Args:
    then: merges the `V_t^T`, leaves `[K, R, in]` in place of each matrix; one
      that keeps the task axis does so here, if `others` keeps it too. `ties()`
      where None. It is given no parameters.
    rank: `R`, how many of the largest singular values to keep; all where None.
      For products of LoRA's factors give `K` times their rank: the authors drop
      what is zero, which a merge would count among the entries to rank.
    scaled: whether `then` sees `S V_t^T`, as in the authors' code; the same
      where it is linear.
    input_axis: of a matrix; 0 for Flax kernels, 1 for torch's weights.
    others: merges the leaves that are no matrices; averages them where None.

  Returns:
    The transformation.

  Raises:
    ValueError: where an option is none of those.

  Examples:
    >>> base = {'w': jnp.zeros((2, 2))}
    >>> experts = {'w': jnp.array([[[3., 0], [0, 0]], [[0, 0], [0, 1.]]])}
    >>> tx = knots(dj.task_arithmetic(1.0))
    >>> dj.merge(tx, base, experts).params['w'].round().tolist()
    [[3.0, 0.0], [0.0, 1.0]]

  References:
    Stoica et al., `Model merging with SVD to tie the KnOTS
    <https://arxiv.org/abs/2410.19735>`_, 2025
  """
  _check('input_axis', input_axis, (0, 1).__contains__, 'be 0 or 1')
  _check('rank', rank, lambda r: r is None or r > 0, 'be positive or None')
  inner = _merging(then)

  def update_fn(updates, state, params=None, **extra_args):
    del params
    leaves, treedef = jax.tree.flatten(updates)
    if not leaves:
      return updates, state
    with jax.default_matmul_precision('highest'):
      knits = [
        _knit(matrices.to_matrices(x, input_axis), rank, scaled) for x in leaves
      ]
      parts = treedef.unflatten([v for _, v in knits])
      merged, state = inner.update(parts, state, None, **extra_args)
      merged = [
        matrices.from_matrix(basis @ v, x, input_axis)
        for (basis, _), v, x in zip(
          knits, jax.tree.leaves(merged), leaves, strict=True
        )
      ]
    return treedef.unflatten(merged), state

  tx = optax.GradientTransformationExtraArgs(inner.init, update_fn)
  tx = base.leafwise(tx) if isinstance(inner, base.Leafwise) else tx
  return matrices.split(tx, others or aggregators.mean(), matrices.is_kernel)


def _knit_factors(
  b: jax.Array, a: jax.Array, scaled: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns what `_knit` does of the products `b_t a_t`, unformed."""
  wide = np.promote_types(b.dtype, np.float32)
  q, r = jnp.linalg.qr(matrices.side_by_side(b.astype(wide)))
  p, t = matrices.each_matrix(jnp.linalg.qr, a.astype(wide).swapaxes(1, 2))
  r = jnp.moveaxis(r.reshape(-1, b.shape[0], b.shape[2]), 1, 0)
  basis, v = _knit(r @ t.swapaxes(1, 2), None, scaled)
  return q @ basis, v @ p.swapaxes(1, 2)


def knots_lora(
  b: Any,
  a: Any,
  *,
  then: optax.GradientTransformation | None = None,
  scaled: bool = False,
) -> tuple[Any, Any]:
  """KnOTS of LoRA's factors, no product of which it forms.

  With `[B_1 ... B_K] = Q R` and `A_t^T = P_t T_t`, the decomposition of `[B_1
  A_1 ... B_K A_K]` is that of the small `[R_1 T_1^T ... R_K T_K^T]`, between
  `Q` and the `P_t^T`.

  Args:
    b: pytree of `[K, out, r]`, with `lora_alpha / r` multiplied in; zeros make
      ranks equal.
    a: the same of `[K, r, in]`.
    then: as in `knots`; its state is made anew.
    scaled: as in `knots`.

  Returns:
    Pytrees of `[out, R]` and `[R, in]`; their products are the merged update,
    the same as of `knots` with a rank of `R = min(out, K r)`.

  Raises:
    ValueError: where the factors do not fit, with all that do not.

  Examples:
    >>> b, a = {'w': jnp.ones((3, 8, 1))}, {'w': jnp.ones((3, 1, 4))}
    >>> b, a = knots_lora(b, a, then=dj.average())
    >>> (b['w'] @ a['w'])[0].round().tolist()
    [1.0, 1.0, 1.0, 1.0]

  References:
    Stoica et al., `Model merging with SVD to tie the KnOTS
    <https://arxiv.org/abs/2410.19735>`_, 2025
  """
  shapes = [
    {name: x.shape for name, x in tree.flatten(part).items()} for part in (b, a)
  ]
  pairs = {
    n: [s.get(n, ()) for s in shapes] for n in {**shapes[0], **shapes[1]}
  }
  lines = [
    f'  {name}: got {list(left)} and {list(right)}'
    for name, (left, right) in pairs.items()
    if len(left) != 3 or len(right) != 3 or left[::2] != right[:2]
  ]
  if lines:
    raise ValueError(
      '\n'.join(['factors must be [K, out, r] and [K, r, in]:', *lines])
    )
  inner = _merging(then)
  with jax.default_matmul_precision('highest'):
    knits = jax.tree.map(lambda x, y: _knit_factors(x, y, scaled), b, a)
    bases, parts = jax.tree.transpose(
      jax.tree.structure(b), jax.tree.structure((0, 0)), knits
    )
    merged, _ = inner.update(parts, inner.init(parts))
  return (
    jax.tree.map(lambda x, like: x.astype(like.dtype), bases, b),
    jax.tree.map(lambda x, like: x.astype(like.dtype), merged, a),
  )
