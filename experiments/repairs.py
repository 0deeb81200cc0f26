"""Defences that repair the plain merge, as merges that experiments know.

Each reads what its type says and no more (`dam_jax.defences`): labelled images
are the dev images with their labels, as many a task as the smallest task has.
"""

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dam_jax as dj
from dam_jax import defences
from dam_jax.meta_spec import Shared
from dam_jax.models import clip
from experiments import load

MERGERS: dict[str, Callable[..., dj.Merger]] = {
  'repo_awm': defences.repo_awm,
  'repo_sau': functools.partial(defences.repo_awm, shared=Shared()),
}
"""Builders of repairs that learn a mask over the plain merge, by name."""

BUILDERS: dict[str, Callable[..., Any]] = {
  'anp': defences.anp,
  'awm': defences.awm,
  'fine_pruning': defences.fine_pruning,
  'clp': defences.clp,
  'sau': defences.sau,
  'i_bau': defences.i_bau,
  'ibvs': defences.ibvs,
  'tbar': defences.tbar,
  'lfpm': defences.lfpm,
  'wag': defences.wag,
  **MERGERS,
}
"""Builders of `Defence`s, and of mergers over the plain merge, by name."""

_WORDS = {
  defences.NoData: 'none',
  defences.Unlabelled: 'unlabelled',
  defences.Labelled: 'labelled clean',
}


def reads(name: str) -> str:
  """Says what data a defence looks at.

  Args:
    name: of `BUILDERS`.

  Returns:
    'none', 'unlabelled' or 'labelled clean'.
  """
  if name in MERGERS:
    return 'unlabelled'
  # What a forward pass gives is not asked for before there is data.
  more = [None] * (name == 'fine_pruning')
  return _WORDS[BUILDERS[name](*more).reads]


def takes_batch(name: str) -> bool:
  """Whether a method draws batches, which only some repairs do not.

  Args:
    name: of any method that is not a merge of task vectors alone.
  """
  if name not in BUILDERS or name in MERGERS:
    return True
  return 'batch' in inspect.signature(BUILDERS[name]).parameters


def within(
  chosen: Mapping[str, Any], steps: int, images: int
) -> dict[str, int]:
  """Returns the options that keep a repair within a number of steps.

  Args:
    chosen: its options.
    steps: of each of its loops over the weights or masks, at most; a round is
      never cut.
    images: that it reads, a task.

  Returns:
    Its 'steps' or 'rounds', where it has them.
  """
  if 'rounds' in chosen:
    a_round = -(-images // chosen['batch']) * chosen.get('epochs', 1)
    return {'rounds': max(1, min(chosen['rounds'], steps // max(1, a_round)))}
  return {'steps': min(chosen['steps'], steps)} if 'steps' in chosen else {}


def build(
  name: str, setup: load.Setup, options: Mapping[str, Any]
) -> defences.Defence:
  """Makes a defence.

  Args:
    name: of `BUILDERS`, but not of a merger.
    setup: what the merges share.
    options: from `experiments.methods.resolve`.

  Returns:
    The defence.

  Raises:
    ValueError: where an option's value makes no sense.
  """
  if name == 'fine_pruning':
    return defences.fine_pruning(
      setup.inputs_fn, preprocess_fn=clip.normalize, **options
    )
  return BUILDERS[name](**options)


def data(setup: load.Setup, kind: type) -> defences.Data:
  """Returns what a defence of a type is given, and nothing else.

  Args:
    setup: what the merges share.
    kind: the type of its data.
  """
  if kind is defences.NoData:
    return defences.NoData()
  splits = [task.dev for task in setup.pool.tasks]
  num = min(len(split.images) for split in splits)
  images = jnp.stack(
    [jnp.asarray(s.images[:num], jnp.float32) / 255 for s in splits]
  )
  if kind is defences.Unlabelled:
    return defences.Unlabelled(images)
  labels = jnp.stack([jnp.asarray(s.labels[:num]) for s in splits])
  return defences.Labelled(images, labels)


def merger(
  name: str,
  setup: load.Setup,
  options: Mapping[str, Any],
  plain: optax.GradientTransformation,
) -> dj.Merger:
  """Makes a merge of a repair: the plain merge, repaired.

  Args:
    name: of `BUILDERS`.
    setup: what the merges share.
    options: from `experiments.methods.resolve`.
    plain: the merge to repair.

  Returns:
    A merger over the experts.

  Raises:
    ValueError: where an option's value makes no sense.
  """
  if name in MERGERS:
    return _over_plain(_masked(name, setup, options), plain)
  defence = build(name, setup, options)

  def apply_fn(params, images):
    return setup.logits_fn(params, clip.normalize(images))

  def finalize(state, base, experts):
    del state
    params = experts
    if not defence.experts:
      params = dj.merge(plain, base, experts).params
    return defence(params, apply_fn, data(setup, defence.reads))

  nothing = dj.from_transform(plain)
  return nothing._replace(finalize=finalize)


def _masked(name, setup, options) -> dj.Merger:
  chosen = {key: x for key, x in options.items() if key != 'batch'}
  usual = inspect.signature(MERGERS[name]).parameters['mask'].default
  chosen['mask'] = dj.masks.Mask(**vars(usual) | chosen['mask'])
  return MERGERS[name](
    setup.logits_fn,
    image_shape=setup.image_shape,
    num_tasks=len(setup.tasks),
    preprocess_fn=clip.normalize,
    **chosen,
  )


def _over_plain(
  inner: dj.Merger, plain: optax.GradientTransformation
) -> dj.Merger:
  """Gives a merger the plain merge as its only expert."""

  def only(base, experts):
    merged = dj.merge(plain, base, experts).params
    return jax.tree.map(lambda x: x[None], merged)

  return inner._replace(
    init=lambda key, base, experts: inner.init(key, base, only(base, experts)),
    step=lambda state, base, experts, batch: inner.step(
      state, base, only(base, experts), batch
    ),
    finalize=lambda state, base, experts: inner.finalize(
      state, base, only(base, experts)
    ),
  )
