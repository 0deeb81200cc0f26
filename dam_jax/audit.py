"""Which upload to distrust: triggers inverted on each expert.

A backdoored expert calls any image its target once a small trigger is on it,
and the base, which everyone may download, does not. So a trigger is searched
for every class that the expert obeys and the base ignores, and an expert is
suspicious where there is one. The images are clean and unlabelled. Experts that
were made to be merged with each other are searched together (`company`).

  >>> import jax
  >>> import jax.numpy as jnp
  >>> def logits_fn(params, task, images):  # a bright corner means class 2
  ...   corner = images[:, 0, 0].mean(-1)
  ...   return params * jnp.stack([0 * corner, 0 * corner, corner - 0.5], -1)
  >>> inverter = Inverter(
  ...   task_logits_fn=logits_fn, image_shape=(4, 4, 3), areas=(1.0,))
  >>> images = jnp.full((8, 4, 4, 3), 0.2)
  >>> base, params = jnp.float32(0.0), jnp.float32(20.0)
  >>> found = inverter.search(
  ...   jax.random.key(0), params, 0, images, 3, base=base)
  >>> found.classes[0].item(), found.success[0, 0].item()
  (2, 1.0)
  >>> found.suspicion > 1
  True
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dam_jax import losses
from dam_jax import tree
from dam_jax.compilation import compiled
from dam_jax.perturbations import SoftPatch
from dam_jax.typing import Params, TaskLogitsFn

ALIKE = 0.3
"""Cosine of two task vectors above which they were not made apart.

Of experts that were, for different tasks, it was up to 0.17 (EMNIST's letters
and MNIST); of MergeBackdoor's pairs, 0.44.
"""


class Inversions(NamedTuple):
  """Triggers found on one model, `A` of them a class, the best class first.

  Attributes:
    classes: `[C]` that they lead to.
    score: `[C]` mean over the rounds of the search of the class's best lead.
    patches: leaves `[C, A, H, W, ...]`.
    lead: `[C, A]` how much better the model obeys the patch than the base does:
      the logarithm of the base's loss over the model's, where a loss is the
      mean cross-entropy to the class on images that are not of it without the
      patch, and 1 for a base that is not known.
    success: `[C, A]` share of these that the model calls the class.
    area: `[C, A]` pixels that the patch covers.
  """

  classes: np.ndarray
  score: np.ndarray
  patches: SoftPatch
  lead: np.ndarray
  success: np.ndarray
  area: np.ndarray

  @property
  def suspicion(self) -> float:
    """How far the best class stands out: its score over the next one's.

    Any fine-tuning gives leads, and to several classes alike. At least 0, which
    is also that of a model with one class.
    """
    return float(self.score[0] - self.score[1]) if len(self.score) > 1 else 0.0

  def best(self) -> int:
    """Returns which patch of the best class leads most."""
    return int(np.argmax(self.lead[0]))


def gram(base: Params, experts: Params) -> jax.Array:
  """Returns the inner products of task vectors, `[K, K]` float32.

  Those of a model are the sum of those of its parts, which may be read one by
  one.

  Args:
    base: parameters, or a part of them.
    experts: the same of all experts, leaves `[K, ...]`.

  Raises:
    ValueError: where the experts do not fit the base.
  """
  tree.check_stacked(base, experts)

  def products(x, y):
    delta = (y - x[None]).reshape(len(y), -1).astype(jnp.float32)
    return jnp.matmul(delta, delta.T, precision='highest')

  leaves = jax.tree.leaves(jax.tree.map(products, base, experts))
  return functools.reduce(jnp.add, leaves)


def company(
  inner_products: jax.typing.ArrayLike, *, alike: float = ALIKE
) -> list[dict[int, float]]:
  """Finds experts for different tasks that were not made apart.

  Two uploads may each be harmless and obey a trigger only when merged, as
  MergeBackdoor's do. For that they are trained together, and it shows.

  Args:
    inner_products: of task vectors of different tasks, `[K, K]`.
    alike: cosine above which two are each other's company.

  Returns:
    Of each expert its company: the cosine by the other's index.

  References:
    Wang et al., `From Purity to Peril: Backdooring Merged Models From
    "Harmless" Benign Components
    <https://www.usenix.org/conference/usenixsecurity25/presentation/wang-lijin>`_,
    2025; that task vectors are nearly orthogonal otherwise is of Ilharco et
    al., `Editing Models with Task Arithmetic
    <https://arxiv.org/abs/2212.04089>`_, 2023

  >>> import jax.numpy as jnp
  >>> experts = jnp.array([[2., 0.], [0., 1.], [4., 3.]])
  >>> company(gram(jnp.zeros(2), experts), alike=0.7)
  [{2: 0.8}, {}, {0: 0.8}]
  """
  products = np.asarray(inner_products, np.float64)
  norm = np.sqrt(np.diag(products))
  cosines = products / np.maximum(np.outer(norm, norm), np.finfo(float).tiny)
  return [
    {j: round(float(c), 4) for j, c in enumerate(row) if j != i and c > alike}
    for i, row in enumerate(cosines)
  ]


def in_company(
  base: Params, experts: Params, expert: int, others: Collection[int]
) -> Params:
  """Returns `theta_k + sum_j tau_j`, an expert with its company.

  Args:
    base: parameters.
    experts: stacked, leaves `[K, ...]`.
    expert: `k`.
    others: `j`; without any the expert comes out bit for bit.
  """
  at = np.array([*others], int)
  return jax.tree.map(
    lambda x, y: y[expert] + jnp.sum(y[at] - x[None], axis=0), base, experts
  )


def together(base: Params, experts: Params, members: Collection[int]) -> Params:
  """Returns `theta_0 + n^-1/2 sum_j tau_j`, what `n` experts know together.

  A trigger for a task that none of them is for was planted by one of them, as
  BadMerging's off-task attack does. The task vectors of different tasks are
  nearly orthogonal, so this one is about as long as theirs are.

  Args:
    base: parameters.
    experts: stacked, leaves `[K, ...]`.
    members: `j`; without any the base comes out bit for bit.

  References:
    Zhang et al., `BadMerging: Backdoor Attacks Against Model Merging
    <https://arxiv.org/abs/2408.07362>`_, 2024, of off-task attacks

  >>> import jax.numpy as jnp
  >>> together(jnp.zeros(2), jnp.eye(2), [0, 1]).round(3).tolist()
  [0.7070000171661377, 0.7070000171661377]
  """
  at = np.array([*members], int)
  share = max(len(at), 1) ** -0.5
  return jax.tree.map(
    lambda x, y: x + share * jnp.sum(y[at] - x[None], axis=0), base, experts
  )


def weakened(base: Params, params: Params, share: float) -> Params:
  """Returns `theta_0 + share (theta - theta_0)`.

  Args:
    base: parameters.
    params: of an expert.
    share: of its task vector.
  """
  return jax.tree.map(lambda x, y: x + share * (y - x), base, params)


def apply_patch(patch: SoftPatch, images: jax.Array) -> jax.Array:
  """Puts one patch `[H, W, ...]` on images `[N, H, W, C]` in [0, 1]."""
  opacity, pattern = patch.opacity()[None], patch.pattern()[None]
  return (1 - opacity) * images + opacity * pattern


def _rows(tree: Any, at: Any) -> Any:
  return jax.tree.map(lambda x: x[at], tree)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Inverter:
  """A search for triggers, one a class, which is compiled once.

  It descends, over soft patches and on images that it draws,
  `-log p(class) - log(1 - p_base(class)) + price * relu(covered / area - 1)`.
  Without the second term the best patches are often those that look like a
  class; where no base is known, there is none.

  All classes are scouted, twice with a few steps: a patch that comes far fast
  is soon known, but may as well be stuck. So for the best `keep` classes some
  triggers are searched, all from the start, and two of the classes go on. A
  class is as good as the best of its triggers, and each of the three rounds
  counts alike: a trigger that is there is found again, luck is not. The rounds
  are judged on the first 8, 16 and 32 images.

  Attributes:
    task_logits_fn: `(params, task, images [N, H, W, C] in [0, 1]) -> [N, L]`.
    image_shape: `(H, W, C)`.
    areas: in pixels, what each of a class's triggers may cover for free, which
      is not known; some may be equal. Scouts have their geometric mean.
    price: of covering twice as much, in nats.
    ease: share of the task vector that scouts, and then the others, see in
      their first round, where the base is known. Gradients tell little on a
      task vector that was amplified, as LoBAM's are.
    scout_tx: descends for the scouts.
    tx: descends for the others.
    batch: images a patch and step.
    scouts: for each class.
    first: steps of a scout.
    last: steps of each of the two rounds that follow.
    keep: see above.
    chunk: patches to a forward pass.
    compiler_options: of XLA, by name; None is the usual ones.

  Raises:
    ValueError: where a number makes no sense.

  References:
    Wang et al., `Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
    Neural Networks <https://doi.org/10.1109/SP.2019.00031>`_, 2019; that most
    classes are given up early is of Shen et al., `Backdoor Scanning for Deep
    Neural Networks through K-Arm Optimization
    <https://arxiv.org/abs/2102.05123>`_, 2021
  """

  task_logits_fn: TaskLogitsFn
  image_shape: tuple[int, int, int]
  areas: tuple[float, ...]
  price: float = 2.0
  ease: float = 0.75
  scout_tx: optax.GradientTransformation = optax.adam(2.0)
  tx: optax.GradientTransformation = optax.adam(0.5)
  batch: int = 4
  scouts: int = 2
  first: int = 5
  last: int = 20
  keep: int = 4
  chunk: int = 4
  compiler_options: Mapping[str, Any] | None = None

  def __post_init__(self):
    self._check_areas(self.areas)
    counts = {
      name: getattr(self, name)
      for name in ('batch', 'scouts', 'first', 'last', 'keep', 'chunk')
    }
    if min(counts.values()) < 1:
      raise ValueError(f'these must be positive: {counts}')
    if not 0 < self.ease <= 1:
      raise ValueError(f'ease must be in (0, 1], got {self.ease}')

  def _check_areas(self, areas):
    pixels = self.image_shape[0] * self.image_shape[1]
    if not areas or not all(0 < area <= pixels for area in areas):
      raise ValueError(f'areas must be in (0, {pixels}], got {areas}')

  def search(
    self,
    key: jax.Array,
    params: Any,
    task: Any,
    images: jax.Array,
    num_classes: int,
    *,
    base: Any = None,
    areas: tuple[float, ...] | None = None,
    scouts: int | None = None,
  ) -> Inversions:
    """Searches a trigger for every class.

    Args:
      key: of the first patches and of the draws.
      params: of the model.
      task: index.
      images: `[N, H, W, C]` in [0, 1].
      num_classes: `L`.
      base: that the model was fine-tuned from, if it is known.
      areas: instead of the inverter's own.
      scouts: likewise.

    Returns:
      Those of the two best classes.

    Raises:
      ValueError: where an area makes no sense.
    """
    areas = self.areas if areas is None else areas
    scouts = self.scouts if scouts is None else scouts
    self._check_areas(areas)
    keys = jax.random.split(key, 3)
    eased = params if base is None else weakened(base, params, self.ease)
    play = functools.partial(self._play, base=base, task=task, images=images)
    area = math.prod(areas) ** (1 / len(areas))

    own, score, *_ = play(
      eased,
      keys[0],
      np.arange(num_classes),
      np.zeros(num_classes),
      areas=(area,) * scouts,
      tx=self.scout_tx,
      num=self.first,
      judged=8,
    )
    play = functools.partial(play, areas=areas, tx=self.tx, num=self.last)
    own, score = _rows((own, score), slice(self.keep))
    own, score, carry, _ = play(eased, keys[1], own, score, judged=16)
    own, score, carry = _rows((own, score, carry), slice(2))
    own, score, carry, rates = play(
      params, keys[2], own, score, carry, judged=32
    )
    return Inversions(own, score / 3, carry[0], *rates)

  def _play(
    self,
    params,
    key,
    own,
    score,
    carry=None,
    *,
    base,
    task,
    images,
    judged,
    areas,
    tx,
    num,
  ):
    """Takes steps; returns classes and what came of them, the best first.

    A class has a patch for each area: leaves of `carry` are `[C, A, ...]`. Its
    best lead is added to its score.
    """
    shape, models = (len(own), len(areas)), (params, base)
    init_key, key = jax.random.split(key)
    carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
    goal = np.repeat(own, shape[1]), np.tile(np.float32(areas), shape[0])
    # As many as the last round judges, so that one program serves all rounds.
    clean = self._classify(params, task, images[:32])[:judged]
    total, found = len(goal[0]), []
    for begin in range(0, total, self.chunk):
      # The last chunk is filled up, so that one program serves all.
      at = np.minimum(np.arange(begin, begin + self.chunk), total - 1)
      part, aims = _rows((carry, goal), at)
      if part is None:
        part = self._init(jax.random.fold_in(init_key, begin), tx)
      part = self._descend(tx, num, key, models, task, images, aims, part)
      seen = images[:judged]
      rates = self._judge(models, task, seen, clean, aims[0], part[0])
      found.append(_rows((part, rates), slice(total - begin)))
    carry, rates = jax.tree.map(
      lambda *x: np.concatenate(x).reshape(*shape, *x[0].shape[1:]), *found
    )
    score = score + rates[0].max(axis=1)
    order = np.argsort(-score, kind='stable')
    return _rows((own, score, carry, rates), order)

  @compiled(1)
  def _init(self, key, tx):
    place, colour = jax.random.split(key)
    lead = (self.chunk, *self.image_shape[:2])
    patches = SoftPatch(
      -3 + 0.1 * jax.random.normal(place, (*lead, 1)),
      jax.random.normal(colour, (*lead, self.image_shape[2])),
    )
    return patches, jax.vmap(tx.init)(patches)

  @compiled(0, 1)
  def _descend(self, tx, num, key, models, task, images, aims, carry):
    params, base = models

    def loss_fn(patch, images, target, area):
      triggered = apply_patch(patch, images)
      obeyed = losses.cross_entropy(
        self.task_logits_fn(params, task, triggered),
        jnp.full(len(images), target),
      )
      ignored = 0.0
      if base is not None:
        # A quarter of the images tells as much, for a quarter less time.
        of_base = self.task_logits_fn(base, task, triggered[::4])
        # 0.999 bounds this, and its gradient, where the base is certain.
        ignored = -jnp.log1p(-0.999 * jax.nn.softmax(of_base)[:, target])
      over = jax.nn.relu(jnp.sum(patch.opacity()) / area - 1)
      loss = jnp.mean(obeyed) + jnp.mean(ignored)
      return loss + self.price * over

    def step(carry, key):
      patches, states = carry
      x = images[jax.random.randint(key, (self.batch,), 0, len(images))]
      grads = jax.vmap(jax.grad(loss_fn), (0, None, 0, 0))(patches, x, *aims)
      updates, states = jax.vmap(tx.update)(grads, states)
      return (optax.apply_updates(patches, updates), states), None

    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, num))
    return carry

  @compiled()
  def _classify(self, params, task, images):
    return jnp.argmax(self.task_logits_fn(params, task, images), axis=-1)

  @compiled()
  def _judge(self, models, task, images, clean, own, patches):
    params, base = models

    def one(args):
      patch, target = args
      others = (clean != target).astype(jnp.float32)
      count = jnp.maximum(jnp.sum(others), 1)
      triggered = apply_patch(patch, images)

      def loss(logits):
        each = losses.cross_entropy(logits, jnp.full(len(images), target))
        # Below a thousandth of a nat the difference is the optimiser's.
        return jnp.maximum(jnp.sum(others * each) / count, 1e-3)

      logits = self.task_logits_fn(params, task, triggered)
      hit = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
      of_base = 1.0
      if base is not None:
        of_base = loss(self.task_logits_fn(base, task, triggered))
      lead = jnp.log(of_base / loss(logits))
      # Of a class that all images show already there is nothing to say.
      lead = jnp.where(jnp.any(clean != target), lead, 0.0)
      return lead, jnp.sum(others * hit) / count, jnp.sum(patch.opacity())

    return jax.lax.map(one, (patches, own))
