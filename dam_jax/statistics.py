"""Statistics of experts on data: Fisher information and Grams of inputs.

Each is an `Accumulator`, pure functions in the form of optax's microbatching:
`init` makes a carry of shapes alone, `update` adds a batch to it and `finalize`
divides. A carry never changes its type, so `update` runs under `jax.jit` and
`jax.lax.scan`. `dam_jax.weighted` merges by the results.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> def inputs_fn(params, task, images):
  ...   return {'w': images.reshape(len(images), -1)}
  >>> experts = {'w': jnp.zeros((1, 2, 3))}
  >>> images = jnp.array([[3., 0.], [1., 2.]]).reshape(1, 2, 1, 2, 1)
  >>> grams = dj.statistics.input_grams(inputs_fn)
  >>> carry = grams.init(jax.random.key(0), experts, images)
  >>> carry = grams.update(carry, experts, images)
  >>> grams.finalize(carry)['w'].tolist()
  [[[5.0, 1.0], [1.0, 2.0]]]
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dam_jax.typing import InputsFn, Params, TaskLogitsFn

LABELS = ('true', 'sampled', 'expected', 'fusion_bench')
"""Which labels the Fisher information takes the gradients of."""


class Accumulator(NamedTuple):
  """A statistic of `K` experts, each on the images of its own task.

  Attributes:
    init: `(key, experts, images) -> carry`; reads nothing but shapes and
      dtypes, so arrays and `jax.ShapeDtypeStruct`s both do.
    update: `(carry, experts, images, references=None) -> carry`, with experts
      `[K, ...]`, images `[K, B, H, W, C]` and references `[K, B, L]`.
    finalize: `carry -> statistic`, leaves `[K, ...]`; zero before any update.
  """

  init: Callable[..., Any]
  update: Callable[..., Any]
  finalize: Callable[[Any], Any]


class Carry(NamedTuple):
  """What an accumulator keeps.

  Attributes:
    key: of what is sampled; never changes.
    count: [] images of each task so far.
    total: the sum over them, leaves `[K, ...]`, at least float32.
  """

  key: jax.Array
  count: jax.Array
  total: Any


def _wide(dtype: Any) -> np.dtype:
  floating = jnp.issubdtype(dtype, jnp.floating)
  return np.promote_types(dtype if floating else np.float32, np.float32)


def _start(key: jax.Array, shapes: Any) -> Carry:
  """Copies the key: a donated carry must not delete the caller's."""
  total = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype)), shapes)
  return Carry(jnp.copy(key), jnp.zeros([], jnp.int32), total)


def _mean(carry: Carry) -> Any:
  count = jnp.maximum(carry.count, 1)
  return jax.tree.map(lambda x: x / count.astype(x.dtype), carry.total)


def diagonal_fisher(
  task_logits_fn: TaskLogitsFn, *, labels: str = 'sampled', microbatch: int = 1
) -> Accumulator:
  """Diagonal of each expert's Fisher information on its own task.

  `F_t = 1/N sum_x E_y [(d log p_t(y | x) / d theta)^2]`: gradients are squared
  image by image and then averaged.

  It costs one forward and one backward pass an image, as much as the gradient
  of a batch; 'expected' costs `L` backward passes. It holds `K` models for the
  sum, and `microbatch` models of gradients at a time.

  Args:
    task_logits_fn: one forward pass of one expert for the images of its task.
    labels: the expectation over `y` is taken over
      'sampled': one draw an image from the expert's own prediction, unbiased;
      'expected': all `L` classes, exactly, as the authors' code does;
      'true': the label of the image, which is the empirical Fisher and reads
        one-hot references;
      'fusion_bench': FusionBench's estimate, the square of a whole batch's
        gradient of `sum_x sum_y sqrt(p(y | x)) log p(y | x)`, over the number
        of images. Products of different images and classes stay in it, so it
        depends on the batch's size.
    microbatch: images whose gradients are taken at once; divides the batch.

  Returns:
    An accumulator of a pytree like the experts, at least float32; zero for
    leaves that are not floating point.

  Raises:
    ValueError: where an option is none of those; at update, where the
      microbatch does not divide the batch or true labels are missing.

  Examples:
    >>> def logits_fn(params, task, images):
    ...   return images.reshape(len(images), -1) @ params['w']
    >>> fisher = diagonal_fisher(logits_fn, labels='expected')
    >>> experts = {'w': jnp.zeros((1, 1, 2))}
    >>> images = jnp.array([2., 4.]).reshape(1, 2, 1, 1, 1)
    >>> carry = fisher.init(jax.random.key(0), experts, images)
    >>> carry = fisher.update(carry, experts, images)
    >>> fisher.finalize(carry)['w'].round(3).tolist()
    [[[2.5, 2.5]]]

  References:
    Matena and Raffel, `Merging Models with Fisher-Weighted Averaging
    <https://arxiv.org/abs/2111.09832>`_, 2022
  """
  if labels not in LABELS:
    raise ValueError(f'labels must be one of {LABELS}, got {labels!r}')
  if microbatch < 1 or (labels == 'fusion_bench' and microbatch > 1):
    raise ValueError(
      "microbatch must be positive, and 1 for labels='fusion_bench', which "
      f'squares whole batches, got {microbatch}'
    )

  engine = _Fisher(task_logits_fn, labels, microbatch)
  return Accumulator(engine.init, engine.update, _mean)


@dataclasses.dataclass(frozen=True)
class _Fisher:
  """The pure functions of `diagonal_fisher`; see there."""

  task_logits_fn: TaskLogitsFn
  labels: str
  microbatch: int

  def init(self, key: jax.Array, experts: Params, images: Any = None) -> Carry:
    """Returns the carry before any batch."""
    del images
    return _start(key, experts)

  def update(self, carry: Carry, experts, images, references=None) -> Carry:
    """Returns the carry with a batch in it."""
    num_tasks, batch = images.shape[:2]
    if self.labels == 'true' and references is None:
      raise ValueError("labels='true' reads one-hot labels: give references")
    if batch % self.microbatch:
      raise ValueError(
        f'a batch of {batch} images does not divide into microbatches of '
        f'{self.microbatch}'
      )
    # What one gradient is taken of.
    size = batch if self.labels == 'fusion_bench' else 1
    data = jax.tree.map(
      lambda x: x.reshape(num_tasks, -1, self.microbatch, size, *x.shape[2:]),
      (images, references),
    )
    keys = jax.random.split(
      jax.random.fold_in(carry.key, carry.count), data[0].shape[:3]
    )

    def one(args):
      expert, task, total, parts = args

      def add(total, part):
        squares = functools.partial(self._squares, total, expert, task)
        each = jax.vmap(squares)(*part)
        total = jax.tree.map(lambda t, x: t + jnp.sum(x, axis=0), total, each)
        return total, None

      return lax.scan(add, total, parts)[0]

    tasks = jnp.arange(num_tasks)
    total = lax.map(one, (experts, tasks, carry.total, (keys, *data)))
    return carry._replace(count=carry.count + batch, total=total)

  def _squares(self, like, expert, task, key, images, references):
    """Returns the squared gradients of images `[N, ...]`, like a total."""

    def log_p_fn(params):
      logits = self.task_logits_fn(params, task, images)
      return jax.nn.log_softmax(logits.astype(_wide(logits.dtype)))

    log_p, pull = jax.vjp(log_p_fn, expert)
    rows = _cotangents(self.labels, key, log_p, references)

    def leaf_fn(total, grad):
      # Leaves that are not floating point have no gradient.
      if grad.dtype == jax.dtypes.float0:
        return total
      return total + jnp.square(grad.astype(total.dtype))

    def add(total, row):
      return jax.tree.map(leaf_fn, total, *pull(row)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, like), rows)[0]


def _cotangents(
  labels: str, key: jax.Array, log_p: jax.Array, references: jax.Array | None
) -> jax.Array:
  """Returns `[R, N, L]`; the gradient of each row's product is squared."""
  if labels == 'true':
    assert references is not None
    return references[None].astype(log_p.dtype)
  if labels == 'sampled':
    drawn = jax.random.categorical(key, log_p)
    return jax.nn.one_hot(drawn, log_p.shape[-1], dtype=log_p.dtype)[None]
  root = jnp.exp(log_p / 2)[None]
  if labels == 'fusion_bench':
    return root
  return root * jnp.eye(log_p.shape[-1], dtype=log_p.dtype)[:, None]


def gram(inputs: jax.Array) -> jax.Array:
  """Mean over rows of `x x^T`, that is `X^T X / N`.

  Args:
    inputs: `X`, `[N, in]`.

  Returns:
    `[in, in]`, at least float32.

  Examples:
    >>> gram(jnp.array([[3., 0.], [1., 2.]])).tolist()
    [[5.0, 1.0], [1.0, 2.0]]
  """
  # Full precision: what reads a Gram solves equations with it.
  return jnp.einsum(
    'ni,nj->ij',
    inputs,
    inputs,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=_wide(inputs.dtype),
  ) / len(inputs)


def grams(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the Gram `[in, in]` of each layer's inputs `[N, in]`, by path."""
  return {path: gram(x) for path, x in inputs.items()}


def input_grams(
  inputs_fn: InputsFn,
  *,
  grams_fn: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]] = grams,
) -> Accumulator:
  """Grams `G_t = X_t^T X_t / N` of the inputs of each expert's linear layers.

  Rows are images, or their tokens. It costs one forward pass an image and, a
  layer, a product of `N x in x in`. It holds `K` Grams a layer: for CLIP
  ViT-B/32 0.6 GB an expert, most of it the 3072 inputs of each second MLP
  layer.

  Args:
    inputs_fn: what a forward pass gives to each linear layer, by the path of
      its kernel.
    grams_fn: from those inputs to their Grams, for who wants some of them.

  Returns:
    An accumulator of a dict from paths to `[K, in, in]`.

  References:
    Jin et al., `Dataless Knowledge Fusion by Merging Weights of Language Models
    <https://arxiv.org/abs/2212.09849>`_, 2023
  """

  def each(experts, images):
    def one(args):
      return grams_fn(inputs_fn(*args))

    return lax.map(one, (experts, jnp.arange(len(images)), images))

  def init_fn(key, experts, images):
    return _start(key, jax.eval_shape(each, experts, images))

  def update_fn(carry, experts, images, references=None):
    del references
    batch = images.shape[1]
    total = jax.tree.map(
      lambda t, x: t + batch * x, carry.total, each(experts, images)
    )
    return carry._replace(count=carry.count + batch, total=total)

  return Accumulator(init_fn, update_fn, _mean)
