"""LoRAs: added to their base when it is read, summed and kept low-rank.

The update of a leaf is `scaling * B A`, with `scaling = alpha / r`, or
`alpha / sqrt(r)` where it is rank-stabilised. `expand` adds it to the base when
a leaf is read; `concat` sums updates exactly and keeps them low-rank, and
`truncate` makes their rank small again.

  >>> f = Factors(a=np.ones((1, 2)), b=np.ones((3, 1)), scaling=2.0,
  ...             module='w', inner=(2,))
  >>> lora = Lora(factors={'w/weight': f}, full={}, config={})
  >>> both = concat([lora, lora], [1.0, 0.5])
  >>> both.factors['w/weight'].rank, truncate(both, 1).factors['w/weight'].rank
  (2, 1)
  >>> base = models.open_model({'w': {'weight': np.zeros((3, 2), np.float32)}})
  >>> expand(base, both).read('w/weight')[0]
  array([3., 3.], dtype=float32)

References:
  Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
  <https://arxiv.org/abs/2106.09685>`_, 2021

  Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
  <https://arxiv.org/abs/2312.03732>`_, 2023
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax.checkpoint import headers
from dam_jax.checkpoint import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
  """The low-rank update `scaling * b @ a` of one leaf.

  Attributes:
    a: `[r, in]`; of a convolution `in` is its kernel's size.
    b: `[out, r]`.
    scaling: of the product.
    module: PEFT's name of the module that the leaf is the weight of.
    inner: what `in` is the product of: `(in,)`, of a convolution
      `(in, height, width)`.
    kind: 'linear', convolutions too, or 'embedding', whose leaf is `[in, out]`.
    axes: the file's axes in the leaf's order; None keeps them.
  """

  a: np.ndarray
  b: np.ndarray
  scaling: float
  module: str
  inner: tuple[int, ...]
  kind: str = 'linear'
  axes: tuple[int, ...] | None = None

  @property
  def rank(self) -> int:
    """Columns of `b`, rows of `a`."""
    return self.a.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
  """A leaf that the adapter holds in full.

  Attributes:
    value: in the leaf's layout.
    name: of its tensor in the adapter's file.
    axes: the file's axes in the leaf's order; None keeps them.
  """

  value: np.ndarray
  name: str
  axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """Low-rank updates of a base model.

  Attributes:
    factors: by the path of the base's leaf.
    full: leaves that are held in full (`modules_to_save`), likewise.
    config: what adapter_config.json says.
    files: that it was read from.
    folder: that it was read from.
  """

  factors: Mapping[str, Factors]
  full: Mapping[str, Full]
  config: Mapping[str, Any]
  files: tuple[pathlib.Path, ...] = ()
  folder: pathlib.Path | None = None


def expand(base: models.Model, lora: Lora) -> models.Model:
  """Adds a LoRA to its base, leaf by leaf, when it is read.

  Args:
    base: the model that the LoRA was trained on.
    lora: updates by the base's paths.

  Returns:
    The model: leaves that the LoRA touches in float32, `W + scaling * B A`,
    computed when they are read; all others are the base's own.

  Raises:
    ValueError: where the LoRA does not fit the base, with all that does not.
  """
  turned = _orient(base.leaves, lora)
  touched = {**lora.factors, **lora.full}

  def read(path):
    if path not in touched:
      return base.read(path)
    held = lora.full.get(path)
    leaf = (base.read(path) if held is None else held.value).astype(np.float32)
    if path in lora.factors:
      leaf += _update(lora.factors[path], turned[path])
    leaf.flags.writeable = False
    return leaf

  return dataclasses.replace(
    base,
    leaves={
      p: jax.ShapeDtypeStruct(x.shape, np.float32) if p in touched else x
      for p, x in base.leaves.items()
    },
    read=read,
    files=(*base.files, *lora.files),
    metadata={},
  )


def _orient(
  leaves: Mapping[str, jax.ShapeDtypeStruct], lora: Lora
) -> dict[str, bool]:
  """Says which updates are `(B A)^T`; raises where one does not fit.

  PEFT sees whether a module is a Conv1D, whose weight is `[in, out]`; its
  config says so for the module that it met last.
  """
  lines, turned, square, others = [], {}, [], set()
  flag = bool(lora.config.get('fan_in_fan_out'))
  for path, held in lora.full.items():
    if path not in leaves:
      lines.append(f'{path}: not in the base')
    elif tuple(leaves[path].shape) != held.value.shape:
      lines.append(
        f'{path}: got {list(held.value.shape)}, want {list(leaves[path].shape)}'
      )
  for path, f in lora.factors.items():
    if path not in leaves:
      lines.append(f'{path}: not in the base')
      continue
    shape, out, inner = _file_shape(leaves[path], f.axes), len(f.b), f.inner
    plain, other = shape == (out, *inner), shape == (*inner, out)
    other &= len(inner) == 1
    floating = jnp.issubdtype(leaves[path].dtype, jnp.floating)
    if not floating or not (other if f.kind == 'embedding' else plain or other):
      lines.append(
        f'{path}: B A is {[out, *inner]}, the base has '
        f'{leaves[path].dtype}{list(shape)}'
      )
    elif f.kind == 'embedding':
      turned[path] = True
    elif plain and other:
      turned[path] = flag
      square.append(path)
    else:
      turned[path] = other
      others.add(other)
  if (not flag) in others:
    lines += [
      f'{path}: square, and other leaves show that fan_in_fan_out={flag} is '
      'not true of all'
      for path in square
    ]
  headers.raise_if(lines, 'the LoRA does not fit the base:')
  return turned


def _file_shape(
  leaf: jax.ShapeDtypeStruct, axes: tuple[int, ...] | None
) -> tuple[int, ...]:
  shape = tuple(leaf.shape)
  return shape if axes is None else tuple(shape[a] for a in np.argsort(axes))


def _update(f: Factors, turned: bool) -> np.ndarray:
  """Returns `scaling * B A` in the leaf's layout and float32."""
  a, b = f.a.astype(np.float32), f.b.astype(np.float32)
  update = a.T @ b.T if turned else (b @ a).reshape(-1, *f.inner)
  update *= np.float32(f.scaling)
  return update if f.axes is None else update.transpose(f.axes)


def concat(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
  """Sums updates and keeps them low-rank: exact, of rank `sum_k r_k`.

  `sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, ..., w_K s_K B_K] [A_1; ...; A_K]`

  Args:
    loras: of one base; a leaf need not be in all of them.
    weights: one a LoRA.

  Returns:
    Factors in float32 and of scaling 1, and the first one's config.

  Raises:
    ValueError: where there is none, there is not one weight a LoRA, leaves are
      held in full, or shapes or layouts differ; all of these leaves.
  """
  if not loras or len(loras) != len(weights):
    raise ValueError(f'want one weight a LoRA: {len(weights)}, {len(loras)}')
  flags = [bool(lora.config.get('fan_in_fan_out')) for lora in loras]
  if len(set(flags)) > 1:
    raise ValueError(f'fan_in_fan_out differs: {flags}')
  lines = [
    f'{path}: held in full, of which there is no sum without the base'
    for path in dict.fromkeys(p for lora in loras for p in lora.full)
  ]
  factors = {}
  for path in dict.fromkeys(p for lora in loras for p in lora.factors):
    parts = [
      (weight * lora.factors[path].scaling, lora.factors[path])
      for weight, lora in zip(weights, loras, strict=True)
      if path in lora.factors
    ]
    first = parts[0][1]
    if (
      len({(f.module, f.kind, f.inner, f.axes, len(f.b)) for _, f in parts}) > 1
    ):
      lines.append(f'{path}: shapes or layouts differ')
      continue
    a = [f.a.astype(np.float32) for _, f in parts]
    b = [np.float32(w) * f.b.astype(np.float32) for w, f in parts]
    factors[path] = dataclasses.replace(
      first, a=np.concatenate(a), b=np.concatenate(b, axis=1), scaling=1.0
    )
  headers.raise_if(lines, 'LoRAs that cannot be summed:')
  return Lora(
    factors=factors,
    full={},
    config=loras[0].config,
    files=tuple(file for lora in loras for file in lora.files),
  )


def truncate(lora: Lora, rank: int) -> Lora:
  """Approximates every update by one of at most a rank, as well as any can.

  With `B = Q_B R_B` and `A^T = Q_A R_A`, the singular value decomposition of
  the small `s R_B R_A^T = U S V^T` is that of the update, up to the `Q`; the
  largest singular values are kept, and the update is never formed.

  Args:
    lora: updates.
    rank: of each update from then on, at most.

  Returns:
    Factors in float32 and of scaling 1 where the rank was larger; others as
    they are.

  Raises:
    ValueError: where `rank` is less than 1.

  References:
    Eckart and Young, `The approximation of one matrix by another of lower rank
    <https://doi.org/10.1007/BF02288367>`_, 1936
  """
  if rank < 1:
    raise ValueError(f'rank: want at least 1, got {rank}')

  def shorten(f):
    if f.rank <= rank:
      return f
    q_b, r_b = np.linalg.qr(f.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(f.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(f.scaling * r_b @ r_a.T)
    root = np.sqrt(s[:rank])
    return dataclasses.replace(
      f,
      a=((q_a @ vt[:rank].T) * root).T.astype(np.float32),
      b=((q_b @ u[:, :rank]) * root).astype(np.float32),
      scaling=1.0,
    )

  factors = {path: shorten(f) for path, f in lora.factors.items()}
  return dataclasses.replace(lora, factors=factors)
