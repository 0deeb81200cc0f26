"""CLIP's tokenizer, from the files that lie beside a model's weights.

The package `tokenizers` does the work; transformers' `CLIPTokenizer` gives the
same numbers (`python -m benchmarks.clip_parity` compares them).
"""

from collections.abc import Mapping, Sequence
import functools
import hashlib
import pathlib
from typing import Any

from etils import epath
import numpy as np
import tokenizers

from dam_jax.checkpoint.headers import read_json

_START, _END = '<|startoftext|>', '<|endoftext|>'
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+'
)


class Tokenizer:
  """Makes numbers of texts, all rows of one length.

  Attributes:
    length: of each row, with its start and end.
    end: number of the token that ends a text.
    pad: number of the token that fills a row.
  """

  def __init__(self, folder: epath.PathLike, *, length: int = 77):
    """Reads the files of a folder.

    Args:
      folder: that has tokenizer.json, or vocab.json and merges.txt; and maybe
        tokenizer_config.json or special_tokens_map.json, which may name the
        token that fills a row: the one that ends a text unless they do.
      length: of each row.

    Raises:
      ValueError: where files are missing, cannot be read, or do not put a start
        and an end around a text.
    """
    self.length = length
    folder = pathlib.Path(folder)
    self._tokenizer = _read(folder)
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    around = self._tokenizer.encode('').ids
    if len(around) != 2 or length < 2:
      raise ValueError(
        f'{folder}: a text wants a start and an end within {length} tokens, '
        f'an empty one becomes {around}'
      )
    self.end = around[1]
    pad = _pad(folder)
    number = self.end if pad is None else self._tokenizer.token_to_id(pad)
    if number is None:
      raise ValueError(f'{folder}: no token {pad!r}, which is to fill rows')
    self.pad = number

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all that numbers depend on, in hexadecimal."""
    text = f'{self.length} {self.pad} {self._tokenizer.to_str()}'
    return hashlib.sha256(text.encode()).hexdigest()

  def __call__(
    self, texts: Sequence[str], *, truncate: bool = False
  ) -> np.ndarray:
    """Returns the tokens of texts.

    Args:
      texts: as they are; case and spaces do not matter.
      truncate: whether to cut texts that are too long and keep their end token.

    Returns:
      int32 `[N, length]`.

    Raises:
      ValueError: where texts are too long and not to be cut (all of them).
    """
    found = [x.ids for x in self._tokenizer.encode_batch([*texts])]
    long = [
      f'{text!r:.70}: {len(ids)} tokens'
      for text, ids in zip(texts, found, strict=True)
      if len(ids) > self.length
    ]
    if long and not truncate:
      head = f'texts of more than {self.length} tokens, pass truncate=True:'
      raise ValueError('\n  '.join([head, *long]))
    rows = np.full((len(found), self.length), self.pad, np.int32)
    for row, ids in zip(rows, found, strict=True):
      if len(ids) > self.length:
        ids = [*ids[: self.length - 1], self.end]
      row[: len(ids)] = ids
    return rows


def _read(folder: pathlib.Path) -> tokenizers.Tokenizer:
  whole = folder / 'tokenizer.json'
  vocab, merges = folder / 'vocab.json', folder / 'merges.txt'
  if whole.exists():
    files, read = [whole], lambda: tokenizers.Tokenizer.from_file(str(whole))
  elif vocab.exists() and merges.exists():
    files, read = [vocab, merges], lambda: _of_merges(vocab, merges)
  else:
    raise ValueError(
      f'{folder}: no tokenizer: want tokenizer.json, or vocab.json and '
      'merges.txt'
    )
  try:
    return read()
  except Exception as e:  # the package raises no other
    names = ', '.join(path.name for path in files)
    raise ValueError(f'{folder}: {names}: no readable tokenizer: {e}') from e


def _of_merges(
  vocab: pathlib.Path, merges: pathlib.Path
) -> tokenizers.Tokenizer:
  """Builds what transformers builds of these files."""
  bpe = tokenizers.models.BPE.from_file(
    *(str(vocab), str(merges)),
    continuing_subword_prefix='',
    end_of_word_suffix='</w>',
    fuse_unk=False,
    unk_token=_END,
  )
  found = tokenizers.Tokenizer(bpe)
  found.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.NFC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      tokenizers.normalizers.Lowercase(),
    ]
  )
  found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(_WORDS), behavior='removed', invert=True
      ),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  found.add_special_tokens([_START, _END])
  numbers = found.get_vocab()
  found.post_processor = tokenizers.processors.RobertaProcessing(
    *((_END, numbers[_END]), (_START, numbers[_START])),
    trim_offsets=False,
    add_prefix_space=False,
  )
  return found


def _pad(folder: pathlib.Path) -> str | None:
  """Returns the token that fills rows, where a file names one."""
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    path = folder / name
    found: Any = read_json(path).get('pad_token') if path.exists() else None
    if isinstance(found, Mapping):
      found = found.get('content')
    if isinstance(found, str):
      return found
  return None
