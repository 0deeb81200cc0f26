"""Repairs of a merged model: masks on what the merge added to the base.

Both are variants in the repository of Defense-Aware Merging that learn one
relaxed Bernoulli mask on unlabelled images; they are named after it, since the
published AWM and SAU use labels. Pass the merged model as the only expert:

  merger = dj.repo_awm(logits_fn, image_shape=(32, 32, 3), num_tasks=6)
  experts = dj.tree.stack([merged])
"""

from typing import Any

import optax

from dam_jax import perturbations
from dam_jax.base import Merger
from dam_jax.masks import Mask
from dam_jax.meta import identity
from dam_jax.meta import meta_merger
from dam_jax.meta_spec import Coefficients
from dam_jax.meta_spec import MetaSpec
from dam_jax.meta_spec import Shared
from dam_jax.typing import LogitsFn, PreprocessFn


def repo_awm(
  logits_fn: LogitsFn,
  *,
  image_shape: tuple[int, int, int],
  num_tasks: int,
  mask: Mask = Mask(),
  adversary_tx: optax.GradientTransformation = optax.adam(1e-4),
  safety_weight: float = 0.01,
  steps: int = 2000,
  final: str = 'sample',
  preprocess_fn: PreprocessFn = identity,
  shared: Shared | None = None,
) -> Merger:
  """Adversarial weight masking as the DAM repository has it.

  `theta = theta_0 + m * (theta_merged - theta_0)`; the mask minimises
  `sum_t H(f(x)) + 0.01 H(f(x + delta))` against a universal perturbation.

  Args:
    logits_fn: one forward pass for all tasks.
    image_shape: `(H, W, C)`.
    num_tasks: `T`.
    mask: and what learns it.
    adversary_tx: learns the perturbations.
    safety_weight: of the entropy on perturbed images.
    steps: of the mask.
    final: the mask after its steps: 'sample', 'expected' or 'mode'.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.
    shared: terms that `repo_sau` adds.

  Returns:
    A merger over the merged model as the only expert; it reads two draws of
    images a step.

  References:
    Chai and Chen, `One-shot Neural Backdoor Erasing via Adversarial Weight
    Masking <https://arxiv.org/abs/2207.04497>`_, 2022
  """
  spec = MetaSpec(
    coefficients=Coefficients(init=1.0, granularity='arithmetic'),
    masks={'shared': mask},
    updates=[(('shared',), 1.0, safety_weight)],
    adversary=perturbations.additive(
      image_shape,
      preprocess_fn=preprocess_fn,
      normalized=True,
      tx=adversary_tx,
    ),
    shared=shared,
    mask_steps=steps,
    final=final,
  )
  return meta_merger(
    logits_fn, spec, preprocess_fn=preprocess_fn, num_tasks=num_tasks
  )


def repo_sau(logits_fn: LogitsFn, **options: Any) -> Merger:
  """Shared adversarial unlearning as the DAM repository has it.

  `repo_awm` with SAU's terms: the perturbation prefers examples on which the
  masked and the plain merge err alike, and the mask unlearns those.

  Args:
    logits_fn: one forward pass for all tasks.
    **options: of `repo_awm`; `shared` defaults to `Shared()`.

  Returns:
    A merger over the merged model as the only expert.

  References:
    Wei et al., `Shared Adversarial Unlearning: Backdoor Mitigation by
    Unlearning Shared Adversarial Examples
    <https://arxiv.org/abs/2307.10562>`_, 2023
  """
  options.setdefault('shared', Shared())
  return repo_awm(logits_fn, **options)
