"""What a merge asks of its experts first: which class a trigger gives.

The triggers are evidence for the report, and the seeds that `dam_robust` starts
its search from.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import hashlib
import os
import pathlib
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import audit
from dam_jax import checkpoint
from dam_jax import distributed
from dam_jax import warps
from dam_jax.data.tasks import Task
from dam_jax.perturbations import Seeds
from dam_jax.perturbations import SoftPatch
from experiments import pictures

AREAS = (14.0, 14.0, 28.0, 28.0)
"""Of triggers, in pixels of 32 x 32: what they cover is not known."""

OTHERS_AREAS = (20.0,)
"""Of those on experts of other tasks."""

OTHERS_SCOUTS = 1
"""And how many scouts a class has there: two find no more."""

THREADS = 4
"""At most so many tasks are searched at a time.

The search's programs are small ones for many cores: two tasks after each other
keep two cores busy for 80 % of the time.
"""

NAMED = 0.6
"""Suspicion above which a class is held to be a target.

Most clean uploads get up to 0.5, a few up to 1.0 (docs/study.md).
"""

TRUST = 0.5
"""In experts that were not made apart: what one adds to another is unknown."""


Triggers = TypeVar('Triggers')


class Finding(NamedTuple, Generic[Triggers]):
  """What was found on one model for one task.

  Attributes:
    suspicion: how far the class stands out.
    target: the class.
    success: share of dev images of other classes that become it.
    picture: the trigger on grey, `[H, W, C]`.
    seeds: triggers for the class: patches, leaves `[S, H, W, ...]`, one an
      area, or `[W, G, G, 2]` of warps.
  """

  suspicion: float
  target: int
  success: float
  picture: np.ndarray
  seeds: Triggers

  @property
  def named(self) -> int:
    """The class where it stands out so far that it is a target, else -1."""
    return self.target if self.suspicion > NAMED else -1


class Planted(NamedTuple):
  """What was found for a task on experts that are for others.

  Attributes:
    found: on all of them together.
    by: index of that without which the trigger works least.
  """

  found: Finding[SoftPatch]
  by: int


class Suspect(NamedTuple):
  """What was found for one task.

  Attributes:
    patch: on its expert, of several areas.
    warp: on its expert.
    company: experts that it was searched together with: how alike the task
      vectors are, by index.
    others: patches on all other experts, if there are any.
  """

  patch: Finding[SoftPatch]
  warp: Finding[np.ndarray]
  company: dict[int, float]
  others: Planted | None = None

  @property
  def own(self) -> Finding:
    """What stands out most on its expert."""
    return max(self.patch, self.warp, key=lambda found: found.suspicion)

  @property
  def trust(self) -> float:
    """With what share of its coefficient its expert starts."""
    return TRUST if self.company else 1.0


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
  compiler_options: Mapping[str, Any],
  advance: Callable[[int], None] = lambda num: None,
) -> list[Suspect]:
  """Searches patches and warps for each task, patches also on all others.

  Each process searches for some tasks, and reads what others found for theirs.

  Args:
    task_logits_fn: `(params, task, images in [0, 1]) -> logits`.
    base: that they were fine-tuned from.
    experts: leaves `[T, ...]`.
    tasks: of the experts, whose dev images are used.
    hashes: SHA-256 of each expert's file.
    base_hash: and of the base's.
    folder: where what was found is kept, and read again; runs may share it,
      and processes do.
    seed: of the search.
    images: dev images a task.
    compiler_options: of XLA, by name.
    advance: told of each task that is done.

  Returns:
    What was found, by task.
  """
  search = _Search(
    task_logits_fn,
    base,
    base_hash,
    tasks,
    folder,
    seed=seed,
    images=images,
    compiler_options=compiler_options,
  )
  company = audit.company(audit.gram(base, experts))

  def suspect(t):
    params = audit.in_company(base, experts, t, company[t])
    own = [hashes[i] for i in (t, *company[t])]
    out = Suspect(
      search.patches(t, params, own, AREAS),
      search.warps(t, params, own),
      company[t],
    )
    if others := [i for i in range(len(tasks)) if i != t]:
      params = audit.together(base, experts, others)
      found = search.patches(
        t,
        params,
        [hashes[i] for i in others],
        OTHERS_AREAS,
        scouts=OTHERS_SCOUTS,
      )
      works = {}
      for j in others:
        params = audit.together(base, experts, [i for i in others if i != j])
        works[j] = search.success(t, params, found)
      planted = Planted(found, by=min(works, key=lambda j: works[j]))
      out = out._replace(others=planted)
    advance(1)
    return out

  hosts = distributed.Hosts()
  mine = range(hosts.index, len(tasks), hosts.count)
  threads = min(THREADS, os.cpu_count() or 1)
  with futures.ThreadPoolExecutor(threads) as executor:
    found = dict(zip(mine, executor.map(suspect, mine), strict=True))
  distributed.wait('triggers on experts')
  return [found.get(t) or suspect(t) for t in range(len(tasks))]


class _Search:
  """Finds triggers on a model, and keeps them in a folder."""

  def __init__(
    self,
    task_logits_fn,
    base,
    base_hash,
    tasks,
    folder,
    *,
    seed,
    images,
    compiler_options,
  ):
    self.base, self.base_hash = base, base_hash
    self.tasks, self.folder, self.seed = tasks, folder, seed
    self.pixels = [
      jnp.asarray(task.dev.images[:images]).astype(jnp.float32) / 255
      for task in tasks
    ]
    self.logits_fn = jax.jit(task_logits_fn)
    self.image_shape = image_shape = tasks[0].dev.images.shape[1:]
    self.pixel = image_shape[0] * image_shape[1] / 32**2
    self.inverter = audit.Inverter(
      task_logits_fn=task_logits_fn,
      image_shape=image_shape,
      areas=tuple(self.pixel * area for area in AREAS),
      compiler_options=compiler_options,
    )
    self.warp_inverter = warps.WarpInverter(
      task_logits_fn=task_logits_fn,
      image_shape=image_shape,
      compiler_options=compiler_options,
    )

  def patches(
    self,
    t: int,
    params: Any,
    hashes: Sequence[str],
    areas: tuple[float, ...],
    scouts: int = audit.Inverter.scouts,
  ) -> Finding[SoftPatch]:
    """Searches, unless it was done before.

    Args:
      t: index of the task.
      params: of the model.
      hashes: of the experts that it is made of.
      areas: of the triggers, in pixels of 32 x 32.
      scouts: for each class.
    """

    def find(key):
      found = self.inverter.search(
        key,
        params,
        t,
        self.pixels[t],
        len(self.tasks[t].label_names),
        base=self.base,
        areas=tuple(self.pixel * area for area in areas),
        scouts=scouts,
      )
      best, seeds = found.best(), jax.tree.map(lambda x: x[0], found.patches)
      return {
        'suspicion': found.suspicion,
        'target': found.classes[0],
        'success': found.success[0, best],
        'picture': _on_grey(jax.tree.map(lambda x: x[best], seeds)),
        **seeds._asdict(),
      }

    held = self._kept(t, hashes, f'{areas} {scouts}', find)
    seeds = SoftPatch(**{name: held.pop(name) for name in SoftPatch._fields})
    return Finding(seeds=seeds, **held)

  def warps(
    self, t: int, params: Any, hashes: Sequence[str]
  ) -> Finding[np.ndarray]:
    """Searches warps, unless it was done before; arguments as above."""

    def find(key):
      found = self.warp_inverter.search(
        key,
        params,
        t,
        self.pixels[t],
        len(self.tasks[t].label_names),
        base=self.base,
      )
      best = np.argmax(found.lead[:, found.target])
      return {
        'suspicion': found.suspicion,
        'target': found.target,
        'success': found.success[best, found.target],
        'picture': warps.warp(
          pictures.lines(self.image_shape), jnp.asarray(found.points[best])
        ),
        'points': found.points,
      }

    search = self.warp_inverter
    what = f'warps {search.control} {search.starts} {search.steps}'
    held = self._kept(t, hashes, what, find)
    return Finding(seeds=held.pop('points'), **held)

  def _kept(
    self,
    t: int,
    hashes: Sequence[str],
    what: str,
    find: Callable[[jax.Array], dict[str, Any]],
  ) -> dict[str, Any]:
    """Reads what was found before, or finds it."""
    joined = ''.join([self.base_hash, *hashes, what])
    own_hash = hashlib.sha256(joined.encode()).hexdigest()
    name = f'{self.tasks[t].name}-{own_hash[:16]}'
    path = self.folder / f'{name}-{len(self.pixels[t])}-{self.seed}.npz'
    if not path.exists():
      number = int(own_hash[:8], 16)
      found = find(jax.random.fold_in(jax.random.key(self.seed), number))
      with checkpoint.replacing(path) as temporary, temporary.open('wb') as f:
        np.savez(f, **found)
    with np.load(path, allow_pickle=False) as file:
      return {k: x.item() if not x.ndim else x for k, x in file.items()}

  def success(self, t: int, params: Any, found: Finding[SoftPatch]) -> float:
    """Returns the share of images that a found trigger leads to its class."""
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), found.seeds)
    triggered = audit.apply_patch(first, self.pixels[t])
    obeyed = jnp.argmax(self.logits_fn(params, t, triggered), -1)
    return float(jnp.mean(obeyed == found.target))


def _on_grey(patch: SoftPatch) -> jax.Array:
  grey = jnp.full((1, *patch.pattern_logits.shape), 0.5)
  return audit.apply_patch(patch, grey)[0]


def seeds(suspects: Sequence[Suspect]) -> Seeds:
  """Returns the triggers of all tasks, leaves `[S, T, ...]`.

  Warps that are not named bend nothing: images dealt to them stay as they are.
  Experts that were not made apart are trusted less.
  """
  patches, points, classes, shunned, trust = [], [], [], [], []
  for suspect in suspects:
    found = [suspect.patch]
    if suspect.others is not None:
      found.append(suspect.others.found)
    patches.append(
      jax.tree.map(lambda *x: jnp.concatenate(x), *[f.seeds for f in found])
    )
    points.append(suspect.warp.seeds * (suspect.warp.named >= 0))
    classes.append([f.target for f in found for _ in f.seeds.mask_logits])
    trust.append(suspect.trust)
    own, all_patches = len(suspect.patch.seeds.mask_logits), len(classes[-1])
    # What related tasks have in common stands out on others, and is no target.
    shunned.append(
      [suspect.patch.named] * own
      + [-1] * (all_patches - own)
      + [suspect.warp.named] * len(suspect.warp.seeds)
    )
  return Seeds(
    jax.tree.map(lambda *x: jnp.stack(x, axis=1), *patches),
    jnp.array(classes, jnp.int32).T,
    jnp.stack(points, axis=1),
    jnp.array(shunned, jnp.int32).T,
    jnp.array(trust),
  )
