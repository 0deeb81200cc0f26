"""What the security metrics count, on predictions made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dam_jax import evaluate
from dam_jax.evaluate import Rate

LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 2])


def test_wilson_interval_is_the_textbook_formula():
  hits = np.arange(40) < 7
  p, n, z = 7 / 40, 40, stats.norm.ppf(0.975)
  centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  got = evaluate.rate(hits)
  np.testing.assert_allclose(
    [got.value, got.low, got.high],
    [p, centre - half, centre + half],
    rtol=1e-12,
  )
  assert got.n == 40


def test_wilson_interval_covers_its_share():
  rng = np.random.default_rng(0)
  p, covered = 0.03, 0
  for _ in range(300):
    r = evaluate.rate(rng.random(200) < p)
    covered += r.low <= p <= r.high
  assert 0.91 < covered / 300 < 0.99


def test_rates_need_images():
  with pytest.raises(ValueError, match='at least one image'):
    evaluate.rate(np.zeros(0, bool))


def test_attack_success_leaves_out_images_of_the_target_class():
  triggered = np.array([2, 0, 2, 1, 2, 2, 2, 0])
  asr = evaluate.attack_success(triggered, LABELS, target=2)
  assert (asr.value, asr.n) == (2 / 4, 4)
  ra = evaluate.robust_accuracy(triggered, LABELS, target=2)
  assert (ra.value, ra.n) == (2 / 4, 4)


def test_attack_success_needs_another_class():
  with pytest.raises(ValueError, match='target class 3'):
    evaluate.attack_success(np.array([3]), np.array([3]), target=3)


def _flat(value):
  return Rate(value, value, value, 10)


@pytest.mark.parametrize(
  ('acc', 'asr', 'want'),
  [(0.7, 0.9, 0.5), (0.7, 0.0, 0.95), (0.9, 0.0, 0.95), (0.2, 0.9, 0.25)],
)
def test_der_rewards_safety_and_charges_accuracy(acc, asr, want):
  got = evaluate.defence_effectiveness(
    _flat(acc), _flat(asr), plain_acc=_flat(0.7), plain_asr=_flat(0.9)
  )
  np.testing.assert_allclose(got[:3], want)


def test_der_interval_holds_its_value():
  acc, asr = Rate(0.6, 0.5, 0.7, 50), Rate(0.3, 0.2, 0.4, 40)
  plain = Rate(0.65, 0.6, 0.7, 50)
  got = evaluate.defence_effectiveness(
    acc, asr, plain_acc=plain, plain_asr=Rate(0.9, 0.8, 1.0, 40)
  )
  assert got.low < got.value < got.high
  assert got.n == 40


def test_mean_of_rates_has_a_width_where_all_are_zero():
  zero = evaluate.rate(np.zeros(50, bool))
  one = evaluate.mean([zero] * 4)
  assert one.value == 0
  np.testing.assert_allclose(one.high, zero.high / 2)


def test_difference_is_newcombes_interval():
  # Newcombe (1998), table II, example (a), method 10: 56/70 - 48/80.
  a = evaluate.rate(np.arange(70) < 56)
  b = evaluate.rate(np.arange(80) < 48)
  np.testing.assert_allclose(
    evaluate.difference(a, b), [0.2, 0.0524, 0.3339], atol=5e-5
  )


def test_worst_is_the_largest_asr_and_the_smallest_accuracy():
  rates = {'a': _flat(0.1), 'b': _flat(0.8)}
  assert evaluate.worst(rates, largest=True) == rates['b']
  assert evaluate.worst(rates, largest=False) == rates['a']


def test_transfer_goes_to_the_class_most_often_hit():
  clean = np.array([0, 1, 2, 2, 1])
  triggered = np.array([2, 2, 2, 1, 0])
  got = evaluate.transfer(triggered, clean)
  assert (got.target, got.rate.value) == (2, 3 / 5)
  assert (got.clean, got.gain) == (2 / 5, 2 / 5)


def test_predictor_pads_the_last_batch_and_compiles_once():
  traces = []

  def task_logits_fn(params, task, images):
    traces.append(images.shape)
    sums = jnp.mean(images, axis=(1, 2, 3))[:, None]
    return jnp.where(task == 1, -sums, sums) * params[None]

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
  predict = evaluate.predictor(task_logits_fn, batch=3)
  params = jnp.array([-1.0, 1.0])
  assert predict(params, 0, images).tolist() == [1] * 7
  assert predict(params, 1, images[:5]).tolist() == [0] * 5
  dark = predict(params, 0, images[:1], lambda x: x - 1.0)
  assert dark.tolist() == [0]
  assert traces == [(3, 2, 2, 3)]


def test_predictor_reads_words_as_they_are():
  def task_logits_fn(params, task, words):
    assert words.dtype == jnp.int32
    return params[task] * jax.nn.one_hot(jnp.max(words, axis=1), 301)

  words = np.array([[0, 300], [7, 2], [5, 5]], np.int32)
  predict = evaluate.predictor(task_logits_fn, batch=2)
  assert predict(jnp.ones(1), 0, words).tolist() == [300, 7, 5]


@pytest.mark.parametrize(
  'images',
  [
    np.zeros((0, 2, 2, 3), np.uint8),
    np.zeros((1, 2, 2, 3)),
    np.zeros((1, 2), np.uint8),
    np.zeros(3, np.int32),
  ],
)
def test_predictor_refuses_what_is_not_images(images):
  predict = evaluate.predictor(lambda p, t, x: x[:, 0, 0])
  with pytest.raises(ValueError, match='uint8'):
    predict({}, 0, images)


def test_predictor_needs_a_batch():
  with pytest.raises(ValueError, match='batch must be positive, got 0'):
    evaluate.predictor(lambda p, t, x: x, batch=0)


def test_bootstrap_agrees_with_the_binomial_and_with_scipy():
  hits = np.arange(400) < 80
  value, low, high = evaluate.bootstrap([hits[None]])
  half = 1.96 * np.sqrt(0.2 * 0.8 / 400)
  assert value == pytest.approx(0.2)
  np.testing.assert_allclose([low, high], [0.2 - half, 0.2 + half], atol=0.004)
  theirs = stats.bootstrap(
    (hits,), np.mean, method='percentile', rng=np.random.default_rng(0)
  ).confidence_interval
  np.testing.assert_allclose([low, high], theirs, atol=0.005)


def test_bootstrap_covers_the_share_over_new_seeds_and_images():
  rng = np.random.default_rng(0)
  covered, narrow = 0, 0
  for trial in range(100):
    rates = np.clip(0.5 + 0.1 * rng.standard_normal(12), 0, 1)
    hits = rng.random((12, 60)) < rates[:, None]
    _, low, high = evaluate.bootstrap([hits], seed=trial, num=300)
    covered += low <= 0.5 <= high
    # As if all runs were one: seeds are not covered.
    _, low, high = evaluate.bootstrap([hits.reshape(1, -1)], num=300)
    narrow += low <= 0.5 <= high
  assert covered >= 89
  assert narrow < covered


def test_bootstrap_draws_clusters_whole_and_strata_apart():
  # Two uploads with three equal merges each: six runs are worth two.
  hits = np.repeat([[0.0], [1.0]], 3, axis=0) * np.ones(50)
  uploads = [0, 0, 0, 1, 1, 1]
  assert evaluate.bootstrap([hits], clusters=uploads) == (0.5, 0.0, 1.0)
  _, low, high = evaluate.bootstrap([hits])
  assert 0 < low < high < 1
  _, low, high = evaluate.bootstrap([hits], clusters=uploads, strata=uploads)
  assert (low, high) == (0.5, 0.5)


def test_bootstrap_gives_tasks_the_same_weight_and_leaves_out_nan():
  many, few = np.ones((1, 90)), np.zeros((1, 10))
  assert evaluate.bootstrap([many, few])[0] == 0.5
  half = np.where(np.arange(90) < 45, 1, np.nan)[None]
  assert evaluate.bootstrap([half]) == (1.0, 1.0, 1.0)
  with pytest.raises(ValueError, match='task 1 has nothing that counts'):
    evaluate.bootstrap([many, few * np.nan])


def test_paired_bootstrap_is_narrower_on_hits_that_agree():
  plain = np.arange(400) % 10 < 5
  better = plain | (np.arange(400) < 20)
  value, low, high = evaluate.paired_bootstrap([better[None]], [plain[None]])
  assert value == pytest.approx(10 / 400)
  assert 0 < low < high
  apart = evaluate.difference(evaluate.rate(better), evaluate.rate(plain))
  assert high - low < 0.3 * (apart[2] - apart[1])
  same = evaluate.paired_bootstrap([plain[None]], [plain[None]])
  assert same == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
  ('hits', 'options', 'match'),
  [
    ([], {}, r'\[R, N\]'),
    ([np.ones(3)], {}, r'\[R, N\]'),
    ([np.ones((2, 3)), np.ones((1, 3))], {}, r'\[R, N\]'),
    ([np.ones((2, 3))], {'clusters': [0]}, '1 clusters of 2 runs'),
    ([np.ones((2, 3))], {'num': 0}, 'num must be positive, got 0'),
  ],
)
def test_bootstrap_refuses_what_does_not_fit(hits, options, match):
  with pytest.raises(ValueError, match=match):
    evaluate.bootstrap(hits, **options)
  if hits and hits[0].ndim == 2:
    with pytest.raises(ValueError, match='those of the baseline'):
      evaluate.paired_bootstrap(hits, hits[1:])
