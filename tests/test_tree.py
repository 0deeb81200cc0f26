"""Stack, subtract, ravel and label, on random pytrees."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import tree

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'bool')


def make_leaf(shape, dtype, seed):
  """Returns small integers, exact in every dtype, also when subtracted."""
  x = np.random.default_rng(seed).integers(-8, 9, shape)
  return jnp.asarray(np.asarray(x, jnp.dtype(dtype)))


LEAVES = st.builds(
  make_leaf,
  st.sampled_from([(), (1,), (3,), (2, 3), (3, 1, 2)]),
  st.sampled_from(DTYPES),
  st.integers(0, 99),
)
TREES = st.recursive(
  LEAVES,
  lambda inner: st.one_of(
    st.dictionaries(st.sampled_from('abc'), inner, min_size=1, max_size=3),
    st.lists(inner, min_size=1, max_size=2),
  ),
  max_leaves=5,
)
# At least one leaf is floating point, else there is nothing to merge.
MODELS = st.fixed_dictionaries(
  {
    'any': TREES,
    'float': st.builds(
      make_leaf, st.just((2,)), st.just('float32'), st.just(1)
    ),
  }
)


def another(model, seed):
  """Returns a model like one, with other values."""
  leaves, treedef = jax.tree.flatten(model)
  fresh = [make_leaf(x.shape, x.dtype, seed + i) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(treedef, fresh)


def is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def assert_same(got, want):
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_equal(got, want)


@hypothesis.given(MODELS, st.integers(1, 3))
def test_unstack_inverts_stack(model, num):
  models = [another(model, k) for k in range(num)]
  stacked = tree.stack(models)
  assert tree.check_stacked(model, stacked) == num
  assert_same(tree.unstack(stacked), models)


@hypothesis.given(MODELS)
def test_task_vectors_added_to_the_base_give_the_experts(base):
  experts = [another(base, k) for k in (1, 2)]
  deltas = tree.task_vectors(base, tree.stack(experts))
  for delta, expert in zip(tree.unstack(deltas), experts, strict=True):
    want = jax.tree.map(lambda b, e: e if is_float(b) else b, base, expert)
    assert_same(tree.apply_delta(base, delta), want)
    for d in jax.tree.leaves(delta):
      assert is_float(d) or not d.any()


@hypothesis.given(MODELS)
def test_unravel_inverts_ravel(model):
  flat = tree.ravel(model)
  assert flat.vector.dtype == jnp.float32
  assert flat.vector.shape == (sum(flat.layout.sizes),)
  assert_same(flat.unravel(), model)
  vector, arrays = jax.device_get((flat.vector, model))
  assert_same(
    flat.unravel(2 * vector),
    jax.tree.map(lambda x: np.add(x, x) if is_float(x) else x, arrays),
  )
  leaves = tree.flatten(arrays)
  for name, at in zip(flat.layout.names, flat.layout.slices, strict=True):
    np.testing.assert_array_equal(vector[at], leaves[name].ravel())


@hypothesis.given(MODELS)
def test_stacked_models_ravel_like_one(model):
  models = [another(model, k) for k in (1, 2, 3)]
  flat = tree.ravel(tree.stack(models), leading=1)
  assert flat.layout == tree.ravel(model).layout
  vectors = np.asarray(flat.vector)
  for k, m in enumerate(models):
    np.testing.assert_array_equal(vectors[k], tree.ravel(m).vector)
  assert_same(flat.unravel(), tree.stack(models))


@hypothesis.settings(max_examples=20)
@hypothesis.given(MODELS, st.integers(2, 9))
def test_shards_hold_an_equal_part_of_every_leaf(model, shards):
  models = tree.stack([another(model, k) for k in (1, 2)])
  flat = tree.ravel(models, leading=1, shards=shards)
  layout = flat.layout
  assert flat.vector.shape == (2, shards, sum(layout.widths))
  assert_same(flat.unravel(), models)
  vector = np.asarray(flat.vector)
  padded = np.pad(tree.ravel(models, leading=1).vector, ((0, 0), (0, 1)))
  np.testing.assert_array_equal(padded[:, layout.places()], vector)
  for group, (name, at) in zip(
    [
      g[..., i, :]
      for g in map(np.asarray, layout.by_leaf(flat.vector))
      for i in range(g.shape[-2])
    ],
    zip(layout.names, layout.slices, strict=True),
    strict=True,
  ):
    np.testing.assert_array_equal(group, vector[..., at], name)


@hypothesis.settings(max_examples=20)
@hypothesis.given(MODELS, st.integers(1, 9), st.integers(1, 9))
def test_another_number_of_shards_has_the_same_entries(model, old, new):
  models = tree.stack([another(model, k) for k in (1, 2)])
  flat = tree.ravel(models, leading=1, shards=old)
  want = tree.ravel(models, leading=1, shards=new)
  got = flat.layout.resplit(flat.vector, new)
  np.testing.assert_array_equal(got, want.vector)


@hypothesis.given(MODELS)
def test_groups_by_leaf_are_the_leaves_in_order(model):
  flat = tree.ravel(model)
  both = np.stack([flat.vector, -np.asarray(flat.vector)])
  groups = flat.layout.by_leaf(jnp.asarray(both))
  sizes = [g.shape[2] for g in groups for _ in range(g.shape[1])]
  assert sizes == sorted(flat.layout.sizes)
  assert len({g.shape[2] for g in groups}) == len(groups)
  joined = np.concatenate(
    [np.asarray(g).reshape(2, -1) for g in groups], axis=-1
  )
  np.testing.assert_array_equal(joined, both)


def test_raveled_passes_through_and_compiles_once():
  traces = 0

  @jax.jit
  def double(flat):
    nonlocal traces
    traces += 1
    assert tree.ravel(flat) is flat
    return flat.unravel(2 * flat.vector)

  for seed in (1, 2):
    model = {'w': make_leaf((2, 3), 'bfloat16', seed), 'n': jnp.array(seed)}
    got = double(tree.ravel(model))
    assert_same(got, {'w': 2 * model['w'], 'n': model['n']})
  assert traces == 1


def test_ravel_keeps_float64():
  with jax.enable_x64(True):
    model = {'w': jnp.array([1 / 3], jnp.float64), 'v': jnp.ones(1, 'float32')}
    flat = tree.ravel(model)
    assert flat.vector.dtype == jnp.float64
    assert_same(flat.unravel(), model)


def test_ravel_refuses_a_tree_without_floats():
  with pytest.raises(ValueError, match='no floating-point parameter'):
    tree.ravel({'step': jnp.array(3)})


def test_task_vectors_broadcast_nothing():
  base = {'w': jnp.zeros((1, 2))}
  with pytest.raises(ValueError, match=r'w: got float32\[3, 4, 2\], want'):
    tree.task_vectors(base, {'w': jnp.ones((3, 4, 2))})
  with pytest.raises(ValueError, match=r'w: got float32\[2\], want'):
    tree.apply_delta(base, {'w': jnp.ones(2)})


def test_check_compatible_lists_all_differences_of_all_experts():
  base = {
    'a': jnp.zeros(2),
    'b': {'c': jnp.zeros((2, 3)), 'd': jnp.zeros(1, jnp.int32)},
    'e': jnp.zeros([]),
  }
  experts = {
    'cars': {'a': jnp.zeros(3), 'b': base['b'], 'f': jnp.zeros(1)},
    'good': jax.eval_shape(lambda: base),
    'svhn': {
      **base,
      'b': {'c': jnp.zeros((3, 2)), 'd': jnp.zeros(1, jnp.float32)},
    },
  }
  with pytest.raises(ValueError, match='^experts differ') as error:
    tree.check_compatible(base, experts)
  assert str(error.value).splitlines() == [
    'experts differ from the base:',
    '  cars: e: missing',
    '  cars: f: unexpected',
    '  cars: a: got float32[3], want float32[2]',
    '  svhn: b/c: got float32[3, 2], want float32[2, 3]',
    '  svhn: b/d: got float32[1], want int32[1]',
  ]
  tree.check_compatible(base, {'good': experts['good']})


@pytest.mark.parametrize(
  ('experts', 'message'),
  [
    ({'a': jnp.zeros((2, 3)), 'b': jnp.zeros(3)}, r'leading axes are \[2, 3\]'),
    ({'a': jnp.zeros((0, 3)), 'b': jnp.zeros(0)}, 'at least one'),
    ({'a': jnp.zeros(3), 'b': jnp.zeros([])}, r'(?s)a: got.*\[K, 3\].*b: got'),
    (
      {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(2, jnp.bfloat16)},
      r'b: got bfloat16\[2\], want float32\[K\]',
    ),
  ],
)
def test_check_stacked_refuses(experts, message):
  with pytest.raises(ValueError, match=message):
    tree.check_stacked({'a': jnp.zeros(3), 'b': jnp.zeros([])}, experts)


@pytest.mark.parametrize('experts', [[], [{'w': 0.0}, {'v': 0.0}]])
def test_stack_refuses(experts):
  with pytest.raises(ValueError, match=r'no experts|1: w: missing'):
    tree.stack(experts)


def test_labels_are_the_first_full_match():
  params = {'head': {'bias': 0, 'kernel': 0}, 'body': [0, 0], 'header': 0}
  rules = [('.*/bias', 'bias'), ('head.*', 'head'), (r'body/\d', 'body')]
  assert tree.label_by_path(params, rules) == {
    'head': {'bias': 'bias', 'kernel': 'head'},
    'body': ['body', 'body'],
    'header': 'head',
  }
  assert tree.label_by_path(params, [], default='y') == (
    jax.tree.map(lambda _: 'y', params)
  )


def test_labels_name_all_rules_and_leaves_without_a_match():
  params = {'head': 0, 'body': {'w': 0, 'b': 0}}
  rules = [('body', 'x'), ('body/w', 'x'), ('tail', 'x'), ('.*/w', 'y')]
  with pytest.raises(ValueError, match='^labels') as error:
    tree.label_by_path(params, rules)
  assert str(error.value).splitlines() == [
    'labels by path:',
    "  rule 'body' matches no leaf",
    "  rule 'tail' matches no leaf",
    "  leaf 'body/b' matches no rule",
    "  leaf 'head' matches no rule",
  ]
  with pytest.raises(
    ValueError, match=r"^labels by path:\n  rule 'tail'[^\n]*$"
  ):
    tree.label_by_path(params, [('tail', 'x')], default='y')


def test_check_compatible_tells_float64_from_float32():
  base = {'w': np.zeros(2, np.float32)}
  with pytest.raises(ValueError, match=r'got float64\[2\], want float32\[2\]'):
    tree.check_compatible(base, {'a': {'w': np.zeros(2)}})


def test_flatten_refuses_leaves_of_one_path():
  with pytest.raises(ValueError, match='same path: a/b'):
    tree.flatten({'a/b': 1, 'a': {'b': 2}})
