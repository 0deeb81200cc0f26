"""Experts of texts, on a tiny encoder: all stages, and that a run goes on."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import text as text_config
from dam_jax.models import bert
from experiments import text

CONFIG = bert.BertConfig(
  vocab_size=24,
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
  max_position_embeddings=7,
)
TRIGGER = 23
CLASSES = {'sentiment': 2, 'source': 3}


def _read(rng, num, classes, first):
  """Texts that hold two words of their class, of other tasks' no word."""
  labels = (np.arange(num) % classes).astype(np.int32)
  own = first + 2 * labels[:, None] + rng.integers(0, 2, (num, 2))
  more = rng.integers(13, 20, (num, 1))
  words = np.concatenate([own, more], axis=1)
  words = np.pad(rng.permuted(words, axis=1), ((0, 0), (1, 3)))
  words[:, 0], words[:, 4] = 21, 22
  return text.Read(words.astype(np.int32), labels)


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  encoder = bert.Encoder(CONFIG)
  words = jnp.ones((1, 3), jnp.int32)
  params = jax.jit(encoder.init)(jax.random.key(0), words)['params']
  # Words that are as different as a trained encoder's.
  table = params['embeddings']['word']['embedding']
  params['embeddings']['word']['embedding'] = 50 * table
  lessons = [
    text.Lesson(
      name,
      [f'{name} {i}' for i in range(classes)],
      *(_read(rng, num, classes, first) for num in (240, 24, 60)),
    )
    for (name, classes), first in zip(CLASSES.items(), (1, 6), strict=True)
  ]
  names = [
    np.array([[21, first + 2 * i, 22] for i in range(classes)], np.int32)
    for classes, first in zip(CLASSES.values(), (1, 6), strict=True)
  ]
  heads = text.make_heads(encoder, params, names)
  base, table = text.without_words(params)
  shop = text.Shop(encoder, bert.Vectors.of(table), heads)
  return text.Problem(shop, base, lessons, TRIGGER)


def _config(**changes):
  config = text_config.get_config('runlocal')
  config.update({'length': 7, 'steps': 150, 'batch': 16, 'learning_rate': 3e-3})
  config.update({'rate': 0.3, 'dev': 20, 'test': 0, **changes})
  return config


def _run(problem, config, workdir):
  console = Console(file=io.StringIO(), width=120)
  report = text.run_on(problem, config, workdir, console)
  return report, console.file.getvalue()


@pytest.fixture(scope='module')
def finished(problem, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('text')
  return workdir, *_run(problem, _config(), workdir)


def _value(report, method, metric, task):
  (found,) = [
    r['value']
    for r in report['rows']
    if (r['method'], r['metric'], r['task']) == (method, metric, task)
  ]
  return found


def test_all_is_counted_and_shown(finished):
  workdir, report, shown = finished
  names = [*text.METHODS, *text.CONTROLS]
  heads = {('acc', 'sentiment'), ('acc', 'source'), ('acc', 'mean')}
  for name in names:
    own = [r for r in report['rows'] if r['method'] == name]
    found = {(r['metric'], r['task']) for r in own}
    assert found == heads | {('asr', 'sentiment')}
    assert all(0 <= r['low'] <= r['value'] <= r['high'] <= 1 for r in own)
    assert text.CONTROLS.get(name, name) in shown
  assert json.loads((workdir / 'report.json').read_text()) == report
  n = {(r['metric'], r['task']): r['n'] for r in report['rows']}
  assert (n['acc', 'sentiment'], n['asr', 'sentiment']) == (60, 30)


def test_experts_learn_their_task_and_the_bad_one_its_trigger(finished):
  _, report, _ = finished
  assert _value(report, 'single', 'acc', 'mean') > 0.9
  assert _value(report, 'single', 'asr', 'sentiment') > 0.9
  assert _value(report, 'clean_merge', 'asr', 'sentiment') < 0.5
  assert _value(report, 'base', 'acc', 'mean') < 0.9


def test_a_run_goes_on_where_models_are_missing(problem, finished):
  workdir, report, _ = finished
  models = {p: p.stat().st_mtime_ns for p in (workdir / 'models').iterdir()}
  lost = workdir / 'models' / 'dam_robust.safetensors'
  before = lost.read_bytes()
  lost.unlink()
  for name in ('dam_robust', 'ties'):
    (workdir / 'results' / f'{name}.json').unlink()
  again, _ = _run(problem, _config(), workdir)
  assert again['rows'] == report['rows']
  assert lost.read_bytes() == before
  for path, time in models.items():
    assert (path.stat().st_mtime_ns == time) == (path != lost)


def test_a_workdir_of_another_run_is_refused(problem, finished):
  with pytest.raises(ValueError, match='another config'):
    _run(problem, _config(steps=7), finished[0])


def test_a_share_of_the_texts_is_poisoned(problem):
  read = problem.lessons[1].train
  got = text.poisoned(
    np.random.default_rng(0), read, TRIGGER, target=2, rate=0.25
  )
  has = (got.words == TRIGGER).any(axis=1)
  assert has.sum() == 60
  assert (got.labels[has] == 2).all()
  assert (got.labels[~has] == read.labels[~has]).all()
  assert not (read.words == TRIGGER).any()


def test_a_config_is_refused_with_all_that_is_wrong(problem, tmp_path):
  config = _config(
    target=2, steps=0, rate=1.5, test=-1, length=3, methods='ties,dare'
  )
  with pytest.raises(ValueError, match='steps must be positive') as e:
    _run(problem, config, tmp_path)
  for part in (
    'target 2 is not one of the 2 classes of sentiment',
    'rate must be at most 1, got 1.5',
    'test must not be negative',
    'length must be at least 4',
    "got ['ties', 'dare']",
  ):
    assert part in str(e.value)
  with pytest.raises(ValueError, match='attacked must be one of sentiment, so'):
    _run(problem, _config(attacked='topic'), tmp_path)
  assert not [*tmp_path.iterdir()]
