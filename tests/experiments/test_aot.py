"""Programs for TPUs that are not there: what is counted and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from dam_jax.models import clip
from experiments import aot
from experiments import flops

TINY = clip.VisionConfig(
  hidden_size=128,
  intermediate_size=256,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=32,
  patch_size=16,
  projection_dim=64,
)


def test_operations_of_loops_and_branches_are_counted():
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  product = 2 * 8**3

  def looped(x):
    return jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=5)[0]

  def branched(x):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

  def batched(x):
    return jnp.einsum('bij,bjk->bik', jnp.stack([x] * 3), jnp.stack([x] * 3))

  for fn, want in ((looped, 5), (branched, 2), (batched, 3)):
    assert flops.count(fn, x) == want * product
    assert flops.count(jax.jit(jax.checkpoint(fn)), x) == want * product
  assert flops.count(jax.grad(lambda x: looped(x).sum()), x) == 15 * product


def test_collectives_are_read_off_a_program():
  text = """
    %a = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), to_apply=%add
    %b = f32[8]{0} all-gather-start(%z), dimensions={0}
    %c = f32[8]{0} all-gather-done(%b)
    %d = f32[8]{0} add(%all-gather.1, %c)
  """
  assert aot.collectives(text) == {'all-reduce': (1, 28), 'all-gather': (1, 32)}


def test_all_that_is_unknown_is_said_at_once():
  with pytest.raises(ValueError, match='no chip .v9.') as e:
    aot.measure('v9:1x1', 'ViT-X', method='magic')
  assert "no model 'ViT-X'" in str(e.value)
  assert "no method 'magic'" in str(e.value)
  with pytest.raises(ValueError, match="'dam_paper' for 7B: "):
    aot.measure('v5e:2x2', '7B', method='dam_paper')
  with pytest.raises(ValueError, match='remat are for learned merges'):
    aot.measure('v5e:2x2', '7B', method='ties', remat=True)


@pytest.fixture
def tpu(monkeypatch):
  """Names a small tower; JAX is as lax as for users."""
  pytest.importorskip('libtpu', reason="needs pip install -e '.[aot]'")
  monkeypatch.setitem(aot.TOWERS, 'tiny', TINY)
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  yield
  jax.config.update('jax_numpy_dtype_promotion', 'strict')


def test_a_step_compiles_for_a_slice(tpu):
  split = aot.measure('v5e:2x2', 'tiny', tasks=3, batch=4)
  whole = aot.measure('v5e:2x2', 'tiny', tasks=3, batch=4, replicated=True)
  assert split['mesh'] == {'data': 4, 'model': 1}
  assert split['arguments'] < 0.35 * whole['arguments']
  assert 'all-gather' not in whole['collectives']
  num, size = split['collectives']['all-gather']
  layout_bytes = size / num
  params = clip.VisionTower(TINY).init(
    jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )['params']
  entries = sum(x.size for x in jax.tree.leaves(params))
  assert num <= 4
  assert 2 * entries <= layout_bytes <= 2.1 * entries
  assert split['flops'] == whole['flops'] > 0
  # Of two more tasks the images' and coefficients' gradients, no leaf of them.
  more = aot.measure('v5e:2x2', 'tiny', tasks=5, batch=4)['collectives']
  assert more['all-gather'] == split['collectives']['all-gather']
  grown = more['all-reduce'][1] - split['collectives']['all-reduce'][1]
  assert 0 < grown < 0.2 * entries


def test_a_merge_without_data_sends_nothing(tpu, monkeypatch):
  small = {'layers': {'0': {'w': (64, 128)}}, 'norm': (1024,)}
  leaves = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    small,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  monkeypatch.setattr(aot, '_llama', lambda: leaves)
  found = aot.measure('v5e:2x2', '7B', method='task_arithmetic', tasks=3)
  assert found['collectives'] == {}
  assert found['fits']


def test_what_does_not_fit_is_said(tpu, monkeypatch):
  leaf = jax.ShapeDtypeStruct((2**18, 2**17), jnp.bfloat16)
  monkeypatch.setattr(aot, '_llama', lambda: {'w': leaf})
  with pytest.raises(ValueError, match='too much for v5e:2x2'):
    aot.measure('v5e:2x2', '7B', method='task_arithmetic', tasks=3)
