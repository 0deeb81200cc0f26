"""Fine-tunes a pool's base on one task: a clean expert.

  python -m experiments.finetune --config=configs/finetune.py \
    --config.pool=PATH --config.task=svhn --workdir=PATH

Writes to the workdir `checkpoints/<name>.safetensors`, in Hugging Face's names
and the dtype of the base, and `record.json`: config, seed, hashes of what was
read, versions, accuracy on the pool's test images. Loss and gradient's norm are
in `curves/`. A run that was interrupted goes on from its newest save when it is
started again with its workdir, and ends in the same model bit for bit; at
SIGTERM it saves and exits with code 75.
"""

import pathlib
import time
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console

from dam_jax import attacks
from dam_jax.data import tasks as tasks_lib
from experiments import bench
from experiments import command
from experiments import settings
from experiments import uploads

KEYS = bench.KEYS | {
  'task': 'to fine-tune on',
  'rank': 'of a low-rank update (LoRA), merged into the weights; 0 trains all',
}
"""What a config says."""


def _tune(this: bench.Bench, key: jax.Array) -> Any:
  """Returns the fine-tuned model, all of its weights."""
  if not this.config.rank:
    return this.lab.tune(key, 0)
  update = this.lab.tune_low_rank(key, 0)
  return attacks.add_factors(this.lab.base, update)


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Makes a clean expert.

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
  usual = f'clean_{config.task}'
  name = config.name or usual
  lessons, more = bench.read_lessons(pathlib.Path(config.pool), [config.task])
  lines += [*more, *bench.taken(workdir, name)]
  there = tasks_lib.task_names(pathlib.Path(config.pool))
  settings.raise_if([*lines, *bench.not_mirrored(config, there)])
  with bench.progress(console, name) as advance:
    this = bench.Bench.load(
      config, workdir, [lessons[config.task]], advance=advance, rank=config.rank
    )
    begin = time.perf_counter()
    key = uploads.model_key(config.seed, usual)
    params = this.stored(_tune(this, key))
  seconds = {'make': time.perf_counter() - begin}
  acc = this.tester.acc(uploads.widened(params), 0)
  seconds['test'] = time.perf_counter() - begin - seconds['make']
  uploads.save_model(workdir, name, params)
  models = {name: {'task': config.task, 'acc': acc._asdict()}}
  console.print(f'{name}: ACC {100 * acc.value:.1f} ({seconds["make"]:.0f} s)')
  return this.write_record(models, seconds)


if __name__ == '__main__':
  command.start(run, 'configs/finetune.py')
