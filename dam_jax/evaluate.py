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

from collections.abc import Callable, Mapping, Sequence
import math
from typing import NamedTuple

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


def predictor(
  task_logits_fn: TaskLogitsFn,
  *,
  batch: int = 250,
) -> Callable[..., np.ndarray]:
  """Makes a function that classifies any number of images.

  One program serves all models, tasks and triggers: the last batch is padded.

  Args:
    task_logits_fn: `(params, task, images [B, H, W, C] in [0, 1]) -> [B, L]`
      with a traced task index.
    batch: images a forward pass.

  Returns:
    `(params, task, images, trigger_fn=None) -> [N]` class indices, int32, where
    images are `[N, H, W, C]` uint8 and `trigger_fn` changes float images in
    [0, 1] before the model sees them.

  Raises:
    ValueError: where the batch is not positive; when called, where there is no
      image or they are not uint8.
  """
  if batch < 1:
    raise ValueError(f'batch must be positive, got {batch}')

  @jax.jit
  def forward(params, task, images):
    logits = task_logits_fn(params, task, images)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def predict(params, task, images, trigger_fn=None):
    if images.ndim != 4 or not len(images) or images.dtype != np.uint8:
      raise ValueError(
        f'images must be uint8[N, H, W, C] with N > 0, got '
        f'{images.dtype}{list(images.shape)}'
      )
    params, task = jax.device_put(params), jnp.int32(task)
    out = []
    for start in range(0, len(images), batch):
      x = images[start : start + batch].astype(np.float32) / 255
      padding = [(0, batch - len(x)), *[(0, 0)] * 3]
      x = jnp.asarray(np.pad(x, padding))
      out.append(forward(params, task, trigger_fn(x) if trigger_fn else x))
    return np.concatenate(out)[: len(images)]

  return predict


def worst(rates: Mapping[str, Rate], *, largest: bool) -> Rate:
  """Returns the rate of the task that fares worst.

  Args:
    rates: by task.
    largest: whether large rates are bad, as of ASR and transfer.
  """
  sign = -1 if largest else 1
  return min(rates.values(), key=lambda r: sign * r.value)
