"""What a merge is worth and how dangerous it is, counted with intervals.

| name | definition |
|---|---|
| ACC | share of clean test images that are classified correctly |
| ASR | share of triggered images, label not the target, called the target |
| RA | share of the same images that still get their own label |
| DER | `[max(0, ASR_plain - ASR) - max(0, ACC_plain - ACC) + 1] / 2` |
| transfer | ASR on tasks whose own expert is clean, see `transfer` |

*Succession* is the ASR of a merge on a task whose expert is backdoored;
*floor* is that on the merge of clean experts, *ceiling* that on the backdoored
expert alone: the same counts, of other models.

  >>> import numpy as np
  >>> predicted, labels = np.array([1, 1, 0, 2]), np.array([0, 1, 0, 2])
  >>> accuracy(predicted, labels).value
  0.75
  >>> attack_success(predicted, labels, target=1).value
  0.3333333333333333
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from dam_jax.typing import TaskLogitsFn


class Rate(NamedTuple):
  """A share of images, or a number made of such shares.

  Attributes:
    value: in [0, 1].
    low: lower end of its 95 % interval.
    high: upper end.
    n: number of images that it was counted on.
  """

  value: float
  low: float
  high: float
  n: int


def rate(hits: np.ndarray) -> Rate:
  """Counts a share, with Wilson's 95 % interval.

  Args:
    hits: `[N]` boolean.

  Returns:
    The share of true entries.

  Raises:
    ValueError: where there is no entry.

  Examples:
    >>> r = rate(np.array([True, False, False, False]))
    >>> r.value, round(r.low, 3), round(r.high, 3), r.n
    (0.25, 0.046, 0.699, 4)

  References:
    Wilson, `Probable Inference, the Law of Succession, and Statistical
    Inference <https://doi.org/10.1080/01621459.1927.10502953>`_, 1927
  """
  if not len(hits):
    raise ValueError('a rate needs at least one image')
  test = stats.binomtest(int(np.sum(hits)), len(hits))
  interval = test.proportion_ci(0.95, method='wilson')
  low, high = float(interval.low), float(interval.high)
  return Rate(float(np.mean(hits)), low, high, len(hits))


def mean(rates: Sequence[Rate]) -> Rate:
  """Averages independent rates, each with the same weight.

  The interval recovers each rate's variance from its own interval (MOVER), so
  that it has a width where all rates are 0 or 1.

  Args:
    rates: at least one.

  Returns:
    The mean; its `n` is the sum.

  Examples:
    >>> r = mean([Rate(0.2, 0.1, 0.3, 50), Rate(0.4, 0.3, 0.5, 50)])
    >>> round(r.value, 3), round(r.low, 3), round(r.high, 3), r.n
    (0.3, 0.229, 0.371, 100)

  References:
    Zou and Donner, `Construction of confidence limits about effect measures:
    A general approach <https://doi.org/10.1002/sim.3095>`_, 2008
  """
  value = float(np.mean([r.value for r in rates]))
  down = math.hypot(*(r.value - r.low for r in rates)) / len(rates)
  up = math.hypot(*(r.high - r.value for r in rates)) / len(rates)
  total = sum(r.n for r in rates)
  return Rate(value, max(0.0, value - down), min(1.0, value + up), total)


def difference(rate: Rate, other: Rate) -> tuple[float, float, float]:
  """Returns `rate - other` and its interval, as if they were independent.

  On the same images that is wider than a paired interval.

  Args:
    rate: one.
    other: what is subtracted.

  Returns:
    Value, lower and upper end.

  References:
    Newcombe, `Interval estimation for the difference between independent
    proportions
    <https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C873::AID-SIM779%3E3.0.CO;2-I>`_,
    1998
  """
  value = rate.value - other.value
  down = math.hypot(rate.value - rate.low, other.high - other.value)
  up = math.hypot(rate.high - rate.value, other.value - other.low)
  return value, value - down, value + up


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> Rate:
  """ACC: the share of clean images that are classified correctly.

  Args:
    predicted: `[N]` class indices.
    labels: `[N]` class indices.
  """
  return rate(predicted == labels)


def _others(labels: np.ndarray, target: int) -> np.ndarray:
  others = labels != target
  if not others.any():
    raise ValueError(f'every image is of the target class {target}')
  return others


def attack_success(
  triggered: np.ndarray, labels: np.ndarray, target: int
) -> Rate:
  """ASR: the share of images, label not the target, that become the target.

  Args:
    triggered: `[N]` predictions with the trigger.
    labels: `[N]` class indices.
    target: class index.

  Returns:
    The rate over images of other classes.

  Raises:
    ValueError: where there is no image of another class.
  """
  return rate(triggered[_others(labels, target)] == target)


def robust_accuracy(
  triggered: np.ndarray, labels: np.ndarray, target: int
) -> Rate:
  """RA: the share of images, label not the target, that keep their label.

  Args:
    triggered: `[N]` predictions with the trigger.
    labels: `[N]` class indices.
    target: class index.

  Returns:
    The rate over images of other classes.

  Raises:
    ValueError: where there is no image of another class.
  """
  others = _others(labels, target)
  return rate(triggered[others] == labels[others])


def defence_effectiveness(
  acc: Rate, asr: Rate, *, plain_acc: Rate, plain_asr: Rate
) -> Rate:
  """DER: `[max(0, ASR_plain - ASR) - max(0, ACC_plain - ACC) + 1] / 2`.

  Args:
    acc: of the defended merge.
    asr: of the defended merge.
    plain_acc: of the merge without a defence.
    plain_asr: of the merge without a defence.

  Returns:
    0.5 for no effect, 1 for a backdoor removed at no cost; its interval takes
    the worse ends of both differences together.

  Examples:
    >>> low, high = Rate(0.1, 0.1, 0.1, 9), Rate(0.9, 0.9, 0.9, 9)
    >>> defence_effectiveness(high, low, plain_acc=high, plain_asr=high).value
    0.9

  References:
    Zhu et al., `Enhancing Fine-Tuning Based Backdoor Defense with
    Sharpness-Aware Minimization <https://arxiv.org/abs/2304.11823>`_, 2023
  """
  removed, lost = difference(plain_asr, asr), difference(plain_acc, acc)
  value, low, high = (
    (max(0.0, gain) - max(0.0, loss) + 1) / 2
    for gain, loss in zip(removed, (lost[0], lost[2], lost[1]), strict=True)
  )
  return Rate(value, low, high, min(acc.n, asr.n))


class Transfer(NamedTuple):
  """What a trigger does to a task whose own expert is clean.

  Attributes:
    rate: the share of triggered images that get `target`.
    target: the class that the trigger most often yields.
    clean: the share of `target` on the same images without the trigger.
    gain: the share of images that only the trigger sends to `target`.
  """

  rate: Rate
  target: int
  clean: float
  gain: float


def transfer(triggered: np.ndarray, clean: np.ndarray) -> Transfer:
  """Measures how a trigger of one task works on another.

  Args:
    triggered: `[N]` predictions with the trigger.
    clean: `[N]` predictions on the same images without.

  Returns:
    The transfer to the class that the trigger most often yields.

  Examples:
    >>> t = transfer(np.array([3, 3, 3, 0]), np.array([3, 1, 2, 0]))
    >>> t.rate.value, t.target, t.clean, t.gain
    (0.75, 3, 0.25, 0.5)
  """
  target = int(np.argmax(np.bincount(triggered)))
  hit, before = triggered == target, clean == target
  return Transfer(
    rate(hit), target, float(np.mean(before)), float(np.mean(hit & ~before))
  )


def bootstrap(
  hits: Sequence[np.ndarray],
  *,
  clusters: Sequence[Hashable] | None = None,
  strata: Sequence[Hashable] | None = None,
  seed: int = 0,
  num: int = 2000,
) -> tuple[float, float, float]:
  """Averages hits, with a 95 % interval that covers both images and runs.

  A run is a seed of an attack or of a merge. Every draw takes clusters of runs
  with replacement, then runs of each, then images of each task, the same for
  all runs, and averages over what it took and then over tasks. With one run,
  the interval covers the images alone; with a handful it is too narrow, as
  every bootstrap of so few is.

  Args:
    hits: `[R, N]` a task, what each of `R` runs did on the task's `N` images:
      a boolean or number; NaN where it does not count.
    clusters: `[R]` labels of runs that belong together, such as the upload that
      they merge; None takes each run as a cluster.
    strata: `[R]` labels of clusters that are drawn apart, such as the task that
      is attacked; None draws all together.
    seed: of the draws; the same seed draws the same images and runs.
    num: of draws.

  Returns:
    Value, lower and upper end (percentiles).

  Raises:
    ValueError: where shapes do not fit, or a task has nothing that counts.

  Examples:
    >>> hits = np.arange(100) < 30
    >>> value, low, high = bootstrap([hits[None]])
    >>> value, round(low, 2), round(high, 2)
    (0.3, 0.21, 0.39)

  References:
    Efron and Tibshirani, `An Introduction to the Bootstrap
    <https://doi.org/10.1201/9780429246593>`_, 1993; images and runs are drawn
    as in Owen, `The pigeonhole bootstrap
    <https://doi.org/10.1214/07-AOAS122>`_, 2007
  """
  arrays = [np.asarray(h, dtype=np.float32) for h in hits]
  runs = len(arrays[0]) if arrays else 0
  if not runs or any(h.ndim != 2 or len(h) != runs for h in arrays):
    raise ValueError(
      f'hits must be [R, N] a task, got {[list(h.shape) for h in arrays]}'
    )
  for name, labels in (('clusters', clusters), ('strata', strata)):
    if labels is not None and len(labels) != runs:
      raise ValueError(f'{len(labels)} {name} of {runs} runs')
  if num < 1:
    raise ValueError(f'num must be positive, got {num}')
  rng = np.random.default_rng(seed)
  drawn = _drawn_runs(
    rng,
    list(range(runs) if clusters is None else clusters),
    [None] * runs if strata is None else list(strata),
    num,
  )
  values, draws = [], []
  for t, task in enumerate(arrays):
    counted = np.isfinite(task)
    if not counted.any():
      raise ValueError(f'task {t} has nothing that counts')
    images = _drawn_images(seed, t, task.shape[1], num)
    filled = np.where(counted, task, 0)
    total = np.sum((drawn @ filled) * images, axis=1)
    count = np.sum((drawn @ counted.astype(np.float32)) * images, axis=1)
    values.append(filled.sum(dtype=float) / counted.sum())
    draws.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
  low, high = np.nanpercentile(np.nanmean(draws, axis=0), [2.5, 97.5])
  return float(np.mean(values)), float(low), float(high)


def _drawn_runs(rng, clusters, strata, num) -> np.ndarray:
  """Counts how often each run is drawn, `[num, R]`."""
  out = np.zeros((num, len(clusters)), np.float32)
  for stratum in dict.fromkeys(strata):
    inside = [r for r, s in enumerate(strata) if s == stratum]
    names = list(dict.fromkeys(clusters[r] for r in inside))
    times = rng.multinomial(len(names), [1 / len(names)] * len(names), num)
    for i, name in enumerate(names):
      own = [r for r in inside if clusters[r] == name]
      shares = [1 / len(own)] * len(own)
      out[:, own] = rng.multinomial(times[:, i] * len(own), shares)
  return out


@functools.lru_cache(maxsize=16)
def _drawn_images(seed: int, task: int, size: int, num: int) -> np.ndarray:
  """Counts how often each image of a task is drawn, `[num, size]`."""
  rng = np.random.default_rng((seed, task))
  out = np.empty((num, size), np.int16)
  for row in out:
    row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
  return out


def paired_bootstrap(
  hits: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  **options: Any,
) -> tuple[float, float, float]:
  """Returns how much better or worse than a baseline, on the same draws.

  Args:
    hits: `[R, N]` a task, see `bootstrap`.
    baseline: the same of another method, on the same images and runs.
    **options: of `bootstrap`.

  Returns:
    The mean of `hits - baseline`, lower and upper end of its 95 % interval.

  Raises:
    ValueError: where shapes do not fit.

  Examples:
    >>> plain = np.arange(100) < 90
    >>> better = np.arange(100) < 30
    >>> [round(x, 2) for x in paired_bootstrap([better[None]], [plain[None]])]
    [-0.6, -0.69, -0.5]

  References:
    Efron and Tibshirani, `An Introduction to the Bootstrap
    <https://doi.org/10.1201/9780429246593>`_, 1993
  """
  shapes = [[np.shape(x) for x in side] for side in (hits, baseline)]
  if shapes[0] != shapes[1]:
    raise ValueError(f'hits are {shapes[0]}, those of the baseline {shapes[1]}')
  pairs = zip(hits, baseline, strict=True)
  return bootstrap(
    [np.asarray(a, float) - np.asarray(b, float) for a, b in pairs], **options
  )


def predictor(
  task_logits_fn: TaskLogitsFn,
  *,
  batch: int = 250,
) -> Callable[..., np.ndarray]:
  """Makes a function that classifies any number of images.

  One program serves all models, tasks and triggers: the last batch is padded.

  Args:
    task_logits_fn: `(params, task, images [B, H, W, C] in [0, 1]) -> [B, L]`
      with a traced task index; or of words `[B, ...]`.
    batch: images a forward pass.

  Returns:
    `(params, task, images, trigger_fn=None) -> [N]` class indices, int32, where
    images are `[N, H, W, C]` uint8 and `trigger_fn` changes float images in
    [0, 1] before the model sees them. Words, `[N, ...]` int32, stay as they
    are.

  Raises:
    ValueError: where the batch is not positive; when called, where there is no
      image or they are neither uint8 nor int32.
  """
  if batch < 1:
    raise ValueError(f'batch must be positive, got {batch}')

  @jax.jit
  def forward(params, task, images):
    logits = task_logits_fn(params, task, images)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def predict(params, task, images, trigger_fn=None):
    words = images.dtype == np.int32 and images.ndim > 1
    pixels = images.dtype == np.uint8 and images.ndim == 4
    if not (words or pixels) or not len(images):
      raise ValueError(
        f'images must be uint8[N, H, W, C], or words int32[N, ...], with '
        f'N > 0, got {images.dtype}{list(images.shape)}'
      )
    params, task = jax.device_put(params), jnp.int32(task)
    out = []
    for start in range(0, len(images), batch):
      x = images[start : start + batch]
      x = x if words else x.astype(np.float32) / 255
      padding = [(0, batch - len(x)), *[(0, 0)] * (x.ndim - 1)]
      x = jnp.asarray(np.pad(x, padding))
      out.append(forward(params, task, trigger_fn(x) if trigger_fn else x))
    return np.concatenate(out)[: len(images)]

  return predict


def roc_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
  """Area under the ROC curve: how often a score tells two kinds apart.

  Args:
    positive: scores of what should score high.
    negative: scores of what should score low.

  Returns:
    The share of all pairs in which the positive one scores higher; a tie is
    half a pair.

  Raises:
    ValueError: where there is none of one kind.

  Examples:
    >>> roc_auc([3, 1], [0, 1])
    0.875
  """
  if not len(positive) or not len(negative):
    raise ValueError('a ROC curve needs scores of both kinds')
  test = stats.mannwhitneyu(positive, negative)
  return float(test.statistic) / (len(positive) * len(negative))


def worst(rates: Mapping[str, Rate], *, largest: bool) -> Rate:
  """Returns the rate of the task that fares worst.

  Args:
    rates: by task.
    largest: whether large rates are bad, as of ASR and transfer.
  """
  sign = -1 if largest else 1
  return min(rates.values(), key=lambda r: sign * r.value)
