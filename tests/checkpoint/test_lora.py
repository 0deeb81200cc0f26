"""LoRAs: what PEFT's merge gives, exact sums, best truncations, every error."""

import json

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from dam_jax import checkpoint
from dam_jax.models import convert

CONFIG = {
  'peft_type': 'LORA',
  'r': 2,
  'lora_alpha': 8,
  'bias': 'none',
  'fan_in_fan_out': False,
  'target_modules': ['q', 'v'],
  'init_lora_weights': True,
}
BASE = {
  'h.0.q.weight': (5, 4),
  'h.0.v.weight': (4, 4),
  'h.1.q.weight': (5, 4),
  'embed.weight': (7, 4),
  'conv.weight': (6, 3, 2, 2),
  'head.weight': (3, 4),
  'head.bias': (3,),
}


def normal(rng, *shape, dtype=np.float32):
  return rng.normal(size=shape).astype(dtype)


@pytest.fixture
def base(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {name: normal(rng, *shape) for name, shape in BASE.items()}
  tensors['step'] = np.array([3])
  save_file(tensors, tmp_path / 'base.safetensors')
  return checkpoint.open_model(tmp_path / 'base.safetensors')


def pair(rng, module, shapes, *, kind='', dtype=np.float32):
  suffix = '' if kind else '.weight'
  return {
    f'base_model.model.{module}.lora_{kind}{letter}{suffix}': normal(
      rng, *shape, dtype=dtype
    )
    for letter, shape in zip('AB', shapes, strict=True)
  }


def write(folder, tensors, **config):
  folder.mkdir(parents=True)
  save_file(tensors, folder / 'adapter_model.safetensors')
  text = json.dumps({**CONFIG, **config})
  (folder / 'adapter_config.json').write_text(text)
  return checkpoint.open_lora(folder)


def simple(folder, seed=1, rank=2, modules=('h.0.q', 'h.1.q'), **config):
  rng = np.random.default_rng(seed)
  tensors = {}
  for module in modules:
    tensors |= pair(rng, module, [(rank, 4), (5, rank)])
  return write(folder, tensors, **{'r': rank, **config})


def update(f):
  """Returns `scaling * B A` of a plain module, in float64."""
  return f.scaling * f.b.astype(np.float64) @ f.a.astype(np.float64)


def lines(error):
  return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_expanded_leaves_are_the_base_and_the_update(tmp_path, base):
  rng = np.random.default_rng(1)
  tensors = {
    **pair(rng, 'h.0.q', [(2, 4), (5, 2)]),
    **pair(rng, 'embed', [(2, 7), (4, 2)], kind='embedding_'),
    **pair(rng, 'conv', [(2, 3, 2, 2), (6, 2, 1, 1)]),
    'base_model.model.head.weight': normal(rng, 3, 4, dtype=np.float16),
    'base_model.model.head.bias': normal(rng, 3),
  }
  lora = write(tmp_path / 'a', tensors, modules_to_save=['head'])
  model = checkpoint.expand(base, lora)
  get = {n.removeprefix('base_model.model.'): x for n, x in tensors.items()}
  want = {
    'h/0/q/weight': 4 * get['h.0.q.lora_B.weight'] @ get['h.0.q.lora_A.weight'],
    'embed/weight': 4
    * (get['embed.lora_embedding_B'] @ get['embed.lora_embedding_A']).T,
    'conv/weight': 4
    * np.einsum(
      'or,rihw->oihw',
      get['conv.lora_B.weight'][:, :, 0, 0],
      get['conv.lora_A.weight'],
    ),
  }
  for path, delta in want.items():
    assert model.leaves[path].dtype == np.float32
    got = model.read(path)
    assert (got.dtype, got.shape) == (np.float32, base.leaves[path].shape)
    assert not got.flags.writeable
    np.testing.assert_allclose(got, base.read(path) + delta, rtol=1e-6)
  for name in ('head.weight', 'head.bias'):
    path = name.replace('.', '/')
    np.testing.assert_array_equal(model.read(path), get[name])
    assert model.read(path).dtype == np.float32
  for path in ('h/0/v/weight', 'h/1/q/weight', 'step'):
    assert model.leaves[path] == base.leaves[path]
    assert np.shares_memory(model.read(path), base.read(path))
  assert list(model.leaves) == list(base.leaves)
  assert model.files == (*base.files, *lora.files)


def test_half_precision_is_added_in_float32(tmp_path):
  rng = np.random.default_rng(0)
  w = normal(rng, 5, 4, dtype=jnp.bfloat16)
  base = checkpoint.open_model({'q': {'weight': w}})
  lora = write(
    tmp_path / 'a', pair(rng, 'q', [(2, 4), (5, 2)], dtype=jnp.bfloat16)
  )
  want = w.astype(np.float64) + update(lora.factors['q/weight'])
  got = checkpoint.expand(base, lora).read('q/weight')
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  ('config', 'scaling'),
  [
    ({}, 8 / 4),
    ({'use_rslora': True}, 8 / 2),
    ({'alpha_pattern': {'q': 6}}, 6 / 4),
    ({'alpha_pattern': {'h.0.q': 6, 'q': 5}}, 6 / 4),
    ({'alpha_pattern': {'q': 5, 'h.0.q': 6}}, 5 / 4),
    ({'alpha_pattern': {r'h\.(1|2)\.q': 6}}, 8 / 4),
    ({'alpha_pattern': {'^h.0.q': 6}}, 6 / 4),
    ({'alpha_pattern': {'0.q.*': 6}}, 6 / 4),
    ({'alpha_pattern': {'h': 6, '.q': 7, '': 3}}, 8 / 4),
    ({'r': 9, 'rank_pattern': {'0.q': 4}}, 8 / 4),
    (
      {'use_rslora': True, 'rank_pattern': {'q': 4}, 'alpha_pattern': {'q': 6}},
      6 / 2,
    ),
  ],
  ids=str,
)
def test_scaling_is_pefts(tmp_path, config, scaling):
  lora = simple(tmp_path / 'a', rank=4, modules=['h.0.q'], **config)
  assert lora.factors['h/0/q/weight'].scaling == scaling


@pytest.mark.parametrize(
  ('flag', 'shape', 'turned'),
  [(False, (5, 4), False), (True, (4, 5), True), (True, (5, 4), False)],
)
def test_weights_may_lie_the_other_way(tmp_path, flag, shape, turned):
  base = checkpoint.open_model({'q': {'weight': np.zeros(shape, np.float32)}})
  lora = simple(tmp_path / 'a', modules=['q'], fan_in_fan_out=flag)
  want = update(lora.factors['q/weight'])
  got = checkpoint.expand(base, lora).read('q/weight')
  np.testing.assert_allclose(got, want.T if turned else want, rtol=1e-5)


def test_square_weights_that_may_lie_either_way_are_refused(tmp_path):
  leaves = {'q': (4, 5), 's': (4, 4), 't': (4, 4)}
  params = {n: {'weight': np.zeros(s, np.float32)} for n, s in leaves.items()}
  base = checkpoint.open_model(params)
  rng = np.random.default_rng(0)
  tensors = {
    **pair(rng, 'q', [(2, 4), (5, 2)]),
    **pair(rng, 's', [(2, 4), (4, 2)]),
    **pair(rng, 't', [(2, 4), (4, 2)]),
  }
  right = write(tmp_path / 'right', tensors, fan_in_fan_out=True)
  np.testing.assert_allclose(
    checkpoint.expand(base, right).read('s/weight'),
    update(right.factors['s/weight']).T,
    rtol=1e-5,
  )
  wrong = write(tmp_path / 'wrong', tensors, fan_in_fan_out=False)
  with pytest.raises(ValueError, match='does not fit the base') as error:
    checkpoint.expand(base, wrong)
  assert [line.split(',')[0] for line in lines(error)] == [
    's/weight: square',
    't/weight: square',
  ]


def test_names_and_layouts_of_the_base_are_kept(tmp_path):
  rng = np.random.default_rng(0)
  prefix = 'vision_model.encoder.layers.0.self_attn.q_proj'
  patch = 'vision_model.embeddings.patch_embedding'
  save_file(
    {
      f'{prefix}.weight': normal(rng, 5, 4),
      f'{patch}.weight': normal(rng, 6, 3, 2, 2),
    },
    tmp_path / 'base.safetensors',
  )
  tensors = {
    **pair(rng, prefix, [(2, 4), (5, 2)]),
    **pair(rng, patch, [(2, 3, 2, 2), (6, 2, 1, 1)]),
    'base_model.model.visual_projection.weight': normal(rng, 3, 5),
  }
  plain = checkpoint.open_model(tmp_path / 'base.safetensors')
  write(tmp_path / 'a', {n: x for n, x in tensors.items() if 'visual' not in n})
  want = checkpoint.expand(plain, checkpoint.open_lora(tmp_path / 'a'))
  base = checkpoint.open_model(
    tmp_path / 'base.safetensors', name_map=convert.clip_vision
  )
  lora = checkpoint.open_lora(tmp_path / 'a', name_map=convert.clip_vision)
  got = checkpoint.expand(base, lora)
  np.testing.assert_array_equal(
    got.read('layers_0/self_attn/q_proj/kernel'),
    want.read(f'{prefix}.weight'.replace('.', '/')).T,
  )
  np.testing.assert_array_equal(
    got.read('embeddings/patch_embedding'),
    want.read(f'{patch}.weight'.replace('.', '/')).transpose(2, 3, 1, 0),
  )
  write(tmp_path / 'b', tensors)
  lora = checkpoint.open_lora(tmp_path / 'b', name_map=convert.clip_vision)
  assert lora.full['visual_projection/kernel'].value.shape == (5, 3)
  checkpoint.save_lora(tmp_path / 'c', lora)
  saved = load_file(tmp_path / 'c' / 'adapter_model.safetensors')
  assert {n: x.tobytes() for n, x in saved.items()} == {
    n: x.tobytes() for n, x in tensors.items()
  }


def test_wrapped_leaves_are_found_and_copies_left_out(tmp_path, base):
  rng = np.random.default_rng(0)
  embed, head = normal(rng, 7, 4), normal(rng, 3, 4)
  tensors = {
    **pair(rng, 'embed', [(2, 7), (4, 2)], kind='embedding_'),
    'base_model.model.embed.base_layer.weight': embed,
    'base_model.model.head.modules_to_save.weight': head,
    'base_model.model.head.original_module.weight': head + 1,
  }
  lora = write(tmp_path / 'a', tensors)
  model = checkpoint.expand(base, lora)
  np.testing.assert_array_equal(model.read('head/weight'), head)
  np.testing.assert_allclose(
    model.read('embed/weight'),
    embed + update(lora.factors['embed/weight']).T,
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'peft_type': 'IA3'}, "want LORA, got 'IA3'"),
    ({'peft_type': None}, 'want LORA, got None'),
    ({'use_dora': True}, 'use_dora is True, which is not supported'),
    ({'bias': 'lora_only'}, "bias is 'lora_only', want none"),
    ({'lora_bias': True}, 'lora_bias is True'),
    ({'init_lora_weights': 'pissa_niter_4'}, 'pissa_niter_4.*save it again'),
    ({'layer_replication': [[0, 1]]}, r'layer_replication is \[\[0, 1\]\]'),
    ({'target_parameters': ['x']}, r"target_parameters is \['x'\]"),
    ({'trainable_token_indices': [1]}, 'trainable_token_indices is'),
    ({'new_of_tomorrow': 3}, 'new_of_tomorrow is 3'),
    (
      {'use_dora': True, 'bias': 'all'},
      '(?s)use_dora is True.*bias is .all., want none',
    ),
  ],
  ids=str,
)
def test_what_is_not_plain_lora_is_refused(tmp_path, config, message):
  with pytest.raises(ValueError, match=message):
    simple(tmp_path / 'a', **config)


def test_tensors_that_are_not_of_a_lora_are_all_named(tmp_path):
  rng = np.random.default_rng(0)
  alone = pair(rng, 'h.1.q', [(2, 4), (5, 2)])
  alone.popitem()
  tensors = {
    **pair(rng, 'h.0.q', [(2, 4), (5, 3)]),
    **pair(rng, 'h.0.v', [(3, 4), (5, 3)]),
    **alone,
    'base_model.model.h.0.q.lora_magnitude_vector': np.ones(5),
    'base_model.model.h.0.q.lora_A.default.weight': np.ones((2, 4)),
    'h.0.q.weight': np.ones((5, 4)),
  }
  with pytest.raises(ValueError, match='not a plain LoRA') as error:
    write(tmp_path / 'a', tensors)
  assert sorted(lines(error)) == [
    'base_model.model.h.0.q.lora_A.default.weight: unexpected tensor',
    'base_model.model.h.0.q.lora_magnitude_vector: unexpected tensor',
    'h.0.q.weight: unexpected tensor',
    'h.0.q: A float32[2, 4], B float32[5, 3] do not fit rank 2',
    'h.0.v: A float32[3, 4], B float32[5, 3] do not fit rank 2',
    'h.1.q: want lora_A, lora_B and a leaf of the base',
  ]


def test_files_that_are_missing_or_pickled_are_refused(tmp_path):
  with pytest.raises(ValueError, match='adapter_config.json: no such file'):
    checkpoint.open_lora(tmp_path)
  (tmp_path / 'adapter_config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(ValueError, match='model.safetensors: no such file'):
    checkpoint.open_lora(tmp_path)
  with pytest.raises(ValueError, match='a LoRA, not a model: use open_lora'):
    checkpoint.open_model(tmp_path)
  (tmp_path / 'adapter_model.bin').write_bytes(b'\x80\x02.')
  with pytest.raises(ValueError, match=r'adapter_model.bin: a pickle'):
    checkpoint.open_lora(tmp_path)


def test_all_that_does_not_fit_the_base_is_named(tmp_path, base):
  rng = np.random.default_rng(0)
  tensors = {
    **pair(rng, 'h.0.q', [(2, 9), (5, 2)]),
    **pair(rng, 'h.7.q', [(2, 4), (5, 2)]),
    **pair(rng, 'embed', [(2, 4), (7, 2)], kind='embedding_'),
    'base_model.model.head.weight': normal(rng, 3, 5),
    'base_model.model.tail.weight': normal(rng, 3, 5),
  }
  lora = write(tmp_path / 'a', tensors)
  with pytest.raises(ValueError, match='the LoRA does not fit') as error:
    checkpoint.expand(base, lora)
  assert sorted(lines(error)) == [
    'embed/weight: B A is [7, 4], the base has float32[7, 4]',
    'h/0/q/weight: B A is [5, 9], the base has float32[5, 4]',
    'h/7/q/weight: not in the base',
    'head/weight: got [3, 5], want [3, 4]',
    'tail/weight: not in the base',
  ]
  packed = checkpoint.open_model({'q': {'weight': np.ones((5, 4), np.uint8)}})
  with pytest.raises(ValueError, match=r'the base has uint8\[5, 4\]'):
    checkpoint.expand(packed, simple(tmp_path / 'b', modules=['q']))


@hypothesis.given(
  ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
  weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
  seed=st.integers(0, 99),
)
def test_concat_is_the_weighted_sum(tmp_path_factory, ranks, weights, seed):
  folder = tmp_path_factory.mktemp('loras')
  loras = [
    simple(folder / str(k), seed + k, rank, modules=['q', f'only{k}'])
    for k, rank in enumerate(ranks)
  ]
  weights = weights[: len(loras)]
  merged = checkpoint.concat(loras, weights)
  want = sum(
    w * update(lora.factors['q/weight'])
    for w, lora in zip(weights, loras, strict=True)
  )
  f = merged.factors['q/weight']
  assert f.rank == sum(ranks)
  assert f.scaling == 1
  np.testing.assert_allclose(update(f), want, atol=1e-4)
  for k, lora in enumerate(loras):
    np.testing.assert_allclose(
      update(merged.factors[f'only{k}/weight']),
      weights[k] * update(lora.factors[f'only{k}/weight']),
      atol=1e-4,
    )


def test_what_cannot_be_summed_is_refused(tmp_path):
  rng = np.random.default_rng(0)
  one = simple(tmp_path / 'one')
  full = write(
    tmp_path / 'full',
    {
      **pair(rng, 'h.0.q', [(2, 4), (6, 2)]),
      'base_model.model.head.weight': normal(rng, 3, 4),
    },
  )
  with pytest.raises(ValueError, match='cannot be summed') as error:
    checkpoint.concat([one, full], [1.0, 1.0])
  assert lines(error) == [
    'head/weight: held in full, of which there is no sum without the base',
    'h/0/q/weight: shapes or layouts differ',
  ]
  with pytest.raises(ValueError, match='want one weight a LoRA: 1, 2'):
    checkpoint.concat([one, one], [1.0])
  with pytest.raises(ValueError, match='want one weight a LoRA: 0, 0'):
    checkpoint.concat([], [])
  turned = simple(tmp_path / 'turned', fan_in_fan_out=True)
  with pytest.raises(ValueError, match='fan_in_fan_out differs'):
    checkpoint.concat([one, turned], [1.0, 1.0])


@pytest.mark.parametrize('rank', [1, 3, 4, 6, 9])
def test_truncation_is_the_best_of_its_rank(tmp_path, rank):
  lora = checkpoint.concat(
    [simple(tmp_path / str(k), k, rank=3) for k in range(2)], [0.7, -1.3]
  )
  short = checkpoint.truncate(lora, rank)
  for path, f in lora.factors.items():
    got, whole = short.factors[path], update(f)
    assert got.rank <= rank
    u, s, vt = np.linalg.svd(whole)
    best = (u[:, :4] * s)[:, :rank] @ vt[:rank]
    np.testing.assert_allclose(update(got), best, atol=1e-5)
  if rank >= 6:
    assert short.factors == lora.factors


def test_truncation_of_nothing_is_nothing(tmp_path):
  lora = simple(tmp_path / 'a', rank=3)
  zero = checkpoint.concat([lora, lora], [1.0, -1.0])
  for f in checkpoint.truncate(zero, 2).factors.values():
    np.testing.assert_allclose(update(f), 0, atol=1e-5)
  none = checkpoint.concat([lora], [0.0])
  for f in checkpoint.truncate(none, 2).factors.values():
    np.testing.assert_array_equal(update(f), 0)
  with pytest.raises(ValueError, match='rank: want at least 1, got 0'):
    checkpoint.truncate(lora, 0)


def test_truncation_never_forms_the_update(tmp_path):
  rng = np.random.default_rng(0)
  f = checkpoint.Factors(
    a=normal(rng, 4, 200_000),
    b=normal(rng, 150_000, 4),
    scaling=1.0,
    module='embed',
    inner=(200_000,),
  )
  lora = checkpoint.Lora(factors={'w': f}, full={}, config=CONFIG)
  assert checkpoint.truncate(lora, 2).factors['w'].rank == 2  # not 120 GB


def test_saved_folder_is_read_as_it_was(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    **pair(rng, 'h.0.q', [(2, 4), (5, 2)], dtype=jnp.bfloat16),
    **pair(rng, 'h.1.q', [(3, 4), (5, 3)]),
    **pair(rng, 'embed', [(2, 7), (4, 2)], kind='embedding_'),
    **pair(rng, 'conv', [(2, 3, 2, 2), (6, 2, 1, 1)]),
    'base_model.model.head.weight': normal(rng, 3, 4),
  }
  config = {
    'rank_pattern': {'1.q': 3},
    'alpha_pattern': {'conv': 7.5},
    'use_rslora': True,
    'modules_to_save': ['head'],
    'layers_to_transform': [0],
    'task_type': 'CAUSAL_LM',
  }
  lora = write(tmp_path / 'a', tensors, **config)
  checkpoint.save_lora(tmp_path / 'new' / 'b', lora)
  again = checkpoint.open_lora(tmp_path / 'new' / 'b')
  saved = load_file(tmp_path / 'new' / 'b' / 'adapter_model.safetensors')
  assert {n: (x.dtype, x.tobytes()) for n, x in saved.items()} == {
    n: (x.dtype, x.tobytes()) for n, x in tensors.items()
  }
  for path, f in lora.factors.items():
    assert again.factors[path].scaling == pytest.approx(f.scaling, rel=1e-15)
  assert again.config == {
    **lora.config,
    'rank_pattern': {r'^h\.1\.q': 3},
    'alpha_pattern': {'^conv': pytest.approx(7.5)},
    'target_modules': ['conv', 'embed', 'h.0.q', 'h.1.q'],
    'exclude_modules': None,
    'layers_pattern': None,
    'layers_to_transform': None,
  }
  assert list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'b']
  with pytest.raises(ValueError, match='b exists'):
    checkpoint.save_lora(tmp_path / 'new' / 'b', lora)


def test_merged_lora_is_saved_with_its_own_ranks(tmp_path, base):
  loras = [simple(tmp_path / 'a', 1, 2), simple(tmp_path / 'b', 2, 3)]
  more = simple(tmp_path / 'c', 3, 1, modules=['h.1.q'])
  merged = checkpoint.concat([*loras, more], [0.5, 0.25, 1.0])
  checkpoint.save_lora(tmp_path / 'm', merged, like=loras[1])
  read = checkpoint.open_lora(tmp_path / 'm')
  assert {p: f.rank for p, f in read.factors.items()} == {
    'h/0/q/weight': 5,
    'h/1/q/weight': 6,
  }
  want = checkpoint.expand(base, merged)
  got = checkpoint.expand(base, read)
  for path in base.leaves:
    np.testing.assert_array_equal(got.read(path), want.read(path))


def test_expanded_model_is_written_like_any_other(tmp_path, base):
  model = checkpoint.expand(base, simple(tmp_path / 'a'))
  leaves = {
    p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in base.leaves.items()
  }
  with checkpoint.ModelWriter(tmp_path / 'm', leaves) as writer:
    for path in model.leaves:
      writer.put(path, model.read(path))
  written = checkpoint.open_model(tmp_path / 'm')
  for path in base.leaves:
    np.testing.assert_array_equal(written.read(path), model.read(path))
