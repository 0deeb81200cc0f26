"""Zero-shot heads: the mean over templates, and heads that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.models import clip
from dam_jax.models import text
from dam_jax.models import zero_shot

NAMES = ('cat', 'dog', 'photo')
TEMPLATES = ('a {}.', 'see {c}', 'of the {}')


class Counting:
  """A tokenizer that says what it was given."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self.digest, self.end = tokenizer.digest, tokenizer.end
    self.asked = []

  def __call__(self, texts, *, truncate):
    self.asked.append(list(texts))
    return self._tokenizer(texts, truncate=truncate)


@pytest.fixture
def make(golden, tokenizer):
  """Returns a function that makes a head, and its tokenizer."""
  model, counting = golden['new'], Counting(tokenizer)

  def make(**options):
    options = {'names': NAMES, 'templates': TEMPLATES, **options}
    return zero_shot.zero_shot_head(
      text.TextTower(model.config.text, dtype=options.pop('dtype', None)),
      options.pop('params', model.params['text']),
      tokenizer=counting,
      **options,
    )

  return make, counting


@pytest.mark.parametrize('batch', [2, 100])
def test_columns_are_means_of_unit_features(golden, make, batch):
  make, counting = make
  head = make(batch=batch)
  assert head.shape == (6, 3)
  assert head.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(head, axis=0), 1, rtol=1e-5)
  model = golden['new']
  apply = jax.jit(text.TextTower(model.config.text).apply)
  for name, column in zip(NAMES, head.T, strict=True):
    texts = [f'a {name}.', f'see {name}', f'of the {name}']
    features = apply(
      {'params': model.params['text']}, counting(texts, truncate=False)
    )
    mean = np.mean(clip.unit(features), axis=0)
    want = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(column, want, rtol=1e-4, atol=1e-5)
  assert clip.stack_heads([head, head]).weights.shape == (2, 6, 3)


def test_a_kept_head_is_taken_only_where_all_is_the_same(
  golden, make, tmp_path
):
  make, counting = make
  first = make(cache=tmp_path)
  np.testing.assert_array_equal(first, make(cache=tmp_path, batch=2))
  assert len(counting.asked) == 1
  params = golden['new'].params['text']
  moved = {
    **params,
    'text_projection': {'kernel': 2 * params['text_projection']['kernel']},
  }
  for changed in (
    {'names': NAMES[::-1]},
    {'templates': TEMPLATES[:2]},
    {'params': moved},
    {'truncate': True},
  ):
    make(cache=tmp_path, **changed)
  counting.digest = 'another'
  make(cache=tmp_path)
  assert len(counting.asked) == 6
  assert len(list(tmp_path.iterdir())) == 6  # and nothing half written


def test_what_was_kept_is_taken(make, tmp_path):
  make, counting = make
  head = make(cache=tmp_path)
  [path] = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match='not a readable safetensors'):
    make(cache=tmp_path)
  path.unlink()
  np.testing.assert_array_equal(head, make(cache=tmp_path))
  assert len(counting.asked) == 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'names': []}, r'names: want a list with at least one, got \[\]'),
    ({'names': 'cat'}, "names: want a list with at least one, got 'cat'"),
    ({'names': ['a', 'b', 'a']}, "names given twice: 'a'"),
    ({'templates': ['a cat', '{}']}, "template 'a cat' has no {} for the name"),
    ({'batch': 0}, 'batch must be positive, got 0'),
    ({'names': ['photo ' * 20]}, 'texts of more than 16 tokens'),
  ],
)
def test_bad_input_is_named(make, options, message):
  with pytest.raises(ValueError, match=message):
    make[0](**options)


def test_digest_knows_names_shapes_dtypes_and_values():
  one = {'a': np.ones(4, np.float32), 'b': np.zeros(2, np.float32)}
  digests = {
    zero_shot.digest(x)
    for x in (
      one,
      {'a': one['a'], 'c': one['b']},
      {**one, 'a': np.ones((2, 2), np.float32)},
      {**one, 'a': np.ones(4, np.float16)},
      {**one, 'b': np.array([0, 1], np.float32)},
    )
  }
  assert len(digests) == 5
  assert (
    zero_shot.digest({k: jnp.asarray(x) for k, x in one.items()}) in digests
  )
