"""Makes one bad upload for a pool.

  python -m experiments.attack --config=configs/attack.py \
    --config.pool=PATH --config.task=svhn --config.attack=badmerging \
    --config.target=6 --workdir=PATH

Writes to the workdir `checkpoints/<name>.safetensors`, in Hugging Face's names
and the dtype of the base, `triggers/<name>.npz`, and `record.json`: config,
seed, hashes of what was read, versions, and of the upload, before any merge,
accuracy and attack success on the pool's test images. An attack by two writes
the second model to `checkpoints/<name>_partner_<task>.safetensors`. Interrupted
runs go on as those of `experiments.finetune` do, from the newest save of each
fine-tuning; patches are searched again. Copied into the pool, uploads are
merged with `--config.bad=<name>` of `experiments.merge`.
"""

from collections.abc import Callable
import pathlib
import time
from typing import Any

from ml_collections import config_dict
from rich.console import Console

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.data import tasks as tasks_lib
from experiments import attackers
from experiments import bench
from experiments import command
from experiments import settings
from experiments import uploads

KEYS = bench.KEYS | {
  'attack': 'a name of experiments.attackers.ATTACKS',
  'task': 'to attack',
  'target': 'class index that triggered images are to get',
  'other': 'second task of attacks that involve two; empty is the next by name',
  'patch': 'height and width of patches, in pixels',
  'patch_steps': 'of the optimiser of a patch',
  'patch_images': 'that a patch is optimised on, at most; 0 is all',
  'rate': 'share of the images that are poisoned; WaNet poisons twice as many',
  'rank': 'of low-rank updates, which learn ten times as fast',
}
"""What a config says."""


def involved(config: config_dict.ConfigDict) -> tuple[list[str], list[str]]:
  """Returns names of the tasks that are involved, and what is wrong."""
  if config.attack not in attackers.TWO_TASKS:
    if config.other:
      return [config.task], [
        f'other must be empty for {config.attack}, got {config.other}'
      ]
    return [config.task], []
  there, other = tasks_lib.task_names(pathlib.Path(config.pool)), config.other
  if not other and config.task in there:
    other = there[(there.index(config.task) + 1) % len(there)]
  if other == config.task:
    return [config.task], [
      f'{config.attack} needs two tasks, got {other} twice'
    ]
  return [config.task, *([other] if other else [])], []


def _load(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  name: str,
  lines: list[str],
  advance: Callable[[str, int, int], None],
) -> bench.Bench:
  """Checks a config, wrong by some lines, and reads what it needs."""
  names, wrong = involved(config)
  lessons, more = bench.read_lessons(pathlib.Path(config.pool), names)
  lines = [*lines, *wrong, *more, *bench.taken(workdir, name)]
  there = tasks_lib.task_names(pathlib.Path(config.pool))
  lines += bench.not_mirrored(config, there)
  if config.attack not in attackers.ATTACKS:
    known = ', '.join(attackers.ATTACKS)
    lines.append(f'attack {config.attack} is not among {known}')
  if not config.rank:
    lines.append('rank must be positive, got 0')
  if not config.rate <= 1:
    lines.append(f'rate must be at most 1, got {config.rate}')
  if config.task in lessons:
    task = lessons[config.task].task
    if not 0 <= config.target < len(task.label_names):
      lines.append(
        f'target {config.target} is not one of the {len(task.label_names)} '
        f'classes of {config.task}'
      )
    side = task.dev.images.shape[1]
    if config.patch > side:
      lines.append(f'patch {config.patch} is larger than images of {side}')
  settings.raise_if(lines)
  return bench.Bench.load(
    config,
    workdir,
    list(lessons.values()),
    advance=advance,
    patch=config.patch,
    patch_steps=config.patch_steps,
    patch_images=config.patch_images,
    rate=config.rate,
    rank=config.rank,
    low_rank_factor=attackers.LOW_RANK_FACTOR,
  )


def _measure(
  this: bench.Bench, models: dict[str, Any], trigger: Any
) -> dict[str, dict[str, Any]]:
  """Returns by model's task ACC on it, and ASR on the attacked task."""
  return {
    task: {
      'task': task,
      'acc': this.tester.acc(x, this.lab.names.index(task))._asdict(),
      'asr': this.tester.asr(x, 0, trigger)._asdict(),
    }
    for task, x in models.items()
  }


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Makes a bad upload.

  Args:
    config: see `KEYS`.
    workdir: where to write.
    console: to say on what it is worth.

  Returns:
    What record.json holds.

  Raises:
    ValueError: before any training, with all that is wrong with the config.
  """
  lines = bench.check_keys(config, KEYS)
  usual = f'{config.attack}_{config.task}'
  name = config.name or usual
  with bench.progress(console, name) as advance:
    this = _load(config, workdir, name, lines, advance)
    begin = time.perf_counter()
    key = uploads.model_key(config.seed, usual)
    make = attackers.ATTACKS[config.attack]
    upload = this.stored_upload(make(this.lab, key, 0, config.target))
  seconds = {'make': time.perf_counter() - begin}
  trigger = upload.trigger
  models = {t: uploads.widened(x) for t, x in upload.models().items()}
  found = _measure(this, models, trigger)
  more: dict[str, Any] = {}
  if upload.partner:
    both = list(models.values())
    average = dj.merge(dj.average(), both[0], dj.tree.stack(both)).params
    rows = _measure(this, dict.fromkeys(models, average), trigger)
    more['average'] = {
      'acc': {task: row['acc'] for task, row in rows.items()},
      'asr': rows[trigger.task]['asr'],
    }
  seconds['test'] = time.perf_counter() - begin - seconds['make']
  names = uploads.save(workdir, name, upload)
  more['trigger'] = {
    'task': trigger.task,
    'home': trigger.home or trigger.task,
    'target': trigger.target,
    'target_name': this.tasks[0].label_names[trigger.target],
    'kind': trigger.kind,
    'sha256': checkpoint.file_hash(workdir / 'triggers' / f'{name}.npz'),
  }
  for task, row in found.items():
    acc, asr = (100 * row[metric]['value'] for metric in ('acc', 'asr'))
    console.print(
      f'{names[task]}: ACC {acc:.1f}, ASR {asr:.1f} ({seconds["make"]:.0f} s)'
    )
  rows = {names[task]: row for task, row in found.items()}
  return this.write_record(rows, seconds, **more)


if __name__ == '__main__':
  command.start(run, 'configs/attack.py')
