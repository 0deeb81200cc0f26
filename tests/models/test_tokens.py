"""The tokenizer: transformers' numbers, rows of one length, files refused."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from benchmarks import clip_problem as problem
from dam_jax.models import tokens

END = problem.VOCABULARY - 1


def test_numbers_are_those_of_transformers(archive, vocabulary):
  got = tokens.Tokenizer(vocabulary)(problem.TEXTS, truncate=True)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, archive['tokens'])
  assert got[-1, -1] == END  # of the text that was cut


def whole(vocabulary, folder, change=lambda raw: None):
  """Writes tokenizer.json of the same tokenizer."""
  raw = json.loads(tokens.Tokenizer(vocabulary)._tokenizer.to_str())
  change(raw)
  (folder / 'tokenizer.json').write_text(json.dumps(raw))
  return folder


def test_one_file_gives_the_same_whatever_it_cuts(
  archive, vocabulary, tmp_path
):
  whole(vocabulary, tmp_path)
  cutting = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  cutting.enable_truncation(5)
  cutting.enable_padding(length=5)
  cutting.save(str(tmp_path / 'tokenizer.json'))
  got = tokens.Tokenizer(tmp_path)(problem.TEXTS, truncate=True)
  np.testing.assert_array_equal(got, archive['tokens'])


def test_long_texts_are_refused_by_name(tokenizer):
  with pytest.raises(ValueError, match='more than 16 tokens') as error:
    tokenizer(['cat', 'photo ' * 15, 'dog ' * 14, 'dog ' * 20])
  assert str(error.value).count('\n') == 2
  assert "'dog dog dog" in str(error.value)


@pytest.mark.parametrize(
  ('name', 'content', 'pad'),
  [
    ('tokenizer_config.json', {'pad_token': '!'}, 0),
    ('special_tokens_map.json', {'pad_token': {'content': '"'}}, 1),
    ('special_tokens_map.json', {'bos_token': '<|startoftext|>'}, END),
  ],
)
def test_files_say_what_fills_rows(vocabulary, tmp_path, name, content, pad):
  folder = shutil.copytree(vocabulary, tmp_path / 'a')
  before = tokens.Tokenizer(folder)
  (folder / name).write_text(json.dumps(content))
  found = tokens.Tokenizer(folder)
  assert found(['cat'])[0, -1] == found.pad == pad
  assert (found.digest == before.digest) == (pad == END)


def test_digest_is_of_all_that_numbers_depend_on(vocabulary, tmp_path):
  one = tokens.Tokenizer(vocabulary)
  assert one.digest == tokens.Tokenizer(vocabulary).digest
  assert one.digest != tokens.Tokenizer(vocabulary, length=9).digest
  other = shutil.copytree(vocabulary, tmp_path / 'a')
  merges = (other / 'merges.txt').read_text()
  (other / 'merges.txt').write_text(merges.replace('ca t</w>\n', ''))
  assert one.digest != tokens.Tokenizer(other).digest


def test_what_is_no_tokenizer_is_refused(vocabulary, tmp_path):
  with pytest.raises(ValueError, match='no tokenizer: want tokenizer.json'):
    tokens.Tokenizer(tmp_path)
  with pytest.raises(ValueError, match='within 1 tokens'):
    tokens.Tokenizer(vocabulary, length=1)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match='tokenizer.json: no readable'):
    tokens.Tokenizer(tmp_path)
  whole(vocabulary, tmp_path, lambda raw: raw.update(post_processor=None))
  with pytest.raises(ValueError, match=r'an empty one becomes \[\]'):
    tokens.Tokenizer(tmp_path)
  whole(vocabulary, tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{"pad_token": "<pad>"}')
  with pytest.raises(ValueError, match="no token '<pad>', which is to fill"):
    tokens.Tokenizer(tmp_path)
