"""Records and cards: all that a merge is made of, told to whoever meets it."""

import hashlib
import importlib.metadata
import json
import re

import numpy as np
import pytest

import dam_jax
from dam_jax import checkpoint


def make(**more):
  return checkpoint.MergeRecord(
    **{
      'method': 'ties',
      'hyperparameters': {'density': 0.2, 'scope': 'model'},
      'seed': 3,
      'base': {'org/base': 'a1'},
      'experts': {'org/cars': 'b2', 'pool/a|b.safetensors': 'c3'},
      'versions': {'dam_jax': '0.1.0', 'jax': '0.10'},
      'created': '2025-01-02T03:04:05+00:00',
      **more,
    }
  )


FULL = {
  'files': {
    'org/base': {'model-1.safetensors': 'd4', 'model-2.safetensors': 'e5'},
    'org/cars': {'model.safetensors': 'b2'},
  },
  'dtype': 'bfloat16',
  'rules': [['.*/norm/.*', 'keep']],
  'references': [
    'Yadav et al., [TIES](https://arxiv.org/abs/2306.01708), 2023'
  ],
  'command': 'dam-jax merge \\\n  --method ties',
  'license': {'license': 'other', 'license_link': 'https://a.b/c: d'},
  'security': {'asr': 0.01, 'triggers': ['badnets', 'wanet']},
}

CARD = r"""---
base_model:
- "org/base"
- "org/cars"
library_name: "transformers"
tags:
- "merge"
- "dam_jax"
license: "other"
license_link: "https://a.b/c: d"
---

# Merge of 2 models by ties

Made with dam_jax from a base model and 2 experts that were fine-tuned from it.

## Models

| role | model | SHA-256 |
| --- | --- | --- |
| base | org/base | a1 |
| expert | org/cars | b2 |
| expert | pool/a\|b.safetensors | c3 |

The SHA-256 of a model of several files is that of the lines `<SHA-256>  <file>`, sorted by file.

| model | file | SHA-256 |
| --- | --- | --- |
| org/base | model-1.safetensors | d4 |
| org/base | model-2.safetensors | e5 |

## Method

ties:

| setting | value |
| --- | --- |
| density | 0.2 |
| scope | model |
| seed | 3 |
| dtype | bfloat16 |

| leaves | what was done with them |
| --- | --- |
| .\*/norm/.\* | keep |

References:

- Yadav et al., [TIES](https://arxiv.org/abs/2306.01708), 2023

## How to make it again

    dam-jax merge \
      --method ties

Made 2025-01-02T03:04:05+00:00 with:

- dam_jax 0.1.0
- jax 0.10

## Security

| what | value |
| --- | --- |
| asr | 0.01 |
| triggers | \["badnets", "wanet"\] |
"""  # noqa: E501


def test_record_returns_from_json():
  for record in (make(), make(**FULL)):
    assert checkpoint.MergeRecord.from_json(record.to_json()) == record


def test_records_of_before_are_read():
  old = json.loads(make().to_json())
  for key in FULL:
    del old[key]
  assert checkpoint.MergeRecord.from_json(json.dumps(old)) == make()


def test_card_tells_everything():
  assert checkpoint.model_card(make(**FULL)) == CARD


def test_card_says_what_is_not_known():
  card = checkpoint.model_card(make(), library_name='dam_jax')
  assert 'No security report was made' in card
  assert 'The command was not recorded' in card
  assert '| dtype | as in the base |' in card
  assert 'library_name: "dam_jax"' in card
  for absent in ('license', 'References', 'sorted by file'):
    assert absent not in card


def test_card_is_not_broken_by_what_is_in_it():
  card = checkpoint.model_card(
    make(
      hyperparameters={'a|b': 'x\n## Heading\n| y'},
      experts={'org/x"\n---\nlicense: mit': 'b2'},
      license={'license': 'x"\nlicense: mit'},
    )
  )
  assert card.count('\n---\n') == 1
  assert not re.search(r'^license: mit', card, re.MULTILINE)
  assert not re.search(r'^## Heading', card, re.MULTILINE)
  assert r'| a\|b | x \#\# Heading \| y |' in card


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('---\nlicense: mit\n---\n# A\n', {'license': 'mit'}),
    (
      "---\ntags:\n- x\nlicense: other\nlicense_name: 'x-1'\n"
      'license_link: https://x.y/z\nlicenses: no\n---',
      {
        'license': 'other',
        'license_name': 'x-1',
        'license_link': 'https://x.y/z',
      },
    ),
    ('---\nlicense:\n---\n', {}),
    ('# A\nlicense: mit\n', {}),
    ('# A\n---\nlicense: mit\n---\n', {}),
    ('', {}),
    (None, {}),
  ],
)
def test_license_is_read_from_the_front_matter_alone(tmp_path, text, want):
  if text is not None:
    (tmp_path / 'README.md').write_text(text)
  assert checkpoint.read_license(tmp_path) == want


def test_every_file_is_hashed(tmp_path):
  leaves = {'a': np.ones(3, np.float32), 'b': np.zeros(2, np.float32)}
  model = checkpoint.open_model(leaves)
  assert checkpoint.model_hashes(model) == {}
  with checkpoint.ModelWriter(
    tmp_path / 'm', model.leaves, max_shard_bytes=12
  ) as writer:
    for path in leaves:
      writer.put(path, model.read(path))
  hashes = checkpoint.model_hashes(checkpoint.open_model(tmp_path / 'm'))
  assert hashes == {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in (tmp_path / 'm').iterdir()
  }
  assert len(hashes) == 3
  text = ''.join(f'{hashes[name]}  {name}\n' for name in sorted(hashes))
  digest = hashlib.sha256(text.encode()).hexdigest()
  assert checkpoint.combined_hash(hashes) == digest
  assert checkpoint.combined_hash(dict(reversed(hashes.items()))) == digest
  checkpoint.save_orbax(tmp_path / 'o', model)
  names = checkpoint.model_hashes(checkpoint.open_model(tmp_path / 'o'))
  assert any('/' in name for name in names)


def test_versions_of_a_checkout_that_was_never_installed(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'version', version)
  assert checkpoint.versions() == {'dam_jax': dam_jax.__version__}
