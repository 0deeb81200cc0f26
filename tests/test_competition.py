"""Merges that choose among entries, against plain NumPy, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import competition


def make_deltas(num=4, seed=0):
  """Task vectors of two leaves, with zeros and equal entries, and a counter."""
  rng = np.random.default_rng(seed)
  deltas = {
    'a': rng.normal(size=(num, 6, 5)).astype(np.float32),
    'b': rng.normal(size=(num, 9)).astype(np.float32) / 100,
    'n': np.zeros((num, 2), np.int32),
  }
  deltas['a'][:, 0, :2] = 0.0
  deltas['a'][:, 1, 1] = 0.5  # no variance
  deltas['b'][1] *= 3
  return deltas


def apply(tx, deltas):
  deltas = jax.tree.map(jnp.asarray, deltas)
  out = jax.jit(lambda u: tx.update(u, tx.init(None))[0])(deltas)
  assert out['n'].shape == (2,)
  assert out['n'].dtype == jnp.int32
  return out


def test_max_magnitude_takes_the_last_of_equals():
  deltas = make_deltas()
  deltas['a'][3, 2] = -deltas['a'][0, 2]
  got = apply(competition.max_magnitude(0.5), deltas)
  for name in 'ab':
    flat = deltas[name].reshape(4, -1)
    want = []
    for entry in flat.T:
      largest = max(abs(entry))
      want.append(0.5 * [x for x in entry if abs(x) == largest][-1])
    np.testing.assert_array_equal(got[name].ravel(), np.float32(want))


def sce(x, density, floor, merge):
  """Select, calculate, erase, in float64."""
  num = len(x)
  flat = x.reshape(num, -1).astype(np.float64)
  kept = flat
  if density < 1:
    variance = flat.var(axis=0)
    variance[np.ptp(flat, axis=0) == 0] = 0
    top = int(density * np.count_nonzero(variance))
    chosen = np.argsort(variance)[flat.shape[1] - top :]
    kept = np.zeros_like(flat)
    kept[:, chosen] = flat[:, chosen]
  weights = (kept**2).mean(axis=1)
  total = weights.sum()
  weights = weights / total if total > floor else np.ones(num) / num
  taus = kept if merge == 'selected' else flat
  out = []
  for entry in taus.T:
    sign = 1 if entry.sum() >= 0 else -1
    votes = [
      (w, t) for w, t in zip(weights, entry, strict=True) if sign * t > 0
    ]
    below = sum(w for w, _ in votes)
    out.append(sum(w * t for w, t in votes) / below if below else 0.0)
  return np.reshape(out, x.shape[1:])


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'density': 0.5, 'merge': 'all'},
    {'density': 0.5, 'floor': 1e-2},
    {'density': 1.0},
  ],
)
def test_sce(options):
  deltas = make_deltas()
  got = apply(dj.sce(**options), deltas)
  options = {'density': 0.1, 'floor': 0.0, 'merge': 'selected', **options}
  for name in 'ab':
    want = sce(deltas[name], **options)
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-6)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def norm(x):
  return (x - x.min()) / np.ptp(x)


def pcb(taus, ratio):
  """Equations 2 to 5 of the paper."""
  num, size = taus.shape
  scores = []
  for tau in taus:
    intra = softmax(num * norm(tau * tau))
    inter = sum(softmax(norm(tau * other)) for other in taus)
    score = intra * inter
    least = np.sort(score)[int((1 - ratio) * size)]
    scores.append(np.where(score >= least, score, 0))
  below = sum(scores)
  above = sum(s * t for s, t in zip(scores, taus, strict=True))
  return np.where(below > 0, above / np.where(below > 0, below, 1), 0)


def pcb_code(taus, ratio):
  """What the paper's authors released, in float64."""
  num, size = taus.shape
  above, below = 0.0, 0.0
  for tau in taus:
    order = np.sort(abs(tau))
    low = order[int(size * 0.0001)]
    high = order[int(size * (1 - 0.0001) - 1)]
    magnitude = np.clip(abs(tau), low, high)
    score = np.exp(num * norm(magnitude) ** 2) * np.tanh(tau * sum(taus))
    least = np.sort(score)[int(size * (1 - ratio))]
    score = norm(np.maximum(score, least))
    above = above + score * np.sign(tau) * magnitude
    below = below + score
  return above / np.maximum(below, 1e-12)


@pytest.mark.parametrize(
  ('reading', 'reference'), [('paper', pcb), ('code', pcb_code)]
)
def test_pcb_ranks_the_whole_model(reading, reference):
  deltas = make_deltas()
  flat = np.concatenate([deltas[n].reshape(4, -1) for n in 'ab'], axis=1)

  def merge(density):
    return apply(dj.pcb(density, 0.7, reading=reading), deltas)

  traced = jax.jit(merge)
  for density, run in ((0.2, merge), (0.05, traced), (1.0, traced)):
    merged = run(density)
    got = np.concatenate([merged[n].ravel() for n in 'ab'])
    want = 0.7 * reference(flat.astype(np.float64), density)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('threshold', 'min_tasks'),
  [(0.3, 0), (0.3, 2), ([0.2, 0.4, 0.6, 1.0], 2), (0.3, 4), (0.3, 5)],
)
def test_consensus(threshold, min_tasks):
  deltas = make_deltas()
  got = apply(dj.consensus(threshold, 0.5, min_tasks=min_tasks), deltas)
  least = np.broadcast_to(threshold, 4)
  for name in 'ab':
    want = []
    for entry in deltas[name].reshape(4, -1).T:
      total = sum(entry)
      needed = sum(
        abs(t) >= x * abs(total - t) for t, x in zip(entry, least, strict=True)
      )
      want.append(0.5 * total if needed >= min_tasks else 0.0)
    np.testing.assert_allclose(got[name].ravel(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'tx', [dj.pcb(reading='code'), dj.sce(0.5, merge='all'), dj.sce(1.0)]
)
def test_no_task_vectors_merge_to_none(tx):
  deltas = jax.tree.map(np.zeros_like, make_deltas())
  for x in apply(tx, deltas).values():
    assert not x.any()
