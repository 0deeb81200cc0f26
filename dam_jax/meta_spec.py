"""The parts of a learned merge, which `dam_jax.meta` puts together.

A method is a `MetaSpec`: coefficients, masks, an adversary, losses, and how
many steps of what. `dam_jax.learned` names the published ones.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import optax

from dam_jax import masks as masks_lib
from dam_jax.masks import Mask
from dam_jax.perturbations import Adversary

GRANULARITIES = ('arithmetic', 'task', 'leaf')
CLEAN_LOSSES = ('entropy', 'reference')
SAFETY_LOSSES = ('entropy', 'consistency', 'reference')


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise ValueError(f'{name} must be one of {allowed}, got {value!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
  """The weights of the task vectors.

  Attributes:
    init: their value at the start.
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

  init: float = 0.3
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
    unknown = {n for group, _, _ in self.updates for n in group}
    unknown -= set(self.masks)
    if unknown:
      raise ValueError(
        f'updates name masks {sorted(unknown)}, there are {sorted(self.masks)}'
      )
