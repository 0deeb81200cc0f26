"""Makes a pool's base and tasks of a CLIP and data sets.

  python -m experiments.prepare --config=configs/prepare.py --workdir=PATH

Prepares each set that is not (`dam_jax.data.prepared`), reads the CLIP
(`dam_jax.models.hub`), makes heads of the sets' class names and templates with
its text tower, and holds out dev images. The workdir becomes a pool without
experts, for `experiments.finetune`, `.attack`, `.merge` and `.evaluate`:

  checkpoints/  config.json and base.safetensors, CLIP's image tower
  tasks/        <set>.npz with dev, test and training images and the head;
                <set>.json, written last, with how many there are and which of
                the set's images occur twice
  heads/        heads by what they were made of
  prepare.json  config, the CLIP's commit, hash of its weights, versions

A set that is done is not done again. Sets that cannot be prepared are an error
that lists all of them and what each wants, after those that can be are there.

Images lie in tasks at the tower's size, uint8, as CLIP's processor resizes and
crops them. Triggers are pixels of what the tower reads, so they need that size;
and all that reads tasks keeps them in memory. At 224 pixels an image takes 0.15
MB, which for all images of six sets, CIFAR-100's 60,000 among them, would be
some 40 GB. So `train`, `dev` and `test` limit how many a task has: 10,000, 500
and 2,000 by default, 1.9 GB a task while it is read, and a file of less.
Accuracy on 2,000 images has an interval of about 2 points on each side. Who
reports on all test images sets `--config.test=0`.
"""

import dataclasses
import inspect
import json
import pathlib
from typing import Any

from ml_collections import config_dict
import numpy as np
from rich.console import Console

from dam_jax import checkpoint
from dam_jax.data import builtin
from dam_jax.data import holdout
from dam_jax.data import prepared
from dam_jax.data import sets
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import hub
from dam_jax.models import text
from dam_jax.models import zero_shot
from experiments import command
from experiments import settings
from experiments import tiny_clip
from experiments import uploads

KEYS = {
  'data_dir': "of prepared data sets; empty is the workdir's 'source/data'",
  'sets': 'names of dam_jax.data.sets with commas',
  'clip': 'repository or folder of a whole CLIP; empty makes a tiny one, and '
  'built-in sets arrays/<name>, as experiments.tiny_clip does',
  'revision': 'branch, tag or commit of the repository; empty is main',
  'make': 'options of experiments.tiny_clip.make',
  'train': 'training images a task, at most; 0 is all',
  'dev': 'images a task that merges may look at, held out of those to train on',
  'test': 'test images a task, at most; 0 is all',
  'seed': 'of the choice of images',
}
"""What a config says."""

OPEN = ('data_dir',)
"""Keys that no file depends on."""

_DONE = 'prepare.json'


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises with all that is wrong with a config."""
  lines = settings.wrong_keys(config, KEYS)
  if not lines:
    names = settings.split(config.sets)
    lines += [] if names else ['sets is empty']
    twice = sorted({x for x in names if names.count(x) > 1})
    lines += [f'set {x} comes twice' for x in twice]
    for name in names:
      try:
        about = sets.get(name)
      except ValueError as e:
        lines.append(str(e))
        continue
      if not config.clip and (
        not name.startswith(f'{sets.ARRAYS}/')
        or about.name not in builtin.NAMES
      ):
        lines.append(
          f'set {name} is not built in, and clip is empty: want '
          + ', '.join(f'{sets.ARRAYS}/{x}' for x in builtin.NAMES)
        )
    options = list(inspect.signature(tiny_clip.make).parameters)[3:]
    lines += [
      f'make.{key}: no such key, allowed are {", ".join(options)}'
      for key in config.make
      if key not in options
    ]
    lines += [
      f'{key} must not be negative, got {config[key]}'
      for key in ('train', 'test', 'seed')
      if config[key] < 0
    ]
    if config.dev < 1:
      lines.append(f'dev must be positive, got {config.dev}')
  settings.raise_if(lines)


def task_names(config: config_dict.ConfigDict) -> list[str]:
  """Returns the names of the tasks that a config's sets become."""
  return [sets.get(name).name for name in settings.split(config.sets)]


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Makes a base and tasks.

  Args:
    config: see `KEYS`.
    workdir: that becomes a pool without experts.
    console: to say on what was found.

  Returns:
    By task, what <set>.json holds.

  Raises:
    ValueError: where the config makes no sense, a set or the CLIP cannot be
      had, or the workdir holds another pool.
  """
  check_config(config)
  source, given = workdir / 'source', config.clip
  if not given:
    tiny_clip.make(
      source, task_names(config), console=console, **config.make.to_dict()
    )
    given = source / 'clip'
  data_dir = pathlib.Path(config.data_dir or source / 'data')
  _prepare_sets(settings.split(config.sets), data_dir, console)
  model = hub.load(given, revision=config.revision or None)
  if abs(model.scale - tiny_clip.SCALE) > 1:
    raise ValueError(
      f'{given} scales cosines by {model.scale:.1f}: a pool has no place for '
      f'it, and what reads pools takes {tiny_clip.SCALE:.0f}'
    )
  _claim(config, workdir, model)
  out = {}
  for name in settings.split(config.sets):
    about = sets.get(name)
    record = workdir / 'tasks' / f'{about.name}.json'
    if not record.exists():
      with console.status(f'reading {name}'):
        found = prepared.open_set(name, data_dir)
        _write_task(config, workdir, found, model)
    out[about.name] = json.loads(record.read_text())
    counts = ', '.join(f'{key} {n}' for key, n in out[about.name].items())
    console.print(f'{name}: {counts}', highlight=False)
  return out


def _prepare_sets(
  names: list[str], data_dir: pathlib.Path, console: Console
) -> None:
  lines = []
  for name in names:
    if prepared.is_prepared(name, data_dir):
      continue
    if name not in sets.SETS:
      about = sets.get(name)
      lines.append(f'{name} wants: {prepared.how_to(about, data_dir)}')
      continue
    try:
      with console.status(f'preparing {name}'):
        prepared.prepare(name, data_dir)
    except ValueError as e:
      lines.append(str(e))
  if lines:
    raise ValueError('\n  '.join(['data sets are missing:', *lines]))


def _claim(
  config: config_dict.ConfigDict, workdir: pathlib.Path, model: hub.Pretrained
) -> None:
  """Writes the base, and what the pool is made of unless it is another."""
  params: Any = model.params
  kept = {k: x for k, x in config.to_dict().items() if k not in OPEN}
  made = {
    'config': json.loads(json.dumps(kept)),
    'clip': {
      'repo': model.files and model.files.repo,
      'commit': model.files and model.files.commit,
      'weights': zero_shot.digest(params),
    },
  }
  path = workdir / _DONE
  if path.exists():
    there = json.loads(path.read_text())
    if {key: there[key] for key in made} != made:
      raise ValueError(
        f'{path} differs from the config, or the CLIP is another now: take '
        'another workdir'
      )
  if not uploads.path(workdir, 'base').exists():
    uploads.save_model(workdir, 'base', params['vision'])
  sizes = json.dumps(dataclasses.asdict(model.config.vision), indent=2)
  checkpoint.write(workdir / 'checkpoints' / 'config.json', sizes)
  made['versions'] = checkpoint.versions()
  checkpoint.write(path, json.dumps(made, indent=2))


def _write_task(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  found: prepared.Prepared,
  model: hub.Pretrained,
) -> None:
  params: Any = model.params
  size = model.config.vision.image_size
  head = zero_shot.zero_shot_head(
    text.TextTower(model.config.text),
    params['text'],
    tokenizer=model.tokenizer(),
    names=found.label_names,
    templates=found.about.templates,
    cache=workdir / 'heads',
  )
  task, held = holdout.to_task(
    found,
    head,
    size=size,
    dev=config.dev,
    test=min(config.test, len(found.test)),
    seed=config.seed,
  )
  places = held.train
  if 'dev' in found.sizes:  # then nothing is held out of those to train on
    places = np.arange(len(found.train))
  rng = np.random.default_rng(config.seed)
  chosen = np.sort(rng.permutation(places)[: config.train or None])
  train = holdout.read_split(found.train, chosen, size=size)
  tasks_lib.save_task(workdir / 'tasks', task, train)
  counts = {
    'train': len(train.labels),
    'dev': len(task.dev.labels),
    'test': len(task.test.labels),
    'classes': len(task.label_names),
    'repeated': held.repeated,
    'in_test': held.in_test,
    'test_repeated': held.test_repeated,
  }
  path = workdir / 'tasks' / f'{task.name}.json'
  checkpoint.write(path, json.dumps(counts, indent=2))


if __name__ == '__main__':
  command.start(run, 'configs/prepare.py')
