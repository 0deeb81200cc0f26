"""What `benchmarks.bench_security` runs: two merges of a pool, their rows."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path

from ml_collections import config_dict
import numpy as np
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from benchmarks import runs
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax.models import convert
from experiments import load
from experiments import measure
from experiments import merge

PROJECTION = 'visual_projection.weight'
OURS = 'dam_released'

Hits = Mapping[str, np.ndarray]
"""What each test image counted, `[N]`, see `experiments.measure.Measured`."""


def share_projection(pool: Path, into: Path) -> None:
  """Copies a pool with the base's visual projection in every checkpoint.

  Args:
    pool: folder to read.
    into: folder to write; what it has is left as it is.
  """
  checkpoints = pool / 'checkpoints'
  base = load_file(checkpoints / 'base.safetensors')
  for path in sorted(checkpoints.glob('*.safetensors')):
    target = into / 'checkpoints' / path.name
    if not target.exists():
      target.parent.mkdir(parents=True, exist_ok=True)
      with checkpoint.replacing(target) as temporary:
        weights = load_file(path) | {PROJECTION: base[PROJECTION]}
        save_file(weights, temporary, {'format': 'pt'})
  config = (checkpoints / 'config.json').read_text()
  checkpoint.write(into / 'checkpoints' / 'config.json', config)
  for name in ('tasks', 'triggers'):
    if not (into / name).exists():
      (into / name).symlink_to((pool / name).resolve())


def ours(config: config_dict.ConfigDict, folder: Path) -> tuple[Hits, float]:
  """Merges with `dam_released`, or reads what was measured.

  Returns:
    What each image counted, and seconds.
  """
  if not (folder / 'report.json').exists():
    merge.run(config, folder, Console(quiet=True))
  report = json.loads((folder / 'report.json').read_text())
  with np.load(folder / 'results' / f'{OURS}.npz') as hits:
    return dict(hits), report['record']['seconds'][OURS]['total']


def theirs(
  config: config_dict.ConfigDict, python: str, folder: Path
) -> tuple[Hits, float]:
  """Merges with FusionBench and measures, or reads what it merged.

  Args:
    config: as for `ours`.
    python: that has fusion-bench.
    folder: where to write.

  Returns:
    What each image counted, and seconds.

  Raises:
    RuntimeError: where FusionBench fails.
  """
  setup = load.load(config, Path(config.pool))
  folder.mkdir(parents=True, exist_ok=True)
  out = folder / 'merged.safetensors'
  if not out.exists():
    partial = folder / 'partial.safetensors'
    job = {
      'experts': {t: p.stem for t, p in setup.pool.experts.items()},
      'steps': config.options[OURS].steps,
      'coefficient_steps': config.options[OURS].coefficient_steps,
      'seed': config.seed,
      'out': str(partial.resolve()),
    }
    checkpoint.write(folder / 'job.json', json.dumps(job, indent=2))
    runs.check_module(
      'FusionBench',
      python,
      'security_fusion_bench',
      Path(config.pool).resolve(),
      folder / 'job.json',
    )
    partial.replace(out)
  with safe_open(out, 'numpy') as file:
    seconds = float(file.metadata()['seconds'])
  params = checkpoint.load_params(
    out, name_map=convert.clip_vision, like=setup.base
  )
  predict = evaluate.predictor(setup.image_logits_fn, batch=config.test_batch)
  found = measure.predictions(predict, lambda t: params, setup.pool)
  return measure.judge(found, setup.pool).hits, seconds


def rows(
  mine: Sequence[Hits], peers: Sequence[Hits]
) -> list[dict[str, str | list[float]]]:
  """Compares two merges, metric by metric and task by task.

  Args:
    mine: of each seed.
    peers: the same of the other merge.

  Returns:
    Rows {metric, task, ours, peer, difference}, the last three value, lower and
    upper end of a 95 % interval over images and seeds; task 'mean' is of all.
  """
  out = []
  for metric in ('acc', 'asr'):
    keys = [key for key in mine[0] if key.startswith(f'{metric}/')]
    tasks = {key.partition('/')[2]: [key] for key in keys}
    for task, chosen in {**tasks, 'mean': keys}.items():
      sides = [
        [_stacked(seeds, key) for key in chosen] for seeds in (mine, peers)
      ]
      out.append(
        {
          'metric': metric,
          'task': task,
          'ours': list(evaluate.bootstrap(sides[0])),
          'peer': list(evaluate.bootstrap(sides[1])),
          'difference': list(evaluate.paired_bootstrap(*sides)),
        }
      )
  return out


def _stacked(seeds: Sequence[Hits], key: str) -> np.ndarray:
  hits = np.stack([found[key] for found in seeds]).astype(float)
  return np.where(hits < 0, np.nan, hits)
