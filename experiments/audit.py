"""Says which uploads of a pool to distrust, and shows why.

  python -m experiments.audit --config=configs/audit.py --config.pool=PATH

For each upload the patch and the warp that it obeys and the base does not are
searched, with unlabelled dev images (`dam_jax.audit`, `dam_jax.warps`), on it
alone or together with those for other tasks that it was not made apart from;
what follows is of that which stands out more. Writes to the workdir:
audit.json, audit.md, audit.html, triggers.png and, where the pool says which
uploads are bad, roc.png. An upload that is in audit.json is not audited again,
unless it has other company now.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import attacks
from dam_jax import audit
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax import warps
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import clip
from experiments import command
from experiments import pictures
from experiments import report
from experiments import settings
from experiments import training
from experiments import uploads

KEYS = {
  'pool': 'folder of checkpoints and tasks (dam_jax.data.tasks)',
  'models': 'names of checkpoints with commas; empty is all whose name ends in '
  "a task's, with or without a number behind",
  'areas': 'in pixels, what triggers may cover for free',
  'images': 'dev images a task',
  'batch': 'images a class and step',
  'first_round': 'steps of the scouts of each class',
  'keep': 'classes that are searched further',
  'last_round': 'steps of each of the two rounds that follow',
  'warp_steps': 'steps of each of the warps',
  'scale': 'of task arithmetic, the merge that triggers are tried on',
  'seed': 'of everything random',
}
"""What a config says."""


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises with all that is wrong with a config."""
  lines = settings.wrong_keys(config, KEYS)
  if not lines:
    lines = settings.not_positive(config, but=('seed',))
  settings.raise_if(lines)


@dataclasses.dataclass(frozen=True)
class Upload:
  """A checkpoint to audit.

  Attributes:
    name: of its file.
    task: that it is an expert for.
    trigger: that it is known to obey, or None.
  """

  name: str
  task: str
  trigger: attacks.Trigger | None = None

  @property
  def known(self) -> str:
    """What the pool says of it: 'bad', 'clean' or ''."""
    if self.trigger is not None:
      return 'bad'
    return 'clean' if self.name == f'clean_{self.task}' else ''


def find_uploads(
  folder: pathlib.Path, tasks: Sequence[str], names: Sequence[str] = ()
) -> list[Upload]:
  """Finds the uploads of a pool and their tasks.

  Args:
    folder: of the pool.
    tasks: names of its tasks.
    names: of checkpoints; empty takes all but the base.

  Returns:
    Uploads in the order of their names.

  Raises:
    ValueError: with all names that are no checkpoint's, or say no task.
  """
  there = sorted(p.stem for p in (folder / 'checkpoints').glob('*.safetensors'))
  lines = [f'{n}: no such checkpoint' for n in names if n not in there]
  out = []
  for name in names or [n for n in there if n != 'base']:
    path, trigger = folder / 'triggers' / f'{name}.npz', None
    if path.exists():
      trigger = attacks.load_trigger(path)
    stem = name.rstrip('0123456789').rstrip('_')
    ends = [t for t in tasks if name.endswith(t) or stem.endswith(t)]
    if trigger is not None:
      ends = [trigger.home or trigger.task]
    if ends:
      out.append(Upload(name, max(ends, key=len), trigger))
    else:
      lines.append(f'{name}: its name ends in no task of {", ".join(tasks)}')
  if lines or not out:
    raise ValueError('\n  '.join(['uploads:', *(lines or ['there are none'])]))
  return out


class _Found(NamedTuple):
  """The best trigger of a kind.

  Attributes:
    suspicion: of all of its kind.
    row: what else is said of it.
    put: puts it on images.
    picture: of it, `[H, W, C]`.
  """

  suspicion: float
  row: dict[str, Any]
  put: Callable[[jax.Array], jax.Array]
  picture: np.ndarray


class Auditor:
  """Audits uploads of one pool, all with the same compiled search.

  Args:
    config: of the command.
    folder: of the pool.
  """

  def __init__(self, config: config_dict.ConfigDict, folder: pathlib.Path):
    self.config, self.folder = config, folder
    pool = tasks_lib.load_pool(folder, dev=config.images, test=1)
    self.tasks = {t.name: t for t in pool.tasks}
    self.names = list(self.tasks)
    shop = training.Shop(
      clip.VisionTower(clip.load_config(pool.config)),
      clip.stack_heads([t.head for t in pool.tasks]),
    )
    self.predict = evaluate.predictor(shop.task_logits, batch=config.images)
    self.inverter = audit.Inverter(
      task_logits_fn=shop.task_logits,
      image_shape=shop.tower.config.image_shape,
      areas=tuple(config.areas),
      batch=config.batch,
      first=config.first_round,
      last=config.last_round,
      keep=config.keep,
    )
    self.warp_inverter = warps.WarpInverter(
      task_logits_fn=shop.task_logits,
      image_shape=shop.tower.config.image_shape,
      steps=config.warp_steps,
    )
    self.base = self.load('base')

    @jax.jit
    def merge(experts):
      tx = dj.task_arithmetic(config.scale)
      return dj.merge(tx, self.base, experts).params

    self._merge = merge

  def load(self, name: str) -> Any:
    """Reads a checkpoint."""
    return jax.device_put(uploads.load_model(uploads.path(self.folder, name)))

  @functools.cached_property
  def clean(self) -> dict[str, Any]:
    """The pool's clean experts, which others are merged with."""
    return {
      t: self.load(f'clean_{t}')
      for t in self.names
      if uploads.path(self.folder, f'clean_{t}').exists()
    }

  def company(
    self, found: Sequence[Upload]
  ) -> list[list[tuple[Upload, float]]]:
    """Finds uploads for different tasks that were not made apart.

    Args:
      found: uploads to compare.

    Returns:
      Of each upload those in its company, and how alike they are; at most one
      for each other task, the most alike.
    """
    files = [
      checkpoint.open_model(uploads.path(self.folder, name))
      for name in ('base', *(upload.name for upload in found))
    ]
    products = np.zeros((len(found), len(found)))
    for leaf in files[0].leaves:
      base, *experts = (np.asarray(f.read(leaf), np.float32) for f in files)
      products += audit.gram(base, np.stack(experts))
    out = []
    for upload, others in zip(found, audit.company(products), strict=True):
      nearest = {}
      for i in sorted(others, key=others.__getitem__):
        nearest[found[i].task] = found[i], others[i]
      nearest.pop(upload.task, None)
      out.append([*nearest.values()])
    return out

  def audit(
    self, upload: Upload, company: Sequence[tuple[Upload, float]]
  ) -> tuple[dict[str, Any], np.ndarray]:
    """Audits one upload.

    Args:
      upload: to audit.
      company: uploads that it is searched with, and how alike they are.

    Returns:
      A row of audit.json, and a picture of the trigger, `[H, W, C]`.
    """
    begin = time.perf_counter()
    task, row = self.tasks[upload.task], self.names.index(upload.task)
    seed = zlib.crc32(upload.name.encode())
    key = jax.random.fold_in(jax.random.key(self.config.seed), seed)
    images, params = task.dev.images, self.load(upload.name)
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    partners = {other.task: self.load(other.name) for other, _ in company}
    searched = audit.in_company(
      self.base,
      dj.tree.stack([params, *partners.values()]),
      0,
      range(1, 1 + len(partners)),
    )
    where = row, pixels, len(task.label_names)
    patch, warp = (
      find(key, searched, where) for find in (self._patch, self._warp)
    )
    most = max(patch, warp, key=lambda found: found.suspicion)
    target = most.row['target']

    def success(model):
      clean = self.predict(model, row, images)
      hit = self.predict(model, row, images, most.put) == target
      return (
        float(np.mean(hit[clean != target])) if (clean != target).any() else 1.0
      )

    others = [p for t, p in self.clean.items() if t != upload.task]
    merges = {'base': self.base}
    if others:
      merges['without'] = self._merge(dj.tree.stack(others))
    experts = self.clean | partners | {upload.task: params}
    merges['merge'] = self._merge(dj.tree.stack([*experts.values()]))
    found_row = {
      'model': upload.name,
      'task': upload.task,
      'known': upload.known,
      'company': {other.name: cosine for other, cosine in company},
      'true_target': None if upload.trigger is None else upload.trigger.target,
      'suspicion': most.suspicion,
      **most.row,
      'target_name': task.label_names[target],
      'suspicion_patch': patch.suspicion,
      'suspicion_warp': warp.suspicion,
      **{f'success_{k}': success(model) for k, model in merges.items()},
      'seconds': time.perf_counter() - begin,
    }
    return found_row, most.picture

  def _patch(self, key, params, where) -> _Found:
    found = self.inverter.search(key, params, *where, base=self.base)
    at = 0, found.best()
    best = jax.tree.map(lambda x: jnp.asarray(x[at]), found.patches)
    row = {
      'kind': 'patch',
      'target': int(found.classes[0]),
      'lead': float(found.lead[at]),
      'success': float(found.success[at]),
      'area': float(found.area[at]),
    }
    put = functools.partial(audit.apply_patch, best)
    grey = jnp.full((1, *self.inverter.image_shape), 0.5)
    return _Found(found.suspicion, row, put, np.asarray(put(grey)[0]))

  def _warp(self, key, params, where) -> _Found:
    found = self.warp_inverter.search(key, params, *where, base=self.base)
    at = int(found.lead[:, found.target].argmax()), found.target
    points = found.points[at[0]]
    row = {
      'kind': 'warp',
      'target': found.target,
      'lead': float(found.lead[at]),
      'success': float(found.success[at]),
      'area': None,
    }
    put = functools.partial(warps.warp, points=jnp.asarray(points))
    picture = np.asarray(put(pictures.lines(self.inverter.image_shape)))
    return _Found(found.suspicion, row, put, picture)


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Audits all uploads that a config asks for.

  Args:
    config: see `KEYS`.
    workdir: where to write.
    console: to show progress and the table on.

  Returns:
    What audit.json holds.

  Raises:
    ValueError: where the config or a file makes no sense.
  """
  check_config(config)
  folder = pathlib.Path(config.pool)
  names = settings.split(config.models)
  found = find_uploads(folder, tasks_lib.task_names(folder), names)
  path, kept = workdir / 'audit.json', workdir / 'triggers.npz'
  rows, patches = {}, {}
  asked = json.loads(config.to_json()) | {'models': ''}
  if path.exists():
    there = json.loads(path.read_text())
    if there['config'] != asked:
      raise ValueError(f'{path} is of another config: take another workdir')
    rows = {r['model']: r for r in there['rows']}
    with np.load(kept, allow_pickle=False) as file:
      patches = dict(file)
  auditor = Auditor(config, folder)
  for upload, company in zip(found, auditor.company(found), strict=True):
    there = rows.get(upload.name, {}).get('company')
    if there != {other.name: cosine for other, cosine in company}:
      with console.status(f'searching triggers on {upload.name}'):
        row, patch = auditor.audit(upload, company)
      rows[upload.name], patches[upload.name] = row, patch
      console.print(_line(rows[upload.name]))
      with checkpoint.replacing(kept) as temporary, temporary.open('wb') as f:
        np.savez(f, **patches)
      checkpoint.write(
        path, json.dumps(summary(list(rows.values()), asked), indent=2)
      )
  out = summary([rows[u.name] for u in found], asked)
  _write_pages(workdir, out, patches)
  console.print(table(out))
  if out['auc'] is not None:
    console.print(f'area under the ROC curve: {out["auc"]:.3f}')
  console.print(f'\nreport: {workdir / "audit.html"}')
  return out


def summary(
  rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
  """Puts together what audit.json holds: rows, the most suspicious first.

  Args:
    rows: of uploads.
    config: that they were made with.
  """
  rows = sorted(rows, key=lambda r: -r['suspicion'])
  bad, clean = (
    [r['suspicion'] for r in rows if r['known'] == known]
    for known in ('bad', 'clean')
  )
  auc = evaluate.roc_auc(bad, clean) if bad and clean else None
  return {'config': dict(config), 'auc': auc, 'rows': rows}


def _line(row: Mapping[str, Any]) -> str:
  return (
    f'{row["model"]}: suspicion {row["suspicion"]:.2f}, '
    f'“{row["target_name"]}” ({row["seconds"]:.0f} s)'
  )


HEADS = {
  'model': 'upload',
  'suspicion': 'suspicion',
  'kind': 'of a',
  'target_name': 'leads to',
  'success': 'as searched',
  'success_base': 'on the base',
  'success_merge': 'in a merge',
  'success_without': 'without it',
  'area': 'pixels',
  'company': 'searched with',
  'known': 'known to be',
}
"""Columns of the table."""


def _cells(row: Mapping[str, Any]) -> list[str]:
  out = []
  for key in HEADS:
    value = row.get(key, '')
    if key.startswith('success') and value != '':
      value = f'{100 * value:.0f} %'
    elif isinstance(value, dict):
      value = ', '.join(f'{name} ({x:.2f})' for name, x in value.items())
    elif isinstance(value, float):
      value = f'{value:.2f}' if key == 'suspicion' else f'{value:.0f}'
    out.append('' if value is None else str(value))
  return out


def table(out: Mapping[str, Any]) -> Table:
  """Makes the table for a terminal.

  Args:
    out: what audit.json holds.
  """
  shown = Table(title='uploads, the most suspicious first')
  for head in HEADS.values():
    shown.add_column(head)
  for row in out['rows']:
    shown.add_row(*_cells(row))
  return shown


def markdown(out: Mapping[str, Any]) -> str:
  """Writes the table as Markdown.

  Args:
    out: what audit.json holds.
  """
  lines = ['| ' + ' | '.join(HEADS.values()) + ' |', '|---' * len(HEADS) + '|']
  lines += ['| ' + ' | '.join(_cells(row)) + ' |' for row in out['rows']]
  if out['auc'] is not None:
    lines += ['', f'Area under the ROC curve: {out["auc"]:.3f}.']
  return '\n'.join([*lines, ''])


def _write_pages(
  workdir: pathlib.Path, out: Mapping[str, Any], patches: Mapping[str, Any]
) -> None:
  images = {'triggers': pictures.inversions(out['rows'], patches)}
  if out['auc'] is not None:
    images['roc'] = pictures.roc(out['rows'])
  for name, png in images.items():
    checkpoint.write(workdir / f'{name}.png', png)
  checkpoint.write(workdir / 'audit.md', markdown(out))
  page = (
    report.environment()
    .get_template('audit.html.j2')
    .render(
      out=out, heads=HEADS, cells=_cells, images=images, alike=audit.ALIKE
    )
  )
  checkpoint.write(workdir / 'audit.html', page)


if __name__ == '__main__':
  command.start(run, 'configs/audit.py')
