"""The parts of a learned merge, which `dam_jax.meta` puts together.

A method is a `MetaSpec`: coefficients, masks, an adversary, losses, and how
many steps of what. `dam_jax.learned` names the published ones.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dam_jax import losses
from dam_jax import masks as masks_lib
from dam_jax.base import Plan
from dam_jax.masks import Mask
from dam_jax.perturbations import Adversary

GRANULARITIES = ('arithmetic', 'task', 'leaf')
CLEAN_LOSSES = ('entropy', 'reference')
SAFETY_LOSSES = ('entropy', 'consistency', 'reference')


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise ValueError(f'{name} must be one of {allowed}, got {value!r}')


def _given(references: jax.Array | None) -> jax.Array:
  if references is None:
    raise ValueError(
      "this merge reads the experts' predictions: give Batch.references"
    )
  return references


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
  """The weights of the task vectors.

  Attributes:
    init: their value at the start, of all or `[K]` of each expert.
    granularity: 'task' has one a task, 'leaf' one a task and leaf, and
      'arithmetic' one a task that is never learned.
    inner_tx: adapts them in each step before the masks move; None does not.
    inner_gradient: 'first_order' holds the adapted coefficients fixed while
      the masks move, 'exact' differentiates through their adaptation.
    joint_tx: learns them together with the masks; None does not.
    tx: learns them after the masks.
    stale: evaluate the inner gradient at the last step's coefficients, not at
      `init` (quirk A).
    leak: add what the last step of the masks left in the coefficients'
      gradient to the next inner gradient (quirk B).
    leak_last: the same for the first step after the masks (quirk C).
  """

  init: float | jax.Array = 0.3
  granularity: str = 'leaf'
  inner_tx: optax.GradientTransformation | None = None
  inner_gradient: str = 'first_order'
  joint_tx: optax.GradientTransformation | None = None
  tx: optax.GradientTransformation = optax.adam(1e-3)
  stale: bool = False
  leak: bool = False
  leak_last: bool = False

  def __post_init__(self):
    _one_of('granularity', self.granularity, GRANULARITIES)
    _one_of('inner_gradient', self.inner_gradient, ('first_order', 'exact'))

  def start(self, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Returns their value at the start, `shape` is `[K, ...]`."""
    init = jnp.asarray(self.init, dtype)
    if init.ndim and len(init) != shape[0]:
      raise ValueError(f'init is of {len(init)} experts, there are {shape[0]}')
    return jnp.broadcast_to(init.reshape(-1, *[1] * (len(shape) - 1)), shape)

  @property
  def reads_leak(self) -> bool:
    """Whether anything reads the gradient that masks leave in them."""
    return self.leak or self.leak_last or self.joint_tx is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """Weights of SAU's terms.

  Attributes:
    weight: of the unlearning of shared adversarial examples, in the safety
      loss.
    untargeted: of the cross-entropy in the adversary's gain.
    divergence: of the Jensen-Shannon divergence between model and reference on
      examples that are not shared yet, in the adversary's loss.
  """

  weight: float = 0.01
  untargeted: float = 0.5
  divergence: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaSpec:
  """Which parts the step has.

  Attributes:
    coefficients: of the task vectors.
    masks: by name; multiplied with each other and with the task vectors.
    updates: names of the masks that each update learns, in order, with the
      weights of the clean and of the safety loss in it.
    adversary: finds perturbations for the safety loss; None has none.
    clean_loss: 'entropy' of the merged model's predictions, or the
      cross-entropy to the references.
    safety_loss: on perturbed images: 'entropy', cross-entropy to the merged
      model's own clean prediction ('consistency'), or to the references.
    shun_weight: of keeping images on which it is known what the perturbation
      leads to from that class, in the safety loss; needs references.
    labels: what the adversary leads away from: the merged model's
      'prediction' on the clean image, or the 'reference'.
    shared: shared-adversarial terms of SAU in adversary and safety loss, whose
      reference is the unmasked merge; None has none.
    own_images: perturb other images than the clean loss sees.
    warmup_steps: steps in which only the adversary moves.
    mask_steps: steps in which the masks are learned.
    coefficient_steps: steps after that in which the coefficients are.
    coefficient_safety: weight of the safety loss in those.
    final: the masks after `mask_steps`: 'expected', 'mode' or 'sample'.
  """

  coefficients: Coefficients = Coefficients()
  masks: Mapping[str, Mask] = dataclasses.field(default_factory=dict)
  updates: Sequence[tuple[tuple[str, ...], float, float]] = ()
  adversary: Adversary | None = None
  clean_loss: str = 'entropy'
  safety_loss: str = 'entropy'
  shun_weight: float = 0.0
  labels: str = 'prediction'
  shared: Shared | None = None
  own_images: bool = False
  warmup_steps: int = 0
  mask_steps: int = 0
  coefficient_steps: int = 0
  coefficient_safety: float = 0.0
  final: str = 'expected'

  def __post_init__(self):
    _one_of('clean_loss', self.clean_loss, CLEAN_LOSSES)
    _one_of('safety_loss', self.safety_loss, SAFETY_LOSSES)
    _one_of('labels', self.labels, ('prediction', 'reference'))
    _one_of('final', self.final, masks_lib.KINDS)
    for name in ('warmup_steps', 'mask_steps', 'coefficient_steps'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'{name} must not be negative, got {getattr(self, name)}'
        )
    if self.own_images and self.safety_loss == 'consistency':
      raise ValueError(
        "safety_loss='consistency' compares with the clean image of the same "
        'draw: own_images must be False'
      )
    if self.adversary is None and (
      self.coefficient_safety or any(safety for *_, safety in self.updates)
    ):
      raise ValueError('a safety loss needs an adversary')
    unknown = {n for group, _, _ in self.updates for n in group}
    unknown -= set(self.masks)
    if unknown:
      raise ValueError(
        f'updates name masks {sorted(unknown)}, there are {sorted(self.masks)}'
      )

  def draws(self, clean: float, safety: float) -> int:
    """Returns how many draws of images an update with these weights reads."""
    return 2 if self.own_images and clean and safety else 1

  def plan(self) -> Plan:
    """Returns what the steps read."""
    ascents = self.adversary.ascents if self.adversary else 0
    phases = 0
    if self.mask_steps:
      inner = self.coefficients.inner_tx is not None
      outer = sum(self.draws(clean, safe) for _, clean, safe in self.updates)
      phases = inner + ascents + outer
    if self.coefficient_steps:
      safety = self.coefficient_safety
      late = self.draws(1.0, safety) + (ascents if safety else 0)
      phases = max(phases, late)
    return Plan(
      steps=self.warmup_steps + self.mask_steps + self.coefficient_steps,
      phases=phases,
      references='reference'
      in (self.clean_loss, self.safety_loss, self.labels),
    )

  def metrics(self) -> tuple[list[str], list[str]]:
    """Returns names of the metrics `[T]` and `[]` that some step measures."""
    per_task, norms = [], []
    if self.adversary is not None:
      per_task += ['perturbation/loss', 'perturbation/fooled']
      norms += ['perturbation']
    if self.mask_steps:
      per_task += ['inner/loss'] * (self.coefficients.inner_tx is not None)
      per_task += ['clean/loss'] * any(clean for _, clean, _ in self.updates)
      per_task += ['safety/loss'] * any(safe for *_, safe in self.updates)
      per_task += ['shared/loss'] * (self.shared is not None)
      norms += ['+'.join(names) for names, _, _ in self.updates]
    if self.coefficient_steps:
      per_task += ['coefficients/loss']
      per_task += ['safety/loss'] * bool(self.coefficient_safety)
      norms += ['coefficients']
    return per_task, [f'{name}/grad_norm' for name in norms]

  def clean(self, logits: jax.Array, references: jax.Array | None) -> jax.Array:
    """Returns the clean loss `[T]` of logits `[T, B, L]`."""
    if self.clean_loss == 'entropy':
      each = losses.entropy(logits)
    else:
      each = losses.cross_entropy(logits, _given(references))
    return jnp.mean(each, axis=-1)

  def safety(
    self,
    logits: jax.Array,
    clean_logits: jax.Array,
    references: jax.Array | None,
    shunned: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the safety loss `[T]` of logits on perturbed images."""
    if self.safety_loss == 'entropy':
      each = losses.entropy(logits)
    elif self.safety_loss == 'consistency':
      each = losses.cross_entropy(logits, jnp.argmax(clean_logits, axis=-1))
    else:
      each = losses.cross_entropy(logits, _given(references))
    loss = jnp.mean(each, axis=-1)
    if self.shun_weight and shunned is not None:
      labels = jnp.argmax(_given(references), axis=-1)
      away = losses.shun(logits, labels, shunned)
      loss += self.shun_weight * away.astype(loss.dtype)
    return loss
