"""Makes a pool of small experts on the spot, two of them backdoored.

From the built-in tasks: a base, trained on a part of all tasks; a clean expert
for each task, fine-tuned from it; one expert with a patch as its backdoor
(BadNets) and one made to survive merging (BadMerging). The folder is what
`dam_jax.data.tasks.load_pool` reads.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import dam_jax as dj
from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax.data import builtin
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import attackers
from experiments import lab as lab_lib
from experiments import training

CONFIG = clip.VisionConfig(
  hidden_size=64,
  intermediate_size=192,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=builtin.SIZE,
  patch_size=7,
  projection_dim=64,
)
"""Sizes of the tower."""

BATCH = 32
"""Images a task and step of training."""


def _fine_tune(
  shop: training.Shop,
  key: jax.Array,
  base: Any,
  splits: Sequence[tasks_lib.Split],
  tasks: Sequence[int],
  **options: Any,
) -> Any:
  """Fine-tunes the base on each split; leaves `[len(splits), ...]`."""
  data = training.on_device(splits)

  def one(row):
    def loss_fn(params, key):
      images, labels = data.draw(key, row, BATCH)
      logits = shop.task_logits(params, jnp.array(tasks)[row], images)
      return jnp.mean(dj.losses.cross_entropy(logits, labels))

    own = jax.random.fold_in(key, row)
    return training.fit(own, base, loss_fn, **options)

  return jax.jit(lambda: jax.lax.map(one, jnp.arange(len(splits))))()


def _save(
  folder: pathlib.Path,
  tasks: Sequence[tasks_lib.Task],
  models: Mapping[str, Any],
  triggers: Mapping[str, attacks.Trigger],
  options: Mapping[str, Any],
) -> None:
  checkpoints = folder / 'checkpoints'
  for name, params in models.items():
    checkpoint.save_params(
      checkpoints / f'{name}.safetensors', params, name_map=convert.clip_vision
    )
  for name, trigger in triggers.items():
    attacks.save_trigger(folder / 'triggers' / f'{name}.npz', trigger)
  for task in tasks:
    tasks_lib.save_task(folder / 'tasks', task)
  config = dataclasses.asdict(CONFIG)
  (checkpoints / 'config.json').write_text(json.dumps(config, indent=2))
  (folder / _DONE).write_text(json.dumps(dict(options), indent=2))


_DONE = 'made.json'


def _check(
  options: Mapping[str, Any], sources: Sequence[builtin.Source]
) -> None:
  """Raises with all that is wrong with what a pool is to be made of."""
  classes = {s.task.name: len(s.task.label_names) for s in sources}
  lines = []
  for attack in ('badnets', 'badmerging'):
    task, target = options[attack], options[f'{attack}_target']
    if task not in classes:
      lines.append(f'{attack} must be one of {", ".join(classes)}, got {task}')
    elif not 0 <= target < classes[task]:
      lines.append(
        f'{attack}_target {target} is not one of the {classes[task]} classes '
        f'of {task}'
      )
  if not 0 < options['patch'] <= CONFIG.image_size:
    lines.append(
      f'patch must be from 1 to the {CONFIG.image_size} pixels of an image, '
      f'got {options["patch"]}'
    )
  lines += [
    f'{name} must be positive, got {number}'
    for name, number in options.items()
    if name.endswith('_steps') and number < 1
  ]
  if lines:
    raise ValueError('\n  '.join(['a pool to make:', *lines]))


def make_pool(
  folder: pathlib.Path,
  *,
  console: Console,
  badnets: str = 'rotation',
  badnets_target: int = 2,
  badmerging: str = 'mnist',
  badmerging_target: int = 7,
  patch: int = 5,
  pretrain_steps: int = 220,
  fine_tune_steps: int = 150,
  patch_steps: int = 300,
  learning_rate: float = 2e-3,
  seed: int = 0,
) -> None:
  """Makes a pool, unless the folder already holds it.

  Args:
    folder: to write to.
    console: to say on what is being done.
    badnets: task whose expert gets a patch as its backdoor.
    badnets_target: class index.
    badmerging: task whose expert gets a backdoor that survives merging.
    badmerging_target: class index.
    patch: height and width of both triggers, in pixels.
    pretrain_steps: of the base.
    fine_tune_steps: of each expert.
    patch_steps: of the patch that the base obeys.
    learning_rate: of the base; experts get a quarter.
    seed: of everything random.

  Raises:
    ValueError: before any training, with all options that make no sense.
  """
  if (folder / _DONE).exists():
    return
  options = {
    k: v for k, v in locals().items() if k not in ('folder', 'console')
  }
  sources = [builtin.load(name, seed=seed) for name in builtin.NAMES]
  _check(options, sources)
  shop = training.Shop(
    clip.VisionTower(CONFIG),
    clip.stack_heads([s.task.head for s in sources], scale=20.0),
  )
  keys = jax.random.split(jax.random.key(seed), 4)
  with console.status('training the base'):
    base = training.pretrain(
      shop,
      keys[0],
      [s.pretrain for s in sources],
      batch=BATCH,
      steps=pretrain_steps,
      learning_rate=learning_rate,
    )
    jax.block_until_ready(base)
  tuning = {'steps': fine_tune_steps, 'learning_rate': learning_rate / 4}
  first, second = (builtin.NAMES.index(n) for n in (badnets, badmerging))
  trigger = attacks.patch_trigger(
    CONFIG.image_shape, size=patch, task=badnets, target=badnets_target
  )
  with console.status('fine-tuning the experts'):
    splits = [s.train for s in sources]
    splits.append(training.poisoned(keys[1], splits[first], trigger))
    rows = [*range(len(sources)), first]
    experts = _fine_tune(shop, keys[2], base, splits, rows, **tuning)
    jax.block_until_ready(experts)
  with console.status('making the expert that survives merging'):
    lab = lab_lib.Lab(
      shop,
      base,
      [s.train for s in sources],
      builtin.NAMES,
      lab_lib.Tuning(
        **tuning, batch=BATCH, patch=patch, patch_steps=patch_steps
      ),
    )
    survivor = attackers.badmerging(lab, keys[3], second, badmerging_target)
  *clean, poisoned = dj.tree.unstack(experts)
  models = {'base': base}
  models |= {f'clean_{n}': x for n, x in zip(builtin.NAMES, clean, strict=True)}
  bad = {
    f'badnets_{badnets}': lab_lib.Upload(poisoned, trigger),
    f'badmerging_{badmerging}': survivor,
  }
  models |= {name: upload.params for name, upload in bad.items()}
  triggers = {name: upload.trigger for name, upload in bad.items()}
  _save(folder, [s.task for s in sources], models, triggers, options)
