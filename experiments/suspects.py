"""What a merge asks of its experts first: which class a small trigger gives.

The triggers are evidence for the report, and the seeds that `dam_robust` starts
its search from.
"""

from collections.abc import Callable, Sequence
import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import audit
from dam_jax import checkpoint
from dam_jax.data.tasks import Task
from dam_jax.perturbations import Seeds
from dam_jax.perturbations import SoftPatch

AREAS = (10.0, 18.0, 28.0, 40.0)
"""Of seeds, in pixels of 32 x 32: what a trigger covers is not known."""

SHARE = 0.5
"""Of an expert's task vector, when seeds are searched: about what it keeps in a
merge, where triggers that were found on all of it often work no more."""


class Suspect(NamedTuple):
  """What was found on one expert.

  Attributes:
    suspicion: how far the class stands out.
    target: the class.
    success: share of dev images of other classes that become it.
    picture: the trigger on grey, `[H, W, C]`.
    seeds: triggers for the class of several areas, leaves `[S, H, W, ...]`.
    company: experts that it was searched together with: how alike the task
      vectors are, by index.
  """

  suspicion: float
  target: int
  success: float
  picture: np.ndarray
  seeds: SoftPatch
  company: dict[int, float]


def find(
  task_logits_fn: Any,
  base: Any,
  experts: Any,
  tasks: Sequence[Task],
  hashes: Sequence[str],
  *,
  base_hash: str,
  folder: pathlib.Path,
  seed: int,
  images: int = 64,
  advance: Callable[[int], None] = lambda num: None,
) -> list[Suspect]:
  """Searches triggers on each expert, alone or in its company.

  Args:
    task_logits_fn: `(params, task, images in [0, 1]) -> logits`.
    base: that they were fine-tuned from.
    experts: leaves `[T, ...]`.
    tasks: of the experts, whose dev images are used.
    hashes: SHA-256 of each expert's file.
    base_hash: and of the base's.
    folder: where what was found is kept, and read again; runs may share it.
    seed: of the search.
    images: dev images a task.
    advance: told of each expert that is done.

  Returns:
    What was found, by expert.
  """
  image_shape = tasks[0].dev.images.shape[1:]
  scale = image_shape[0] * image_shape[1] / 32**2
  inverter = audit.Inverter(
    task_logits_fn=task_logits_fn,
    image_shape=image_shape,
    area=20 * scale,
  )
  out, company = [], audit.company(audit.gram(base, experts))
  for t, (task, own) in enumerate(zip(tasks, hashes, strict=True)):
    if company[t]:
      made_of = ''.join(hashes[i] for i in (t, *company[t]))
      own = hashlib.sha256(made_of.encode()).hexdigest()
    pixels = jnp.asarray(task.dev.images[:images]).astype(jnp.float32) / 255
    made_of = f'{task.name}-{own[:16]}-{base_hash[:16]}'
    path = folder / f'{made_of}-{len(pixels)}-{seed}.npz'
    if not path.exists():
      params = audit.in_company(base, experts, t, company[t])
      key = jax.random.fold_in(jax.random.key(seed), int(own[:8], 16))
      found = inverter.search(
        key, params, t, pixels, len(task.label_names), base=base
      )
      seeds = inverter.invert(
        key,
        audit.weakened(base, params, SHARE),
        t,
        pixels,
        [found.classes[0]] * len(AREAS),
        [area * scale for area in AREAS],
        base=base,
      )
      grey = jnp.full((1, *image_shape), 0.5)
      first = jax.tree.map(lambda x: jnp.asarray(x[0]), found.patches)
      with checkpoint.replacing(path) as temporary, temporary.open('wb') as f:
        np.savez(
          f,
          suspicion=found.suspicion,
          target=found.classes[0],
          success=found.success[0],
          picture=audit.apply_patch(first, grey)[0],
          mask_logits=seeds.patches.mask_logits,
          pattern_logits=seeds.patches.pattern_logits,
        )
    with np.load(path, allow_pickle=False) as file:
      held = dict(file)
    seeds = SoftPatch(held.pop('mask_logits'), held.pop('pattern_logits'))
    values = {k: x.item() if not x.ndim else x for k, x in held.items()}
    out.append(Suspect(seeds=seeds, company=company[t], **values))
    advance(1)
  return out


def seeds(suspects: Sequence[Suspect]) -> Seeds:
  """Returns the triggers of all experts, leaves `[S, T, H, W, ...]`."""
  patches = jax.tree.map(
    lambda *x: jnp.stack(x, axis=1), *[suspect.seeds for suspect in suspects]
  )
  classes = jnp.array([suspect.target for suspect in suspects], jnp.int32)
  return Seeds(patches, jnp.broadcast_to(classes, patches[0].shape[:2]))
