"""Zero-shot heads: a class is where a text tower puts sentences about it.

The mean over templates is that of OpenAI's notebook "Prompt engineering for
ImageNet": features of each sentence are made unit vectors, averaged over the
templates, and made unit vectors again.

References:
  Radford et al., `Learning Transferable Visual Models From Natural Language
  Supervision <https://arxiv.org/abs/2103.00020>`_, 2021, section 3.1.4
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any, Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import checkpoint
from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models.text import TextTower
from dam_jax.typing import Params

PHOTO = ('a photo of a {}.',)
"""The one template that fits most photographs."""

# In the key of what is kept: another one where the computation changes.
_FORM = 'zero-shot head 1'
# Rows are cut to a multiple of it, so that few programs are compiled.
_STEP = 8


class TokenizeFn(Protocol):
  """What heads need of `dam_jax.models.tokens.Tokenizer`."""

  @property
  def digest(self) -> str:
    """Hash of all that its numbers depend on."""
    ...

  @property
  def end(self) -> int:
    """Number of the token that ends a text."""
    ...

  def __call__(self, texts: Sequence[str], *, truncate: bool) -> np.ndarray:
    """Returns int32 `[N, length]`."""
    ...


def zero_shot_head(
  tower: TextTower,
  params: Params,
  *,
  tokenizer: TokenizeFn,
  names: Sequence[str],
  templates: Sequence[str] = PHOTO,
  truncate: bool = False,
  batch: int = 256,
  cache: epath.PathLike | None = None,
) -> np.ndarray:
  r"""Makes a head of class names and templates.

  With the unit features :math:`u_{lt}` of class `l` in template `t`, column `l`
  is :math:`\sum_t u_{lt} / \lVert \sum_t u_{lt} \rVert`.

  Args:
    tower: that computes features of texts.
    params: of it, `params['text']` of a whole CLIP.
    tokenizer: of texts.
    names: of the classes, in their order.
    templates: sentences with `{}` or `{c}` where the name goes.
    truncate: whether to cut sentences that are too long.
    batch: sentences at a time.
    cache: folder to keep heads in, and to take them from where weights,
      tokenizer, names, templates and dtype are the same.

  Returns:
    float32 `[D, L]`, unit columns, for `dam_jax.models.clip.stack_heads`.

  Raises:
    ValueError: where there are no names or templates, names are given twice, a
      template has no place for one, or sentences are too long.
  """
  _check(names, templates, batch)
  path, text = None, ''
  if cache is not None:
    about = {
      'form': _FORM,
      'config': dataclasses.asdict(tower.config),
      'dtype': None if tower.dtype is None else jnp.dtype(tower.dtype).name,
      'weights': digest(params),
      'tokenizer': tokenizer.digest,
      'names': list(names),
      'templates': list(templates),
      'truncate': truncate,
    }
    text = json.dumps(about, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = pathlib.Path(cache) / f'head_{key}.safetensors'
    if path.exists():
      kept: Any = checkpoint.load_params(path)
      return kept['head']
  texts = [fill(template, name) for name in names for template in templates]
  tokens = tokenizer(texts, truncate=truncate)
  features = _features(tower, params, _cut(tokens, tokenizer.end), batch)
  mean = features.reshape(len(names), len(templates), -1).mean(axis=1)
  head = np.ascontiguousarray(mean.T / np.linalg.norm(mean, axis=1))
  if path is not None:
    metadata = {'about': text}
    checkpoint.save_params(path, {'head': head}, metadata=metadata)
  return head


def fill(template: str, name: str) -> str:
  """Puts a name into a template.

  Args:
    template: with `{}` or `{c}`.
    name: of a class.

  Examples:
    >>> fill('a photo of a {}.', 'cat')
    'a photo of a cat.'
  """
  return template.replace('{}', name).replace('{c}', name)


def digest(params: Params) -> str:
  """Returns the SHA-256 of all parameters, their names, shapes and dtypes."""
  found = hashlib.sha256()
  for path, x in sorted(tree.flatten(params).items()):
    array = np.asarray(x, order='C')
    found.update(f'{path} {array.dtype} {array.shape}\n'.encode())
    entries: Any = array.reshape(-1).view(np.uint8)
    found.update(entries)
  return found.hexdigest()


def _check(names, templates, batch) -> None:
  lines = []
  for what, given in (('names', names), ('templates', templates)):
    if isinstance(given, str) or not len(given):
      lines.append(f'{what}: want a list with at least one, got {given!r}')
    elif len(set(given)) != len(given):
      twice = dict.fromkeys(x for x in given if [*given].count(x) > 1)
      lines.append(f'{what} given twice: {", ".join(map(repr, twice))}')
  if not isinstance(templates, str):
    lines += [
      f'template {x!r} has no {{}} for the name'
      for x in templates
      if '{}' not in x and '{c}' not in x
    ]
  if batch < 1:
    lines.append(f'batch must be positive, got {batch}')
  if lines:
    raise ValueError('\n  '.join(['a zero-shot head:', *lines]))


def _cut(tokens: np.ndarray, end: int) -> np.ndarray:
  """Leaves out columns behind the last end of any text, which do nothing."""
  longest = int((tokens == end).argmax(axis=1).max()) + 1
  return tokens[:, : -(-longest // _STEP) * _STEP]


@functools.partial(jax.jit, static_argnums=0)
def _unit_features(tower: TextTower, params: Any, tokens: Any) -> jax.Array:
  features: Any = tower.apply({'params': params}, tokens)
  return clip.unit(features)


def _features(
  tower: TextTower, params: Params, tokens: np.ndarray, batch: int
) -> np.ndarray:
  """Computes unit features `[N, D]` of tokens `[N, L]`, float32."""
  # Every batch is of one size, so that one program does for all.
  batch = min(batch, len(tokens))
  padded = np.pad(tokens, ((0, -len(tokens) % batch), (0, 0)), mode='edge')
  params = jax.device_put(params)
  found = [
    np.asarray(_unit_features(tower, params, padded[i : i + batch]), np.float32)
    for i in range(0, len(padded), batch)
  ]
  return np.concatenate(found)[: len(tokens)]
