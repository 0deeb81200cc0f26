"""Model cards: what a merged model is made of, for those who meet it."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from etils import epath

from dam_jax.checkpoint.record import MergeRecord

_LICENSE_KEYS = ('license', 'license_name', 'license_link')
_HUB_NAME = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
_NO_REPORT = (
  'No security report was made: this model has not been tested for backdoors, '
  'and a backdoor in one of the experts can survive a merge.'
)


def read_license(folder: epath.PathLike) -> dict[str, str]:
  """Reads what the card in a model's folder says of its licence.

  Args:
    folder: of the model.

  Returns:
    `license`, `license_name` and `license_link` of README.md's front matter, as
    far as they are there.
  """
  card = pathlib.Path(folder) / 'README.md'
  if not card.exists():
    return {}
  front = re.match(
    r'---\s*\n(.*?)\n---\s*(\n|$)', card.read_text('utf-8'), re.DOTALL
  )
  found = {}
  for line in front[1].splitlines() if front else ():
    key, _, value = line.partition(':')
    if key in _LICENSE_KEYS and value.strip():
      found[key] = value.strip().strip('\'"')
  return found


def model_card(
  record: MergeRecord, *, library_name: str = 'transformers'
) -> str:
  """Writes the card of a merged model, README.md of its folder.

  Args:
    record: of the merge.
    library_name: of the library that reads the model.

  Returns:
    Markdown with the front matter that the Hugging Face hub reads: base model
    and experts (those of the form `owner/name`), library, tags, and the base's
    licence if it is known.

  Examples:
    >>> record = MergeRecord(method='average', hyperparameters={}, seed=0,
    ...                      base={'org/base': 'a1'}, experts={'cars': 'b2'})
    >>> print(model_card(record).split('---')[1])
    <BLANKLINE>
    base_model:
    - "org/base"
    library_name: "transformers"
    tags:
    - "merge"
    - "dam_jax"
    <BLANKLINE>
  """
  names = [*record.base, *record.experts]
  front = _front_matter(
    {
      'base_model': [n for n in names if _HUB_NAME.fullmatch(n)],
      'library_name': library_name,
      'tags': ['merge', 'dam_jax'],
      **record.license,
    }
  )
  count = len(record.experts)
  parts = [
    front,
    f'# Merge of {count} models by {_text(record.method)}',
    f'Made with dam_jax from a base model and {count} experts that were '
    'fine-tuned from it.',
    '## Models',
    _models(record),
    '## Method',
    _method(record),
    '## How to make it again',
    _reproduce(record),
    '## Security',
    _NO_REPORT
    if record.security is None
    else _table(('what', 'value'), record.security.items()),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _front_matter(values: Mapping[str, Any]) -> str:
  lines = ['---']
  for key, value in values.items():
    if isinstance(value, str):
      lines.append(f'{key}: {json.dumps(value)}')  # JSON's texts are YAML's
    elif value:
      lines += [f'{key}:', *(f'- {json.dumps(item)}' for item in value)]
  return '\n'.join([*lines, '---'])


def _text(value: Any) -> str:
  """Returns a value as one line of Markdown that nothing in it breaks."""
  text = value if isinstance(value, str) else json.dumps(value)
  text = re.sub(r'([\\`*_\[\]<>|#])', r'\\\1', text)
  return ' '.join(text.split())


def _table(head: Sequence[str], rows: Any) -> str:
  lines = [head, ['---'] * len(head), *([_text(x) for x in r] for r in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _models(record: MergeRecord) -> str:
  """Returns the tables of models and, where they have several, of files."""
  rows = [('base', *item) for item in record.base.items()]
  rows += [('expert', *item) for item in record.experts.items()]
  table = _table(('role', 'model', 'SHA-256'), rows)
  files = [
    (name, file, digest)
    for name, hashes in record.files.items()
    if len(hashes) > 1
    for file, digest in hashes.items()
  ]
  if not files:
    return table
  return (
    f'{table}\n\nThe SHA-256 of a model of several files is that of the lines '
    '`<SHA-256>  <file>`, sorted by file.\n\n'
    f'{_table(("model", "file", "SHA-256"), files)}'
  )


def _method(record: MergeRecord) -> str:
  rows = [
    *record.hyperparameters.items(),
    ('seed', record.seed),
    ('dtype', record.dtype or 'as in the base'),
  ]
  parts = [_text(record.method) + ':', _table(('setting', 'value'), rows)]
  if record.rules:
    parts.append(_table(('leaves', 'what was done with them'), record.rules))
  if record.references:
    references = '\n'.join(f'- {line}' for line in record.references)
    parts.append(f'References:\n\n{references}')
  return '\n\n'.join(parts)


def _reproduce(record: MergeRecord) -> str:
  if record.command is None:
    how = (
      'The command was not recorded; the merge depends on nothing but the '
      'models and the settings above.'
    )
  else:
    how = '\n'.join(f'    {line}' for line in record.command.splitlines())
  made = [f'- {name} {version}' for name, version in record.versions.items()]
  return '\n\n'.join([how, f'Made {record.created} with:', '\n'.join(made)])
