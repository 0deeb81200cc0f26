"""The encoder of texts against Hugging Face's, and texts as images."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dam_jax import checkpoint
from dam_jax import tree
from dam_jax.models import bert
from dam_jax.models import convert

CONFIG = bert.BertConfig(
  vocab_size=11,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=7,
)


@pytest.fixture(scope='module')
def golden():
  """Random weights, words and what `BertModel` of transformers 5.24 gives."""
  with np.load(Path(__file__).parent / 'bert.npz') as file:
    return dict(file)


@pytest.fixture(scope='module')
def params(golden, tmp_path_factory):
  path = tmp_path_factory.mktemp('bert') / 'model.safetensors'
  save_file({k: x for k, x in golden.items() if '.' in k}, path)
  words = jax.ShapeDtypeStruct((1, 3), jnp.int32)
  like = jax.eval_shape(bert.Encoder(CONFIG).init, jax.random.key(0), words)
  return checkpoint.load_params(
    path, name_map=convert.bert, like=like['params']
  )


def test_hidden_states_are_those_of_hugging_face(golden, params):
  words = jnp.asarray(golden['words'])
  hidden = jax.jit(bert.Encoder(CONFIG).apply)({'params': params}, words)
  there = golden['words'] != bert.PAD
  np.testing.assert_allclose(
    hidden[there], golden['hidden'][there], rtol=0, atol=1e-5
  )


def test_names_map_both_ways(golden, params):
  leaves = tree.flatten(params)
  names = {k for k in golden if '.' in k} - {*convert.bert.ignored}
  assert {*map(convert.bert.to_name, leaves)} == names
  assert {*map(convert.bert.to_path, names)} == {*leaves}
  assert convert.bert.to_path('encoder.layer.0.attention.self.gate') is None
  assert convert.bert.to_name('layers_0/gate') is None


@jax.jit
def encode(variables, vectors, mask):
  """Returns the last hidden states of vectors of words."""
  encoder = bert.Encoder(CONFIG)
  return encoder.apply(variables, vectors, mask, method='from_vectors')


def test_images_of_words_hold_what_the_encoder_reads(golden, params):
  words = jnp.asarray(golden['words'])
  table = jnp.asarray(params['embeddings']['word']['embedding'])
  form = bert.Vectors.of(table)
  images = form.images(words)
  assert images.shape == (*words.shape, 1, CONFIG.hidden_size + 1)
  assert float(images.min()) >= 0
  assert float(images.max()) <= 1
  vectors, mask = bert.split(form.preprocess(images))
  np.testing.assert_allclose(vectors, table[words], atol=1e-6)
  # Without the table: what a merge learns has none.
  embeddings = {k: x for k, x in params['embeddings'].items() if k != 'word'}
  hidden = np.asarray(
    encode({'params': {**params, 'embeddings': embeddings}}, vectors, mask)
  )
  there = golden['words'] != bert.PAD
  np.testing.assert_allclose(
    hidden[there], golden['hidden'][there], rtol=0, atol=1e-5
  )


def test_a_word_that_is_half_there_has_a_gradient(params):
  vectors = jax.random.normal(jax.random.key(0), (1, 3, CONFIG.hidden_size))

  def mean(last):
    mask = jnp.stack([jnp.ones([]), jnp.ones([]), last])[None]
    hidden = encode({'params': params}, vectors, mask)
    return bert.mean_pool(hidden, mask)[0, 0]

  def alone():
    hidden = encode({'params': params}, vectors[:, :2], jnp.ones((1, 2)))
    return bert.mean_pool(hidden, jnp.ones((1, 2)))[0, 0]

  value = jax.jit(mean)
  np.testing.assert_allclose(value(jnp.zeros([])), alone(), atol=1e-5)
  half, eps = jnp.float32(0.5), 1e-2
  slope = (value(half + eps) - value(half - eps)) / (2 * eps)
  np.testing.assert_allclose(jax.jit(jax.grad(mean))(half), slope, rtol=0.02)
  assert abs(slope) > 1e-3


def test_mean_pool_counts_words_that_are_there():
  hidden = jnp.array([[[1.0], [3.0], [50.0]]])
  assert bert.mean_pool(hidden, jnp.array([[1.0, 1.0, 0.0]])).item() == 2
  assert bert.mean_pool(hidden, jnp.zeros((1, 3))).item() == 0


def test_config_is_read_and_refused(tmp_path):
  raw = dataclasses.asdict(CONFIG) | {'model_type': 'bert', 'more': 1}
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(raw))
  assert bert.load_config(path) == CONFIG
  path.write_text(json.dumps({**raw, 'hidden_act': 'relu', 'vocab_size': 0}))
  with pytest.raises(ValueError, match='hidden_act must be gelu, got relu'):
    bert.load_config(path)
  del raw['hidden_size'], raw['vocab_size']
  path.write_text(json.dumps(raw | {'position_embedding_type': 'relative_key'}))
  wrong = '(?s)vocab_size.*hidden_size is missing.*absolute, got relative_key'
  with pytest.raises(ValueError, match=wrong):
    bert.load_config(path)
  path.write_text('{')
  with pytest.raises(ValueError, match='not JSON'):
    bert.load_config(path)


def test_sizes_that_make_no_sense_are_refused():
  with pytest.raises(ValueError, match='does not divide into 3 heads'):
    dataclasses.replace(CONFIG, num_attention_heads=3)
  with pytest.raises(ValueError, match='vocab_size must be positive, got 0'):
    dataclasses.replace(CONFIG, vocab_size=0)
  long = jnp.ones((1, 8), jnp.int32)
  with pytest.raises(ValueError, match='of 8 words, the encoder reads 7'):
    bert.Encoder(CONFIG).init(jax.random.key(0), long)
