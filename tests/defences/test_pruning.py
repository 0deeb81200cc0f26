"""Fine-pruning and channel-Lipschitzness pruning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dam_jax.defences import Labelled
from dam_jax.defences import NoData
from dam_jax.defences import pruning

FC1, FC2 = 'layers_0/mlp/fc1/kernel', 'layers_0/mlp/fc2/kernel'


def fine_prune(planted, **options):
  options = {'share': 1 / 16, 'steps': 0, 'batch': 16, **options}
  defence = pruning.fine_pruning(planted.inputs_fn, **options)
  return defence(planted.params, planted.logits_fn, planted.data)


def rows(params):
  """Returns which hidden units are left."""
  return np.asarray(params['layers_0']['mlp']['fc2']['kernel'].any(axis=1))


def test_activations_are_means_over_all_images(planted):
  for batch in (7, 30, 64):
    got = pruning.mean_activations(
      planted.inputs_fn, planted.params, planted.data, [FC1, FC2], batch
    )
    flat = planted.data.images.reshape(60, 4, 4, 3)
    want = planted.inputs_fn(planted.params, 0, flat)
    for path in (FC1, FC2):
      np.testing.assert_allclose(
        got[path], np.abs(want[path]).mean(0), rtol=1e-5
      )


def test_activations_are_magnitudes_of_each_tasks_own_images():
  def inputs_fn(params, task, images):
    return {'w': (task.astype(float) + 1) * images[:, 0, 0]}

  images = jnp.array([[-1.0, 3.0], [5.0, -7.0]]).reshape(2, 2, 1, 1, 1)
  data = Labelled(images, jnp.zeros((2, 2), int))
  got = pruning.mean_activations(inputs_fn, {}, data, ['w'], 1)
  assert got['w'].tolist() == [(1 + 3 + 2 * 5 + 2 * 7) / 4]


def test_accuracy_is_counted_on_every_image_once():
  # Of 2 x 5 images, a model with threshold t gets 10 - t right.
  images = jnp.array([5.0, 6, 7, 8, 9, 0, 1, 3, 4, 2])
  data = Labelled(images.reshape(2, 5, 1, 1, 1), jnp.ones((2, 5), int))

  def apply_fn(params, images):
    x = images.reshape(*images.shape[:2], 1)
    return jnp.concatenate([jnp.zeros_like(x), x - params], axis=-1)

  for batch in (1, 2, 3, 5, 9):
    good_fn = pruning.keeps_accuracy(
      jnp.array(2.5 - 1), apply_fn, data, max_drop=0.1, batch=batch
    )
    fall = [good_fn(jnp.array(t + 0.5)) for t in range(5)]
    assert fall == [True, True, True, False, False]


def test_fine_pruning_removes_the_planted_unit_first(planted):
  assert planted.attack_rate(planted.params) == 1
  # One unit a step, and the second step is not worth it.
  pruned = fine_prune(planted, max_drop=0.0, share=1 / 16)
  left = rows(pruned)
  assert not left[planted.unit]
  assert planted.accuracy(pruned) == 1
  assert planted.attack_rate(pruned) < 0.05
  # Nothing else than rows of that kernel has changed.
  old, new = planted.params['layers_0']['mlp'], pruned['layers_0']['mlp']
  chex.assert_trees_all_equal(new['fc1'], old['fc1'])
  np.testing.assert_array_equal(
    new['fc2']['kernel'],
    old['fc2']['kernel'] * left[:, None].astype(np.float32),
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(pruned, planted.params)


def test_units_fall_in_order_until_accuracy_does(planted):
  activity = pruning.mean_activations(
    planted.inputs_fn, planted.params, planted.data, [FC2], 60
  )[FC2]
  order = np.argsort(activity)
  assert order[0] == planted.unit
  counts = []
  for max_drop in (0.0, 0.1, 0.3, 1.0):
    pruned = fine_prune(planted, max_drop=max_drop)
    gone = int(np.sum(~rows(pruned)))
    assert set(np.flatnonzero(~rows(pruned))) == set(order[:gone])
    assert planted.accuracy(pruned) >= 1 - max_drop - 1e-6
    if gone < 16:
      mlp = planted.params['layers_0']['mlp']
      keep = jnp.ones((16, 1)).at[order[: gone + 1]].set(0)
      kernel = mlp['fc2']['kernel'] * keep
      next_one = {'mlp': {**mlp, 'fc2': {**mlp['fc2'], 'kernel': kernel}}}
      assert planted.accuracy({'layers_0': next_one}) < 1 - max_drop
    counts.append(gone)
  assert 1 <= counts[0] < counts[2] < counts[3] == 16


def test_a_step_takes_a_share_of_the_units(planted):
  seen = []

  def good_fn(params):
    seen.append(int(np.sum(~rows(params))))
    return True

  activity = {FC2: jnp.arange(16.0)}
  pruning._prune_dormant(planted.params, activity, 0.1, good_fn)
  assert seen == [1, 3, 4, 6, 8, 9, 11, 12, 14, 16]
  seen.clear()
  pruning._prune_dormant(planted.params, activity, 0.01, good_fn)
  assert seen == list(range(1, 17))


def test_fine_tuning_repairs_and_keeps_zeros(planted):
  plain = fine_prune(planted, max_drop=0.5)
  tuned = fine_prune(planted, max_drop=0.5, steps=60, tx=optax.adamw(0.02))
  assert planted.accuracy(plain) < 0.9
  assert planted.accuracy(tuned) > 0.98
  assert planted.attack_rate(tuned) < 0.05
  np.testing.assert_array_equal(rows(tuned), rows(plain))
  chex.assert_trees_all_equal_shapes_and_dtypes(tuned, planted.params)
  assert tuned['step'] == 7
  for layer in ('fc1', 'fc2'):
    new, old = (x['layers_0']['mlp'][layer] for x in (tuned, plain))
    assert (new['kernel'] != old['kernel']).any()
    assert (new['bias'] != old['bias']).any()


def test_a_step_of_fine_tuning_descends_the_cross_entropy():
  # One image a task, so that a draw is always the same; the second input
  # sleeps, and each task needs one of the others.
  kernel = np.array([[2, -1, 0.3, -0.5], [1, 1, 2, -1], [-1, 0.5, 0.2, 2]])
  x, y = np.array([[0.8, 0, 0.1], [0.1, 0, 0.7]]), np.eye(4)[[0, 3]]
  images = jnp.asarray(x.reshape(2, 1, 1, 1, 3), jnp.float32)
  data = Labelled(images, jnp.array([[0], [3]]))
  params = {'mlp': {'fc2': {'kernel': jnp.asarray(kernel, jnp.float32)}}}

  def apply_fn(params, images):
    return images[:, :, 0, 0] @ params['mlp']['fc2']['kernel']

  def inputs_fn(params, task, images):
    return {'mlp/fc2/kernel': images[:, 0, 0] - 0.5}

  defence = pruning.fine_pruning(
    inputs_fn,
    share=1 / 3,
    max_drop=0.0,
    steps=1,
    batch=3,
    tx=optax.sgd(0.5),
    preprocess_fn=lambda x: x + 0.5,
  )
  got = defence(params, apply_fn, data)['mlp']['fc2']['kernel']
  kernel[1] = 0
  p = np.asarray(jax.nn.softmax(x @ kernel))
  want = kernel - 0.5 * x.T @ (p - y) / 2
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bounds_are_norms_of_units():
  rng = np.random.default_rng(0)
  dense, conv = rng.normal(size=(5, 4)), rng.normal(size=(3, 2, 5, 4))
  np.testing.assert_allclose(
    pruning.lipschitz_bounds(jnp.asarray(dense, jnp.float32)),
    np.sqrt((dense**2).sum(0)),
    rtol=1e-5,
  )
  want = [np.linalg.svd(conv[..., i].reshape(6, 5))[1].max() for i in range(4)]
  got = pruning.lipschitz_bounds(jnp.asarray(conv, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_clp_removes_the_planted_unit_and_no_other(planted):
  repaired = pruning.clp()(planted.params, None, NoData())
  assert planted.accuracy(repaired) == 1
  assert planted.attack_rate(repaired) < 0.05
  kept = jnp.arange(16) != planted.unit
  mlp = planted.params['layers_0']['mlp']
  fc1 = {
    'kernel': mlp['fc1']['kernel'] * kept[None].astype(jnp.float32),
    'bias': mlp['fc1']['bias'] * kept.astype(jnp.float32),
  }
  want = {'layers_0': {'mlp': {**mlp, 'fc1': fc1}}, 'step': jnp.array(7)}
  chex.assert_trees_all_equal(repaired, want)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_clp_counts_sample_deviations(dtype):
  # Norms 1, 1, 1, 1, 6: the last is 4 / sqrt(5) = 1.789 deviations off.
  kernel = jnp.ones((1, 5), dtype).at[0, 4].set(6)
  params = {'mlp': {'fc1': {'kernel': kernel, 'bias': jnp.ones(5, dtype)}}}
  for deviations, want in [(1.78, 0), (1.80, 1), (3.0, 1)]:
    got = pruning.clp(deviations=deviations)(params, None, NoData())
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    fc1 = got['mlp']['fc1']
    assert fc1['bias'].tolist() == [1, 1, 1, 1, want]
    assert fc1['kernel'].tolist() == [[1, 1, 1, 1, 6 * want]]


def test_clp_leaves_other_layers_and_single_units():
  loud = jnp.ones((2, 16)).at[:, 3].set(90)
  params = {
    'block': {
      'self_attn': {'q_proj': {'kernel': loud, 'bias': jnp.ones(16)}},
      'mlp': {'fc1': {'kernel': jnp.ones((2, 1))}},
    },
    'visual_projection': {'kernel': loud},
  }
  got = pruning.clp()(params, None, NoData())
  assert not got['block']['self_attn']['q_proj']['kernel'][:, 3].any()
  assert got['block']['self_attn']['q_proj']['bias'].sum() == 15
  chex.assert_trees_all_equal(got['block']['mlp'], params['block']['mlp'])
  head = 'visual_projection'
  chex.assert_trees_all_equal(got[head], params[head])
  got = pruning.clp(r'visual_projection/.*')(params, None, NoData())
  assert not got[head]['kernel'][:, 3].any()
  chex.assert_trees_all_equal(got['block'], params['block'])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'share': 0}, r'share must be in \(0, 1\], got 0'),
    ({'max_drop': 1.5}, r'max_drop must be in \[0, 1\], got 1.5'),
    ({'steps': -1}, 'steps must be at least 0, got -1'),
    ({'batch': 0}, 'batch must be at least 1, got 0'),
  ],
)
def test_bad_options_of_fine_pruning_are_named(options, message, planted):
  with pytest.raises(ValueError, match=message):
    pruning.fine_pruning(planted.inputs_fn, **options)


@pytest.mark.parametrize('deviations', [-1.0, float('nan')])
def test_bad_deviations_are_named(deviations):
  with pytest.raises(ValueError, match=f'deviations must .* got {deviations}'):
    pruning.clp(deviations=deviations)


def test_a_rule_must_match_what_is_there(planted):
  with pytest.raises(ValueError, match="'step' matches no floating-point"):
    fine_prune(planted, kernels='step')
  with pytest.raises(ValueError, match="'step' matches no floating-point"):
    pruning.clp('step')(planted.params, None, NoData())
  with pytest.raises(ValueError, match='no inputs of layers_0/mlp/fc1/bias'):
    fine_prune(planted, kernels='.*/fc1/.*')
