"""Merges against a second reading of their equations, in NumPy and float64.

The model is linear, `logits = x W + b`, with leaves `b` and `W`, so that all
gradients are short enough to derive by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dam_jax as dj

NUM_TASKS, BATCH, SHAPE, CLASSES = 2, 3, (2, 2, 1), 3
PIXELS = 4
LEAF = np.repeat([0, 1], [CLASSES, PIXELS * CLASSES])
"""The leaf of each parameter, in the raveled order: `b`, then `W`."""


def _rng():
  return np.random.default_rng(7)


def _tree(vector):
  lead = vector.shape[:-1]
  b, w = np.split(vector, [CLASSES], axis=-1)
  return {'b': jnp.asarray(b), 'w': jnp.asarray(w.reshape(*lead, PIXELS, -1))}


def _models():
  rng = _rng()
  base = rng.normal(size=LEAF.size)
  return base, base + rng.normal(size=(NUM_TASKS, LEAF.size))


def _merge(tx, base, experts):
  with jax.enable_x64(True):
    params = dj.merge(tx, _tree(base), _tree(experts)).params
    return np.asarray(dj.tree.ravel(params).vector)


def _close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_task_arithmetic():
  base, experts = _models()
  want = base + 0.3 * (experts[0] - base) + 0.3 * (experts[1] - base)
  _close(_merge(dj.task_arithmetic(0.3), base, experts), want)


@pytest.mark.parametrize('merge', ['mean', 'sum', 'max'])
def test_ties(merge):
  base, experts = _models()
  tau = experts - base
  tau[:, 2] = [-1.5, 1.5]  # a draw, decided by the other entries
  want = base.copy()
  kept = []
  for t in tau:
    rank = t.size - int(0.6 * t.size)
    kept.append(np.where(np.abs(t) >= np.sort(np.abs(t))[rank - 1], t, 0))
  signs = np.sign(np.sum(kept, axis=0))
  for i, sign in enumerate(signs):
    sign = sign or np.sign(signs.sum())
    agree = [t[i] for t in kept if t[i] * sign > 0]
    if agree:
      how = {'mean': np.mean, 'sum': np.sum, 'max': lambda x: max(x, key=abs)}
      want[i] += 0.5 * how[merge](agree)
  assert signs[2] == 0
  assert signs.sum() != 0
  got = _merge(dj.ties(0.6, 0.5, merge=merge), base, base + tau)
  _close(got, want)


@pytest.mark.parametrize('rescale', [True, False])
def test_dare(rescale):
  base, experts = _models()
  uniform = _rng().uniform(size=experts.shape)
  kept = np.where(uniform > 0.4, experts - base, 0) / (0.6 if rescale else 1)
  with jax.enable_x64(True):
    uniforms = _tree(uniform)
  by_shape = {leaf.shape: leaf for leaf in uniforms.values()}
  drop = dj.transforms.drop(
    0.4, rescale=rescale, uniform_fn=lambda key, leaf: by_shape[leaf.shape]
  )
  tx = dj.chain(drop, dj.task_arithmetic(0.3))
  _close(_merge(tx, base, experts), base + 0.3 * kept.sum(axis=0))


def test_slerp():
  base, experts = _models()
  want = np.empty_like(base)
  for leaf in (0, 1):
    a, b = experts[:, leaf == LEAF]
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    parts = np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b
    want[leaf == LEAF] = parts / np.sin(angle)
  _close(_merge(dj.slerp(0.3), base, experts), want)


def _softmax(z):
  e = np.exp(z - z.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


class _Adam:
  """Adam as in torch; called with a gradient, returns the update."""

  def __init__(self, learning_rate):
    self.learning_rate = learning_rate
    self.first = self.second = self.count = 0

  def __call__(self, grad):
    self.count += 1
    self.first = 0.9 * self.first + 0.1 * grad
    self.second = 0.999 * self.second + 0.001 * grad**2
    first = self.first / (1 - 0.9**self.count)
    second = self.second / (1 - 0.999**self.count)
    return -self.learning_rate * first / (np.sqrt(second) + 1e-8)


class _Linear:
  """Losses of `theta` `[P]` summed over tasks, and their gradients."""

  def __init__(self, theta):
    self.b, self.w = theta[:CLASSES], theta[CLASSES:].reshape(PIXELS, CLASSES)

  def logits(self, images):
    return images.reshape(NUM_TASKS, BATCH, PIXELS) @ self.w + self.b

  def entropy_grad(self, images):
    """Of `sum_t mean_b H`, `[P]`."""
    p = _softmax(self.logits(images))
    g = -(np.log(p + 1e-8) + p / (p + 1e-8))
    dz = p * (g - (p * g).sum(axis=-1, keepdims=True)) / BATCH
    dw = np.einsum('tbp,tbl->pl', images.reshape(*dz.shape[:2], -1), dz)
    return np.concatenate([dz.sum(axis=(0, 1)), dw.ravel()])

  def ascent_grad(self, images, delta):
    """Of `-sum_t mean_b CE(f(x + delta), argmax f(x))` in delta `[T, ...]`."""
    labels = self.logits(images).argmax(axis=-1)
    p = _softmax(self.logits(images + delta[:, None]))
    dz = (np.eye(CLASSES)[labels] - p) / BATCH
    return (dz @ self.w.T).sum(axis=1).reshape(delta.shape)


def _by_leaf(x, granularity):
  """Sums `[K, P]` over what shares a coefficient."""
  sums = np.stack([x[:, leaf == LEAF].sum(axis=1) for leaf in (0, 1)], axis=1)
  return sums if granularity == 'leaf' else sums.sum(axis=1)


def _spread(w):
  """Gives each parameter its coefficient, `[K, P]` or `[K, 1]`."""
  return w[:, LEAF] if w.ndim == 2 else w[:, None]


def _rescaled(m):
  return m / np.array([m[leaf == LEAF].mean() for leaf in LEAF])


def _mask_grad(logits, m, temperature, grad, change):
  """Of a loss with gradient `grad` in theta, `[P]`.

  theta moves by `change` times the rescaled mask, and
  `m = sigmoid((logit(u) + L) / temperature)`.
  """
  h, out = grad * change, np.empty_like(logits)
  for leaf in (0, 1):
    at = leaf == LEAF
    mean = m[at].mean()
    out[at] = h[at] / mean - (h[at] @ m[at]) / mean**2 / at.sum()
  return out * m * (1 - m) / temperature


def _bilevel(base, tau, images, uniform, o, granularity, *, dam):
  """Two steps of the mask and two of the coefficients, as released.

  Returns coefficients, mask logits, perturbations and the merged vector.
  """
  w0 = np.full(
    (NUM_TASKS, 2) if granularity == 'leaf' else NUM_TASKS, o['init']
  )
  w, logits, delta = w0, np.zeros(LEAF.size), np.zeros((NUM_TASKS, *SHAPE))
  inner, outer = _Adam(o['inner']), _Adam(o['mask'])
  ascend, leak, draw = _Adam(o['adversary']), 0, iter(images)

  def theta(w, mask):
    return base + (_spread(w) * _rescaled(mask) * tau).sum(axis=0)

  def w_grad(grad, mask):
    return _by_leaf(grad * _rescaled(mask) * tau, granularity)

  def sample(u):
    z = (np.log(u / (1 - u)) + logits) / o['temperature']
    return 1 / (1 + np.exp(-z))

  for u in uniform[:2]:
    m = sample(u)
    grad = w_grad(_Linear(theta(w, m)).entropy_grad(next(draw)), m)
    w = w0 + inner(grad + leak)
    model = _Linear(theta(w, m))
    if dam:
      delta = delta + ascend(model.ascent_grad(next(draw), delta))
    x = next(draw)
    grad = model.entropy_grad(x)
    if dam:
      perturbed = np.clip(x + delta[:, None], 0, 1)
      grad = grad + o['safety'] * model.entropy_grad(perturbed)
      leak = w_grad(grad, m)
    change = (_spread(w) * tau).sum(axis=0)
    logits = logits + outer(
      _mask_grad(logits, m, o['temperature'], grad, change)
    )
  m, w, last = sample(uniform[2]), w0, _Adam(o['last'])
  for _ in range(2):
    x = next(draw)
    w = w + last(w_grad(_Linear(theta(w, m)).entropy_grad(x), m) + leak)
    leak = 0
  return w, logits, delta, theta(w, m)


def _logits_fn(params, images):
  flat = images.reshape(*images.shape[:2], PIXELS)
  return flat @ params['w'] + params['b'][None, None]


def _run(merger, base, experts, draws):
  """Runs a merger; a step reads its phases, of which the last stage's one."""
  models = _tree(base), _tree(experts)
  state = merger.init(jax.random.key(0), *models)
  step_fn = jax.jit(merger.step)
  for draw in draws:
    state, metrics = step_fn(state, *models, dj.Batch(jnp.asarray(draw)))
  assert metrics['finite']
  return state, dj.tree.ravel(merger.finalize(state, *models)).vector


@pytest.mark.parametrize('granularity', ['task', 'leaf'])
def test_adamerging(granularity):
  base, experts = _models()
  images = _rng().normal(size=(2, NUM_TASKS, BATCH, *SHAPE))
  tau, adam = experts - base, _Adam(0.05)
  w = np.full((NUM_TASKS, 2) if granularity == 'leaf' else NUM_TASKS, 0.4)
  for x in images:
    model = _Linear(base + (_spread(w) * tau).sum(axis=0))
    w = w + adam(_by_leaf(model.entropy_grad(x) * tau, granularity))
  with jax.enable_x64(True):
    merger = dj.adamerging(
      _logits_fn,
      granularity=granularity,
      init=0.4,
      tx=optax.adam(0.05),
      steps=2,
    )
    state, theta = _run(merger, base, experts, images[:, None])
  _close(state.coefficients, w)
  _close(theta, base + (_spread(w) * tau).sum(axis=0))


def _bilevel_merger(o, granularity, noise, *, dam):
  options = {
    'granularity': granularity,
    'init': o['init'],
    'mask': dj.masks.Mask(
      temperature=o['temperature'],
      tx=optax.adam(o['mask']),
      uniform_fn=lambda key, step, like, layout: noise[step],
    ),
    'tx': optax.adam(o['last']),
    'steps': 2,
    'coefficient_steps': 2,
  }
  if not dam:
    return dj.concrete(_logits_fn, inner_tx=optax.adam(o['inner']), **options)
  return dj.dam_released(
    _logits_fn,
    image_shape=SHAPE,
    inner_learning_rate=o['inner'],
    adversary_tx=optax.adam(o['adversary']),
    safety_weight=o['safety'],
    **options,
  )


@pytest.mark.parametrize('granularity', ['task', 'leaf'])
@pytest.mark.parametrize('dam', [False, True], ids=['concrete', 'dam'])
def test_bilevel_merges(dam, granularity):
  base, experts = _models()
  rng, phases = _rng(), 3 if dam else 2
  images = rng.normal(0.5, 0.5, (2 * phases + 2, NUM_TASKS, BATCH, *SHAPE))
  uniform = rng.uniform(0.05, 0.95, (3, LEAF.size))
  o = {
    'init': 0.4,
    'temperature': 0.7,
    'safety': 0.3,
    'inner': 0.2,
    'mask': 0.1,
    'adversary': 0.05,
    'last': 0.02,
  }
  w, logits, delta, merged = _bilevel(
    base, experts - base, images, uniform, o, granularity, dam=dam
  )
  early = images[: 2 * phases].reshape(2, phases, *images.shape[1:])
  late = np.repeat(images[2 * phases :, None], phases, axis=1)
  with jax.enable_x64(True):
    merger = _bilevel_merger(o, granularity, jnp.asarray(uniform), dam=dam)
    assert merger.plan == dj.Plan(steps=4, phases=phases)
    state, theta = _run(merger, base, experts, [*early, *late])
  _close(state.coefficients, w)
  _close(state.masks['shared'], logits)
  if dam:
    _close(state.adversary[0], delta)
  _close(theta, merged)
