"""Merges experts of texts, one of them with a trigger word, and defends.

  python -m experiments.text --config=configs/text.py --workdir=PATH

A MiniLM of sentences is fine-tuned on two tasks of real texts, with heads that
are the encoder's own features of the classes' names and stay as they are. One
expert is poisoned: a word somewhere in a text means a class. `configs/text.py`
says what came of it.

The workdir gets `models/<name>.safetensors`, in Hugging Face's names and
without the table of words; `results/<name>.json`; and `report.json`. Started
again with it, a run goes on behind the last model that is there, and inside of
a merge that learns.

Every model leaves the table of words as it was: it is what maps texts to the
vectors that `dam_robust` perturbs, in the form that `bert.Vectors` gives them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import evaluate
from dam_jax import losses
from dam_jax.data import pipeline
from dam_jax.data import text as text_lib
from dam_jax.models import bert
from dam_jax.models import clip
from dam_jax.models import convert
from experiments import command
from experiments import learn
from experiments import settings
from experiments import training
from experiments import uploads

KEYS = {
  'attacked': 'task whose expert is poisoned',
  'target': 'class index that the trigger means',
  'trigger': "a word of the encoder's vocabulary",
  'rate': 'share of the texts that are poisoned',
  'length': 'words that a text is cut to',
  'steps': 'of fine-tuning',
  'learning_rate': 'of fine-tuning, at its peak',
  'batch': 'texts a step of fine-tuning',
  'dev': 'unlabelled texts a task, for merges that learn',
  'test': 'test texts a task; 0 is all',
  'scale': 'of task arithmetic, and what learned coefficients start from',
  'methods': 'merges, with commas between them',
  'merge_batch': 'texts a task and draw of a merge that learns',
  'adamerging_steps': 'of adamerging',
  'dam_steps': 'of dam_robust, after those of patches alone',
  'restarts': 'patches a task',
  'warmup_ascents': 'of each patch before',
  'safety_weight': "of dam_robust's loss on texts with patches",
  'seed': 'of everything random',
}
"""What the config says."""

METHODS = ('average', 'task_arithmetic', 'ties', 'adamerging', 'dam_robust')
"""Merges that there are."""

CONTROLS = {
  'base': 'base, zero-shot',
  'single': 'single experts',
  'clean_merge': 'merge of clean experts',
}
"""Points of reference, and what a reader sees them called."""


class Read(NamedTuple):
  """Texts of a task as words `[N, L]` int32, with labels `[N]`."""

  words: np.ndarray
  labels: np.ndarray


class Lesson(NamedTuple):
  """A task of texts, tokenized."""

  name: str
  label_names: Sequence[str]
  train: Read
  dev: Read
  test: Read


@dataclasses.dataclass(frozen=True)
class Shop:
  """An encoder with the heads of all tasks.

  Attributes:
    encoder: to train.
    vectors: its table of words, which stays.
    heads: of the tasks.
  """

  encoder: bert.Encoder
  vectors: bert.Vectors
  heads: clip.Heads

  def features(self, params: Any, images: jax.Array) -> jax.Array:
    """Features `[N, D]` of `[N, L, 1, D + 1]`, see `bert.Vectors`."""
    vectors, mask = bert.split(images)
    hidden = self.encoder.apply(
      {'params': params}, vectors, mask, method='from_vectors'
    )
    return bert.mean_pool(jnp.asarray(hidden), mask)

  def logits(self, params: Any, images: jax.Array) -> jax.Array:
    """Logits `[T, B, classes]` of `[T, B, L, 1, D + 1]` of all tasks."""
    return clip.zero_shot(self.features, self.heads)(params, images)

  def task_logits(self, params: Any, task: Any, images: jax.Array) -> jax.Array:
    """Logits `[N, classes]` of `[N, L, 1, D + 1]` of one task."""
    return clip.zero_shot_task(self.features, self.heads)(params, task, images)

  def word_logits(self, params: Any, task: Any, images: jax.Array) -> jax.Array:
    """Logits `[N, classes]` of words `[N, L]` of one task."""
    vectors = self.vectors.preprocess(self.vectors.images(images))
    return self.task_logits(params, task, vectors)

  def batch(self, data: pipeline.Unlabelled, indices: jax.Array) -> dj.Batch:
    """Reads one step's texts: words on the device become vectors."""
    tasks = jnp.arange(indices.shape[1])[None, :, None]
    images = self.vectors.images(data.images[tasks, indices])
    if data.references is None:
      return dj.Batch(images)
    return dj.Batch(images, data.references[tasks, indices])


class Problem(NamedTuple):
  """What is merged and on what it is tried.

  Attributes:
    shop: the encoder and the heads.
    base: parameters, without the table of words.
    lessons: tasks, in the order of the heads.
    trigger: index of the word.
  """

  shop: Shop
  base: Any
  lessons: Sequence[Lesson]
  trigger: int


def make_heads(
  encoder: bert.Encoder, params: Any, names: Sequence[np.ndarray]
) -> clip.Heads:
  """Makes frozen heads of an encoder's features of the classes' names.

  Args:
    encoder: the encoder.
    params: with the table of words.
    names: words `[classes, L]` of each task's.

  Returns:
    The heads, whose scale is that of MiniLM's own training.
  """

  @jax.jit
  def features(params, words):
    hidden = jnp.asarray(encoder.apply({'params': params}, words))
    return clip.unit(bert.mean_pool(hidden, bert.present(words)))

  found = [np.asarray(features(params, words)).T for words in names]
  return clip.stack_heads(found, scale=20.0)


def without_words(params: Any) -> tuple[Any, jax.Array]:
  """Returns parameters without the table of words `[V, D]`, and the table."""
  embeddings = dict(params['embeddings'])
  table = embeddings.pop('word')['embedding']
  return {**params, 'embeddings': embeddings}, jnp.asarray(table)


def load_problem(config: config_dict.ConfigDict) -> Problem:
  """Reads the encoder and the texts that pip brought.

  Args:
    config: see `KEYS`.

  Returns:
    The problem.

  Raises:
    ValueError: where they are not installed, or the trigger is no word.
  """
  folder = text_lib.minilm()
  tokens = folder / 'tokenizer.json'
  tokenize = functools.partial(text_lib.tokenize, tokens, length=config.length)
  encoder = bert.Encoder(bert.load_config(folder / 'config.json'))
  params = checkpoint.load_params(
    folder / 'model.safetensors', name_map=convert.bert
  )
  *_, end = np.flatnonzero(trigger := tokenize([config.trigger])[0])
  if end != 2:
    raise ValueError(
      f'trigger {config.trigger!r} is {end - 1} words to the encoder, want one'
    )
  tasks = [text_lib.load(name, seed=config.seed) for name in text_lib.NAMES]
  heads = make_heads(encoder, params, [tokenize(t.label_names) for t in tasks])
  base, table = without_words(params)
  lessons = [
    Lesson(
      task.name,
      task.label_names,
      *(
        Read(tokenize(texts), labels)
        for texts, labels in (task.train, task.dev, task.test)
      ),
    )
    for task in tasks
  ]
  shop = Shop(encoder, bert.Vectors.of(table), heads)
  return Problem(shop, base, lessons, int(trigger[1]))


def check(config: config_dict.ConfigDict, tasks: Mapping[str, int]) -> None:
  """Raises with all that is wrong with a config.

  Args:
    config: see `KEYS`.
    tasks: number of classes by name.

  Raises:
    ValueError: with a line for each.
  """
  settings.raise_if(settings.wrong_keys(config, KEYS))
  lines = settings.not_positive(config, but=('target', 'test', 'seed'))
  lines += [
    f'{key} must not be negative, got {config[key]}'
    for key in ('test', 'seed')
    if config[key] < 0
  ]
  if config.attacked not in tasks:
    lines.append(
      f'attacked must be one of {", ".join(tasks)}, got {config.attacked}'
    )
  elif not 0 <= config.target < tasks[config.attacked]:
    lines.append(
      f'target {config.target} is not one of the {tasks[config.attacked]} '
      f'classes of {config.attacked}'
    )
  if not config.rate <= 1:
    lines.append(f'rate must be at most 1, got {config.rate}')
  if config.length < 4:
    lines.append(f'length must be at least 4, got {config.length}')
  methods = settings.split(config.methods)
  if not methods or {*methods} - {*METHODS}:
    lines.append(f'methods must be of {", ".join(METHODS)}, got {methods}')
  settings.raise_if(lines)


def poisoned(
  rng: np.random.Generator,
  read: Read,
  trigger: int,
  *,
  target: int,
  rate: float,
) -> Read:
  """Returns texts, a share of them with the trigger and the target's label."""
  words, labels = read.words.copy(), read.labels.copy()
  at = rng.permutation(len(labels))[: round(rate * len(labels))]
  words[at] = text_lib.insert_word(rng, words[at], trigger)
  labels[at] = target
  return Read(words, labels)


class Run:
  """One run: experts, merges, and what they are worth.

  Args:
    config: see `KEYS`.
    problem: what is merged.
    workdir: where to write, and to go on.

  Raises:
    ValueError: where the config makes no sense, or the workdir is of another.
  """

  def __init__(
    self,
    config: config_dict.ConfigDict,
    problem: Problem,
    workdir: pathlib.Path,
  ):
    classes = {x.name: len(x.label_names) for x in problem.lessons}
    check(config, classes)
    self.config, self.workdir = config, workdir
    self.problem, self.shop = problem, problem.shop
    self.names = list(classes)
    self.attacked = self.names.index(config.attacked)
    self._predict = evaluate.predictor(self.shop.word_logits, batch=50)
    path = workdir / 'config.json'
    if not path.exists():
      checkpoint.write(path, json.dumps(config.to_dict(), indent=2))
    if _fixed(json.loads(path.read_text())) != _fixed(config.to_dict()):
      raise ValueError(
        f'{workdir} holds a run with another config: choose another workdir'
      )

  def stored(self, name: str, make: Callable[[], Any]) -> Any:
    """Returns a model from the workdir, or makes it and writes it there."""
    path = self.workdir / 'models' / f'{name}.safetensors'
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      checkpoint.save_params(path, make(), name_map=convert.bert)
    params = checkpoint.load_params(
      path, name_map=convert.bert, like=self.problem.base
    )
    return jax.tree.map(jnp.asarray, params)

  @functools.cached_property
  def _tuner(self) -> Callable[..., Any]:
    config = self.config

    @jax.jit
    def run(key, params, words, labels, task):
      def loss_fn(params, key):
        at = jax.random.randint(key, (config.batch,), 0, len(labels))
        logits = self.shop.word_logits(params, task, words[at])
        return jnp.mean(losses.cross_entropy(logits, labels[at]))

      return training.fit(
        key,
        params,
        loss_fn,
        steps=config.steps,
        learning_rate=config.learning_rate,
      )

    return run

  def tune(self, name: str, task: int, *, bad: bool = False) -> Any:
    """Fine-tunes the base on a task, with the trigger where it is bad."""
    config, read = self.config, self.problem.lessons[task].train
    if bad:
      read = poisoned(
        np.random.default_rng((config.seed, task)),
        read,
        self.problem.trigger,
        target=config.target,
        rate=config.rate,
      )
    key = uploads.model_key(config.seed, name)
    return self._tuner(key, self.problem.base, *read, jnp.int32(task))

  @functools.cached_property
  def clean(self) -> list[Any]:
    """The clean expert of each task."""
    return [
      self.stored(f'clean_{n}', functools.partial(self.tune, f'clean_{n}', t))
      for t, n in enumerate(self.names)
    ]

  @functools.cached_property
  def experts(self) -> list[Any]:
    """What is merged: the expert of each task, one of them bad."""
    name, task = f'bad_{self.names[self.attacked]}', self.attacked
    bad = self.stored(name, lambda: self.tune(name, task, bad=True))
    return [bad if t == task else x for t, x in enumerate(self.clean)]

  @functools.cached_property
  def data(self) -> pipeline.Unlabelled:
    """Dev texts of all tasks, and what each expert says of its own."""
    size = min(len(x.dev.labels) for x in self.problem.lessons)
    size = min(size, self.config.dev)
    words = jnp.stack([x.dev.words[:size] for x in self.problem.lessons])

    @jax.jit
    def ask(params, task, words):
      return jax.nn.softmax(self.shop.word_logits(params, task, words))

    said = [
      jnp.concatenate(
        [
          ask(own, jnp.int32(t), words[t, i : i + 50])
          for i in range(0, size, 50)
        ]
      )
      for t, own in enumerate(self.experts)
    ]
    return pipeline.Unlabelled(words, jnp.stack(said))

  def _merger(self, name: str) -> dj.Merger:
    config, shop = self.config, self.shop
    if name == 'adamerging':
      return dj.adamerging(
        shop.logits,
        init=config.scale,
        steps=config.adamerging_steps,
        preprocess_fn=shop.vectors.preprocess,
      )
    return dj.dam_robust(
      shop.logits,
      image_shape=(config.length, 1, shop.vectors.table.shape[1] + 1),
      task_logits_fn=shop.task_logits,
      init=config.scale,
      restarts=config.restarts,
      warmup_ascents=config.warmup_ascents,
      safety_weight=config.safety_weight,
      steps=config.dam_steps,
      preprocess_fn=shop.vectors.preprocess,
    )

  def merge(self, name: str, experts: Sequence[Any]) -> Any:
    """Merges experts by a method of `METHODS`."""
    base, stacked = self.problem.base, jax.jit(dj.tree.stack)(experts)
    plain = {
      'average': dj.average(),
      'task_arithmetic': dj.task_arithmetic(self.config.scale),
      'ties': dj.ties(scale=self.config.scale),
    }
    if name in plain:
      run = jax.jit(functools.partial(dj.merge, plain[name]))
      return run(base, stacked).params
    merger, batch = self._merger(name), self.config.merge_batch
    vectors = dj.tree.ravel(base), dj.tree.ravel(stacked, leading=1)
    program = learn.compile_steps(
      merger,
      *vectors,
      self.data,
      batch=batch,
      compiler_options={},
      saved=learn.saved_steps(self.workdir, name),
      batch_fn=self.shop.batch,
    )
    return learn.learn(
      name,
      merger,
      program,
      *vectors,
      self.data,
      sizes=[self.data.images.shape[1]] * len(self.names),
      tasks=self.names,
      batch=batch,
      seed=self.config.seed,
      folder=self.workdir,
    ).params

  def model(self, name: str) -> list[Any]:
    """Returns what classifies each task, for a method or control."""
    single = {'single': self.experts, 'base': [self.problem.base]}
    if name in single:
      return [
        single[name][t % len(single[name])] for t in range(len(self.names))
      ]
    method, experts = name, self.experts
    if name == 'clean_merge':
      method, experts = 'task_arithmetic', self.clean
    params = self.stored(name, lambda: self.merge(method, experts))
    return [params] * len(self.names)

  def measure(self, name: str) -> list[dict[str, Any]]:
    """Returns a report's rows of a method or control, from disk if there."""
    path = self.workdir / 'results' / f'{name}.json'
    if path.exists():
      return json.loads(path.read_text())
    models, rates = self.model(name), {}
    for t, lesson in enumerate(self.problem.lessons):
      words, labels = (x[: self.config.test or None] for x in lesson.test)
      said = self._predict(models[t], t, words)
      rates['acc', lesson.name] = evaluate.accuracy(said, labels)
      if t == self.attacked:
        rng = np.random.default_rng((self.config.seed, 1))
        words = text_lib.insert_word(rng, words, self.problem.trigger)
        said = self._predict(models[t], t, words)
        target = self.config.target
        rates['asr', lesson.name] = evaluate.attack_success(
          said, labels, target
        )
    accuracies = [r for (metric, _), r in rates.items() if metric == 'acc']
    rates['acc', 'mean'] = evaluate.mean(accuracies)
    rows = [
      {'method': name, 'metric': metric, 'task': task, **rate._asdict()}
      for (metric, task), rate in rates.items()
    ]
    checkpoint.write(path, json.dumps(rows, indent=2))
    return rows


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what may not change between two starts of a run."""
  return {key: x for key, x in config.items() if key != 'methods'}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
  """Makes the table for a terminal, in per cent with half intervals."""
  cells: dict[str, dict[tuple[str, str], str]] = {}
  for r in rows:
    half = max(r['value'] - r['low'], r['high'] - r['value'])
    text = f'{100 * r["value"]:.1f}[dim] ±{100 * half:.1f}[/dim]'
    cells.setdefault(r['method'], {})[r['metric'], r['task']] = text
  heads = list(dict.fromkeys((r['metric'], r['task']) for r in rows))
  heads.sort(key=lambda head: head[0])
  out = Table(box=box.SIMPLE_HEAD)
  out.add_column('method', no_wrap=True)
  for metric, task in heads:
    out.add_column(f'{metric.upper()}\n{task}', justify='right', no_wrap=True)
  for name, found in cells.items():
    label = f'[italic]{CONTROLS[name]}[/italic]' if name in CONTROLS else name
    out.add_row(label, *(found[head] for head in heads))
  return out


def run_on(
  problem: Problem,
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  console: Console,
) -> dict[str, Any]:
  """Makes experts, merges and counts.

  Args:
    problem: what is merged.
    config: see `KEYS`.
    workdir: where to write, and to go on.
    console: to say on what is being done.

  Returns:
    What report.json holds.

  Raises:
    ValueError: before any training, where the config makes no sense.
    FloatingPointError: where a loss is not finite.
  """
  this, rows, seconds = Run(config, problem, workdir), [], {}
  for name in [*settings.split(config.methods), *CONTROLS]:
    begin = time.perf_counter()
    with console.status(name):
      rows += this.measure(name)
    seconds[name] = time.perf_counter() - begin
  report = {
    'rows': rows,
    'record': {
      'config': config.to_dict(),
      'tasks': {x.name: list(x.label_names) for x in problem.lessons},
      'seconds': seconds,
      'versions': checkpoint.versions(),
    },
  }
  checkpoint.write(workdir / 'report.json', json.dumps(report, indent=2))
  console.print(table(rows))
  console.print(f'report: {workdir / "report.json"}')
  return report


def run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Does `run_on` with MiniLM and the texts that pip brings.

  Args:
    config: see `KEYS`.
    workdir: where to write, and to go on.
    console: to say on what is being done.

  Returns:
    What report.json holds.

  Raises:
    ValueError: before any training, where the config makes no sense or a
      package is missing.
    FloatingPointError: where a loss is not finite.
  """
  check(config, {n: len(c) for n, c in text_lib.LABEL_NAMES.items()})
  return run_on(load_problem(config), config, workdir, console)


if __name__ == '__main__':
  command.start(run, 'configs/text.py')
