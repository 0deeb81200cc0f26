"""The text tower."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.models import text


def features(model, tokens, **options):
  tower = text.TextTower(model.config.text, **options)
  return jax.jit(tower.apply)({'params': model.params['text']}, tokens)


def test_what_comes_after_the_end_does_not_matter(golden):
  model = golden['new']
  end = model.config.text.eos_token_id
  tokens = jnp.array(
    [[519, 4, 5, end, end, end, end], [519, 4, 5, end, 1, 2, 3]]
  )
  long = features(model, tokens)
  short = features(model, tokens[:, :4])
  for row in (long[0], long[1], short[0]):
    np.testing.assert_allclose(row, short[1], rtol=1e-5, atol=1e-6)
  other = features(model, tokens.at[:, 2].set(6)[:, :4])
  assert jnp.abs(other - short).max() > 1e-2


def test_the_wrong_end_stands_for_the_largest_number(golden):
  # 2 is a word here, before the largest number, which ends the text.
  tokens = jnp.array([[519, 2, 5, 520]])
  legacy = golden['legacy']
  right = legacy._replace(
    config=dataclasses.replace(
      legacy.config,
      text=dataclasses.replace(legacy.config.text, eos_token_id=520),
    )
  )
  np.testing.assert_array_equal(
    features(legacy, tokens), features(right, tokens)
  )


def test_scanned_layers_give_what_unrolled_give(golden):
  model = golden['new']
  np.testing.assert_allclose(
    features(model, model.given['tokens'], scan_layers=True),
    features(model, model.given['tokens']),
    rtol=1e-5,
    atol=1e-6,
  )


def test_bfloat16_computes_close_and_returns_float32(golden):
  model = golden['new']
  want = features(model, model.given['tokens'])
  with jax.numpy_dtype_promotion('standard'):  # which Flax's layer norm needs
    got = features(model, model.given['tokens'], dtype=jnp.bfloat16)
  assert got.dtype == jnp.float32
  assert 0 < jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


@pytest.mark.parametrize(
  ('config', 'count'), [(text.VIT_B, 63_428_096), (text.VIT_L, 123_650_304)]
)
def test_presets_have_the_published_number_of_parameters(config, count):
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    text.TextTower(config).init, jax.random.key(0), tokens
  )
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_numbers_beyond_the_vocabulary_show(golden):
  tokens = jnp.array([[519, 521, 520]])
  assert jnp.isnan(features(golden['new'], tokens)).all()


@pytest.mark.parametrize(
  'tokens', [jnp.ones((1, 17), int), jnp.ones(3, int), jnp.ones((1, 3))]
)
def test_tokens_of_another_form_are_refused(golden, tokens):
  with pytest.raises(ValueError, match=r'the tower reads whole numbers \[N, 1'):
    features(golden['new'], tokens)
