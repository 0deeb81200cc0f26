"""What attention may be computed by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax.models import clip
from dam_jax.models import text


def towers(model, **options):
  """Yields both towers, their parameters and what they read."""
  for name, kind, given in (
    ('vision', clip.VisionTower, 'pixels'),
    ('text', text.TextTower, 'tokens'),
  ):
    config = getattr(model.config, name)
    params = {'params': model.params[name]}
    yield kind(config, **options), params, model.given[given]


def test_attention_of_jax_gives_the_same(golden):
  model = golden['new']
  for ours, theirs in zip(
    towers(model), towers(model, attention='xla'), strict=True
  ):
    (tower, *args), (other, *_) = ours, theirs
    np.testing.assert_allclose(
      jax.jit(other.apply)(*args),
      jax.jit(tower.apply)(*args),
      rtol=1e-4,
      atol=1e-5,
    )


def test_cudnn_wants_half_precision(golden):
  for tower, *args in towers(golden['new'], attention='cudnn'):
    with pytest.raises(ValueError, match='cudnn attends in bfloat16 or float'):
      tower.apply(*args)


def test_cudnn_is_asked_for(golden, monkeypatch):
  asked = []

  def attend(q, k, v, *, is_causal, implementation):
    asked.append((q.dtype, is_causal, implementation))
    return q

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
  options = {'attention': 'cudnn', 'dtype': jnp.bfloat16}
  with jax.numpy_dtype_promotion('standard'):  # which Flax's layer norm needs
    for tower, *args in towers(golden['new'], **options):
      jax.eval_shape(tower.apply, *args)
  layers, half = 2, jnp.dtype('bfloat16')
  assert asked == [
    *[(half, False, 'cudnn')] * layers,
    *[(half, True, 'cudnn')] * layers,
  ]
