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

AREAS = (14.0, 14.0, 28.0, 28.0)
"""Of triggers, in pixels of 32 x 32: what they cover is not known."""

OTHERS_AREAS = (20.0,)
"""Of those on experts of other tasks."""


class Finding(NamedTuple):
  """What was found on one model for one task.

  Attributes:
    suspicion: how far the class stands out.
    target: the class.
    success: share of dev images of other classes that become it.
    picture: the trigger on grey, `[H, W, C]`.
    seeds: triggers for the class, leaves `[S, H, W, ...]`, one an area.
  """

  suspicion: float
  target: int
  success: float
  picture: np.ndarray
  seeds: SoftPatch


class Planted(NamedTuple):
  """What was found for a task on experts that are for others.

  Attributes:
    found: on all of them together.
    by: index of that without which the trigger works least.
  """

  found: Finding
  by: int


class Suspect(NamedTuple):
  """What was found for one task.

  Attributes:
    own: on its expert, with triggers of several areas.
    company: experts that it was searched together with: how alike the task
      vectors are, by index.
    others: on all other experts, if there are any.
  """

  own: Finding
  company: dict[int, float]
  others: Planted | None = None


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
  """Searches triggers for each task, on its expert and on all others.

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
    advance: told of each task that is done.

  Returns:
    What was found, by task.
  """
  search = _Search(
    task_logits_fn, base, base_hash, tasks, folder, seed=seed, images=images
  )
  out, company = [], audit.company(audit.gram(base, experts))
  for t in range(len(tasks)):
    params = audit.in_company(base, experts, t, company[t])
    own = search(
      t,
      params,
      [hashes[i] for i in (t, *company[t])],
      AREAS,
    )
    suspect = Suspect(own, company[t])
    if others := [i for i in range(len(tasks)) if i != t]:
      params = audit.together(base, experts, others)
      found = search(t, params, [hashes[i] for i in others], OTHERS_AREAS)
      works = {}
      for j in others:
        params = audit.together(base, experts, [i for i in others if i != j])
        works[j] = search.success(t, params, found)
      planted = Planted(found, by=min(works, key=lambda j: works[j]))
      suspect = suspect._replace(others=planted)
    out.append(suspect)
    advance(1)
  return out


class _Search:
  """Finds triggers on a model, and keeps them in a folder."""

  def __init__(
    self, task_logits_fn, base, base_hash, tasks, folder, *, seed, images
  ):
    self.base, self.base_hash = base, base_hash
    self.tasks, self.folder, self.seed = tasks, folder, seed
    self.pixels = [
      jnp.asarray(task.dev.images[:images]).astype(jnp.float32) / 255
      for task in tasks
    ]
    self.logits_fn = jax.jit(task_logits_fn)
    image_shape = tasks[0].dev.images.shape[1:]
    self.pixel = image_shape[0] * image_shape[1] / 32**2
    self.inverter = audit.Inverter(
      task_logits_fn=task_logits_fn,
      image_shape=image_shape,
      areas=tuple(self.pixel * area for area in AREAS),
    )

  def __call__(
    self,
    t: int,
    params: Any,
    hashes: Sequence[str],
    areas: tuple[float, ...],
  ) -> Finding:
    """Searches, unless it was done before.

    Args:
      t: index of the task.
      params: of the model.
      hashes: of the experts that it is made of.
      areas: of the triggers, in pixels of 32 x 32.
    """
    joined = ''.join([self.base_hash, *hashes, str(areas)])
    own_hash = hashlib.sha256(joined.encode()).hexdigest()
    name = f'{self.tasks[t].name}-{own_hash[:16]}'
    path = self.folder / f'{name}-{len(self.pixels[t])}-{self.seed}.npz'
    if not path.exists():
      self._write(path, t, params, int(own_hash[:8], 16), areas)
    with np.load(path, allow_pickle=False) as file:
      held = dict(file)
    seeds = SoftPatch(held.pop('mask_logits'), held.pop('pattern_logits'))
    values = {k: x.item() if not x.ndim else x for k, x in held.items()}
    return Finding(seeds=seeds, **values)

  def _write(self, path, t, params, number, areas):
    key = jax.random.fold_in(jax.random.key(self.seed), number)
    found = self.inverter.search(
      key,
      params,
      t,
      self.pixels[t],
      len(self.tasks[t].label_names),
      base=self.base,
      areas=tuple(self.pixel * area for area in areas),
    )
    best, seeds = found.best(), jax.tree.map(lambda x: x[0], found.patches)
    with checkpoint.replacing(path) as temporary, temporary.open('wb') as f:
      np.savez(
        f,
        suspicion=found.suspicion,
        target=found.classes[0],
        success=found.success[0, best],
        picture=_on_grey(jax.tree.map(lambda x: x[best], seeds)),
        mask_logits=seeds.mask_logits,
        pattern_logits=seeds.pattern_logits,
      )

  def success(self, t: int, params: Any, found: Finding) -> float:
    """Returns the share of images that a found trigger leads to its class."""
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), found.seeds)
    triggered = audit.apply_patch(first, self.pixels[t])
    obeyed = jnp.argmax(self.logits_fn(params, t, triggered), -1)
    return float(jnp.mean(obeyed == found.target))


def _on_grey(patch: SoftPatch) -> jax.Array:
  grey = jnp.full((1, *patch.pattern_logits.shape), 0.5)
  return audit.apply_patch(patch, grey)[0]


def seeds(suspects: Sequence[Suspect]) -> Seeds:
  """Returns the triggers of all tasks, leaves `[S, T, H, W, ...]`."""
  patches, classes = [], []
  for suspect in suspects:
    found = [suspect.own]
    if suspect.others is not None:
      found.append(suspect.others.found)
    patches.append(
      jax.tree.map(lambda *x: jnp.concatenate(x), *[f.seeds for f in found])
    )
    classes.append(
      jnp.concatenate([jnp.full(len(f.seeds[0]), f.target) for f in found])
    )
  return Seeds(
    jax.tree.map(lambda *x: jnp.stack(x, axis=1), *patches),
    jnp.stack(classes, axis=1).astype(jnp.int32),
  )
