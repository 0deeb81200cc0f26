"""Measures models on all tasks and triggers, and makes a report's rows."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from dam_jax import attacks
from dam_jax import evaluate
from dam_jax.data.tasks import Pool
from dam_jax.evaluate import Rate
from dam_jax.evaluate import Transfer

SUMMARIES = ('mean', 'worst')
"""What stands in a row's `task` where it sums up all tasks."""


class Measured(NamedTuple):
  """What one model is worth.

  Attributes:
    acc: by task.
    asr: by task that has a trigger.
    ra: by task that has a trigger.
    transfer: by trigger's name and task whose expert is clean.
    hits: what each image counted, int8 `[N]`, by 'acc/<task>', 'asr/<task>' and
      'transfer/<trigger>/<task>'; -1 for images that do not count.
  """

  acc: dict[str, Rate]
  asr: dict[str, Rate]
  ra: dict[str, Rate]
  transfer: dict[str, dict[str, Transfer]]
  hits: dict[str, np.ndarray]


def predictions(
  predict: Callable[..., np.ndarray],
  params_of: Callable[[int], Any],
  pool: Pool,
  *,
  only: Sequence[str] | None = None,
  transfer_test: int = 0,
) -> dict[str, np.ndarray]:
  """Predicts what is to be judged of one model, or of one for each task.

  Args:
    predict: from `evaluate.predictor`.
    params_of: from a task's index to the parameters that do it.
    pool: tasks, and triggers to test.
    only: names of the tasks to measure; None measures all.
    transfer_test: test images a task on which to measure transfer; 0 skips it.

  Returns:
    Classes of test images, `[N]`, by 'clean/<task>' and '<trigger>/<task>'.
  """
  out = {}
  for t, task in enumerate(pool.tasks):
    if only is not None and task.name not in only:
      continue
    params, images = params_of(t), task.test.images
    out[f'clean/{task.name}'] = predict(params, t, images)
    for name, trigger in {**pool.triggers, **pool.probes}.items():
      num = len(images)
      if trigger.task != task.name:
        moves = name in pool.triggers and task.name not in pool.bad
        num = transfer_test if moves else 0
      if num:
        put = functools.partial(_apply, trigger)
        out[f'{name}/{task.name}'] = predict(params, t, images[:num], put)
  return out


def judge(found: Mapping[str, np.ndarray], pool: Pool) -> Measured:
  """Holds predictions against labels and targets.

  Args:
    found: of `predictions`, or several of them together.
    pool: that they were made on.

  Returns:
    All rates.
  """
  out = Measured({}, {}, {}, {name: {} for name in pool.triggers}, {})
  for task in pool.tasks:
    if f'clean/{task.name}' not in found:
      continue
    clean, labels = found[f'clean/{task.name}'], task.test.labels
    out.acc[task.name] = evaluate.accuracy(clean, labels)
    out.hits[f'acc/{task.name}'] = (clean == labels).astype(np.int8)
    for name, trigger in {**pool.triggers, **pool.probes}.items():
      key, target = f'{name}/{task.name}', trigger.target
      if key not in found:
        continue
      said = found[key]
      if trigger.task == task.name:
        out.asr[task.name] = evaluate.attack_success(said, labels, target)
        out.ra[task.name] = evaluate.robust_accuracy(said, labels, target)
        hit = np.where(labels == target, -1, said == target)
        out.hits[f'asr/{task.name}'] = hit.astype(np.int8)
      else:
        moved = evaluate.transfer(said, clean[: len(said)])
        out.transfer[name][task.name] = moved
        hit = (said == moved.target).astype(np.int8)
        out.hits[f'transfer/{name}/{task.name}'] = hit
  return out


_apply = jax.jit(attacks.apply_trigger)


def rows(
  method: str, measured: Measured, attacked: Sequence[str]
) -> list[dict[str, Any]]:
  """Makes a report's rows of one method, all but DER.

  Args:
    method: its name.
    measured: what it is worth.
    attacked: tasks whose merged expert is backdoored.

  Returns:
    Rows {method, task, role, metric, value, low, high, n}.
  """
  by_task = {}
  for found in measured.transfer.values():
    for task, transfer in found.items():
      by_task.setdefault(task, []).append(transfer.rate)
  means = {task: evaluate.mean(rates) for task, rates in by_task.items()}
  return [
    *_rows(method, 'acc', measured.acc, attacked),
    *_rows(method, 'asr', measured.asr, attacked),
    *_rows(method, 'ra', measured.ra, attacked),
    *_rows(method, 'transfer', means, attacked),
  ]


def der_rows(
  found: Sequence[Mapping[str, Any]], method: str, plain: str
) -> list[dict[str, Any]]:
  """Makes the DER rows of one method from rows of it and of the plain merge.

  Args:
    found: rows of both.
    method: the defended merge.
    plain: the merge without a defence.

  Returns:
    Rows for the tasks that are attacked, their mean and the worst.
  """
  rates = {
    (r['method'], r['metric'], r['task']): Rate(
      r['value'], r['low'], r['high'], r['n']
    )
    for r in found
  }
  attacked = [
    r['task']
    for r in found
    if (r['method'], r['metric'], r['role']) == (method, 'asr', 'attacked')
    and r['task'] not in SUMMARIES
  ]
  der = {
    task: evaluate.defence_effectiveness(
      rates[method, 'acc', task],
      rates[method, 'asr', task],
      plain_acc=rates[plain, 'acc', task],
      plain_asr=rates[plain, 'asr', task],
    )
    for task in attacked
  }
  return _rows(method, 'der', der, attacked)


def _rows(
  method: str,
  metric: str,
  rates: Mapping[str, Rate],
  attacked: Sequence[str],
) -> list[dict[str, Any]]:
  """Makes a row a task, and their mean and the worst."""
  if not rates:
    return []
  roles = {t: 'attacked' if t in attacked else 'clean' for t in rates}
  several = set(roles.values())
  last = evaluate.worst(rates, largest=metric in ('asr', 'transfer'))
  summary = {'mean': evaluate.mean(list(rates.values())), 'worst': last}
  roles |= dict.fromkeys(summary, several.pop() if len(several) == 1 else 'all')
  return [
    {'method': method, 'task': task, 'role': roles[task], 'metric': metric}
    | rate._asdict()
    for task, rate in {**rates, **summary}.items()
  ]


def transfers(measured: Measured) -> dict[str, dict[str, Any]]:
  """Sums up by trigger what a report says of transfer.

  Args:
    measured: of one model.

  Returns:
    By trigger: 'share', 'clean' and 'gain' as means over the clean tasks, and
    'targets', the class that the trigger most often yields by task.
  """
  return {
    name: {
      'share': float(np.mean([t.rate.value for t in found.values()])),
      'clean': float(np.mean([t.clean for t in found.values()])),
      'gain': float(np.mean([t.gain for t in found.values()])),
      'targets': {task: t.target for task, t in found.items()},
    }
    for name, found in measured.transfer.items()
    if found
  }
