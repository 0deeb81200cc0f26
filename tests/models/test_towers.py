"""Both towers together: what transformers computes, and configs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import convert
from dam_jax.models import text
from dam_jax.models import towers


def outputs(model, params):
  pixels, tokens = model.given['pixels'], model.given['tokens']
  vision = clip.VisionTower(model.config.vision)
  words = text.TextTower(model.config.text)
  out = towers.CLIP(model.config).apply({'params': params}, pixels, tokens)
  return {
    'images': vision.apply({'params': params['vision']}, pixels),
    'texts': words.apply({'params': params['text']}, tokens),
    'logits': out.logits,
  }, (out.images, out.texts)


@pytest.mark.parametrize('name', ['new', 'legacy'])
def test_outputs_are_those_of_transformers(golden, name):
  model = golden[name]
  run = jax.jit(lambda params: outputs(model, params))
  found, unit = run(model.params)
  for key, x in found.items():
    want = model.want[key]
    assert x.dtype == jnp.float32
    assert np.abs(want[0] - want[1]).max() > 0.1
    error = np.abs(x - want).max() / np.abs(want).max()
    assert error < 1e-5, key
  for x, key in zip(unit, ('images', 'texts'), strict=True):
    np.testing.assert_allclose(x, clip.unit(found[key]), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_transformers(golden):
  model = golden['new']

  @jax.jit
  def grad_fn(params):
    def loss(params):
      found, _ = outputs(model, params)
      means = (jnp.mean(x * model.given[f'by/{k}']) for k, x in found.items())
      return sum(means, start=jnp.float32(0))

    return jax.grad(loss)(params)

  grad = tree.flatten(grad_fn(model.params))
  drawn = tree.flatten(model.draws)
  by_name = {
    convert.clip.to_name(path): np.sum(
      np.asarray(drawn[path], np.float64) * np.asarray(x)
    )
    for path, x in grad.items()
  }
  want = dict(zip(sorted(by_name), model.want['gradients'], strict=True))
  for name, x in by_name.items():
    # Of a key's bias the gradient is zero but for rounding.
    scale = want[name.replace('k_proj.bias', 'q_proj.bias')]
    assert abs(x - want[name]) < 1e-4 * abs(scale), name


def write(folder, content):
  path = folder / 'config.json'
  path.write_text(json.dumps(content))
  return path


def test_config_is_written_as_it_is_read(golden, tmp_path):
  config = golden['legacy'].config
  assert towers.load_config(write(tmp_path, config.to_json())) == config
  assert clip.load_config(tmp_path / 'config.json') == config.vision
  assert text.load_config(tmp_path / 'config.json') == config.text


def test_what_transformers_leaves_out_is_its_default(tmp_path):
  # As files of fine-tuned models of transformers 4 are.
  path = write(tmp_path, {'model_type': 'clip', 'vision_config': {}})
  assert towers.load_config(path) == towers.VIT_B32
  large = {
    'model_type': 'clip',
    'projection_dim': 768,
    'text_config': {
      **{'hidden_size': 768, 'intermediate_size': 3072},
      **{'num_attention_heads': 12, 'model_type': 'clip_text_model'},
    },
    'vision_config': {
      **{'hidden_size': 1024, 'intermediate_size': 4096, 'patch_size': 14},
      **{'num_attention_heads': 16, 'num_hidden_layers': 24},
    },
  }
  assert towers.load_config(write(tmp_path, large)) == towers.VIT_L14
  # As the first files had it, whose defaults win over the other part.
  large['text_config_dict'] = large.pop('text_config')
  large['text_config'] = {'eos_token_id': 2}
  assert towers.load_config(write(tmp_path, large)) == towers.VIT_L14


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({'model_type': 'siglip'}, "of a model_type 'siglip'"),
    ({'model_type': 'clip_text_model'}, 'of one tower alone: clip_text_model'),
    ({'vision_config': {}, 'text_config': {}}, 'lacks hidden_size'),
    (
      {'model_type': 'clip', 'vision_config': {'image_size': [224, 224]}},
      r'image_size must be a whole number, got \[224, 224\]',
    ),
    (
      {'model_type': 'clip', 'text_config': {'eos_token_id': 49408}},
      'eos_token_id 49408 is not of a vocabulary of 49408',
    ),
  ],
)
def test_other_configs_are_refused(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    towers.load_config(write(tmp_path, content))


def test_one_towers_config_is_not_the_others(tmp_path):
  path = write(tmp_path, {'model_type': 'clip_text_model'})
  assert text.load_config(path) == text.VIT_B
  with pytest.raises(ValueError, match='of a clip_text_model, want a clip_vis'):
    clip.load_config(path)


def test_towers_have_features_of_one_size():
  with pytest.raises(ValueError, match='512 of images and 768 of texts'):
    towers.CLIPConfig(vision=clip.VIT_B32, text=text.VIT_L)
