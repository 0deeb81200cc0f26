"""What commands that make uploads share: keys, files, rates."""

from collections.abc import Sequence
import functools
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from dam_jax import attacks
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax.data import tasks as tasks_lib
from dam_jax.models import convert
from experiments import training
from experiments.lab import Upload


def model_key(seed: int, name: str) -> jax.Array:
  """Returns the key of everything random about a model of a name."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def path(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns where a pool keeps a checkpoint."""
  return folder / 'checkpoints' / f'{name}.safetensors'


def save_model(folder: pathlib.Path, name: str, params: Any) -> None:
  """Writes a checkpoint in Hugging Face's names."""
  checkpoint.save_params(
    path(folder, name), params, name_map=convert.clip_vision
  )


def load_model(at: Any) -> Any:
  """Reads a checkpoint from its path, in float32."""
  return checkpoint.load_params(at, name_map=convert.clip_vision)


def widened(params: Any) -> Any:
  """Returns a model in float32, as those who read its file compute with it."""
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def save(folder: pathlib.Path, name: str, upload: Upload) -> dict[str, str]:
  """Writes an upload where `dam_jax.data.tasks.find_upload` looks for it.

  Args:
    folder: of the pool.
    name: of the upload.
    upload: whose own checkpoint is written last: where it is, the rest is.

  Returns:
    By task, the name of the checkpoint that is given out as its expert.
  """
  attacks.save_trigger(folder / 'triggers' / f'{name}.npz', upload.trigger)
  (home, params), *partners = upload.models().items()
  names = {home: name}
  for task, partner in partners:
    names[task] = tasks_lib.partner_name(name, task)
    save_model(folder, names[task], partner)
  save_model(folder, name, params)
  return names


class Tester:
  """Measures models on test images.

  Args:
    shop: the tower and the heads.
    tasks: in the order of the heads.
    num: test images a task; 0 is all.
  """

  def __init__(
    self, shop: training.Shop, tasks: Sequence[tasks_lib.Task], num: int
  ):
    self._predict = evaluate.predictor(shop.task_logits, batch=250)
    self._tests = [
      tasks_lib.Split(*(x[: num or None] for x in t.test)) for t in tasks
    ]

  def acc(self, params: Any, task: int) -> evaluate.Rate:
    """Returns a model's accuracy on a task."""
    images, labels = self._tests[task]
    return evaluate.accuracy(self._predict(params, task, images), labels)

  def asr(
    self, params: Any, task: int, trigger: attacks.Trigger
  ) -> evaluate.Rate:
    """Returns a trigger's success with a model on a task."""
    images, labels = self._tests[task]
    apply = functools.partial(attacks.apply_trigger, trigger)
    triggered = self._predict(params, task, images, apply)
    return evaluate.attack_success(triggered, labels, trigger.target)
