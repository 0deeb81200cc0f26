"""What every learned merge promises, from one table, and the step's phases."""

from collections.abc import Callable
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj

SHAPE = (4, 4, 3)


@dataclasses.dataclass(frozen=True)
class Method:
  """One learned merge.

  Attributes:
    make: from a function of logits to the merger.
    stages: steps of the adversary alone, of the masks, of the coefficients.
    phases: draws of images a step.
    coefficients: whether they are learned.
    adversary: in which stages it moves.
  """

  make: Callable
  stages: tuple[int, int, int]
  phases: int
  coefficients: bool = True
  adversary: tuple[bool, bool, bool] = (False, False, False)

  @property
  def single(self):
    """Whether the merged model is the only expert."""
    return self.make.func in (dj.repo_awm, dj.repo_sau)

  @property
  def references(self):
    return self.make.func in (dj.dam_robust, on_experts)


def adamerging(granularity):
  make = functools.partial(dj.adamerging, granularity=granularity, steps=3)
  return Method(make, (0, 0, 3), 1)


def concrete(granularity, phases=2, **options):
  return _two_stages(dj.concrete, granularity, phases, **options)


def released(granularity, phases=3, **options):
  return _two_stages(
    dj.dam_released, granularity, phases, image_shape=SHAPE, **options
  )


def paper(granularity, phases=4, **options):
  return _two_stages(
    dj.dam_paper, granularity, phases, image_shape=SHAPE, **options
  )


def _two_stages(factory, granularity, phases, **options):
  fixed = granularity == 'arithmetic'
  steps = {'steps': 3} if fixed else {'steps': 2, 'coefficient_steps': 2}
  options = {'granularity': granularity, **steps, **options}
  return Method(
    functools.partial(factory, **options),
    (0, 3, 0) if fixed else (0, 2, 2),
    phases,
    not fixed,
    (False, factory != dj.concrete, 'coefficient_safety' in options),
  )


def on_experts(logits_fn, **options):
  """`dam_robust` whose adversary starts on each expert alone."""

  def task_logits_fn(params, task, images):
    return logits_fn(params, jnp.stack([images] * 3))[task]

  return dj.dam_robust(logits_fn, task_logits_fn=task_logits_fn, **options)


def robust(granularity, factory=dj.dam_robust):
  make = functools.partial(
    factory,
    image_shape=SHAPE,
    granularity=granularity,
    ascents=2,
    warmup_ascents=3,
    steps=2,
  )
  learned = granularity != 'arithmetic'
  return Method(make, (2, 2, 0), 4, learned, (True, True, False))


def repair(factory):
  make = functools.partial(factory, image_shape=SHAPE, num_tasks=3, steps=3)
  return Method(make, (0, 3, 0), 2, False, (False, True, False))


METHODS = {
  'adamerging_task': adamerging('task'),
  'adamerging_leaf': adamerging('leaf'),
  'concrete_arithmetic': concrete('arithmetic', 1, final='mode'),
  'concrete_task': concrete('task', final='expected'),
  'concrete_leaf': concrete('leaf'),
  'released_arithmetic': released('arithmetic', 2),
  'released_leaf': released('leaf', final='mode'),
  'paper_arithmetic': paper('arithmetic', 3),
  'paper_leaf': paper('leaf', final='sample'),
  'paper_joint': paper(
    'task', 3, update='joint', safety_loss='consistency', final='mode'
  ),
  'paper_exact': paper('leaf', inner_gradient='exact'),
  'paper_shared': paper('task', 3, masks=('shared',)),
  'paper_safety': paper(
    'task', 4, masks=('safety',), coefficient_safety=0.1, ascents=2
  ),
  'robust_arithmetic': robust('arithmetic'),
  'robust_task': robust('task'),
  'robust_leaf': robust('leaf'),
  'robust_experts': robust('leaf', on_experts),
  'repo_awm': repair(dj.repo_awm),
  'repo_sau': repair(dj.repo_sau),
}


class Run:
  """A merger, compiled once, and the states of its first run."""

  def __init__(self, method, tiny, logits_fn=None):
    self.method, self.tiny, self.traces = method, tiny, 0
    self.merger = method.make(logits_fn or tiny.logits_fn)
    self.finalize = self.merger.finalize
    self.base = tiny.base
    self.experts = jax.tree.map(
      lambda x: x[:1] if method.single else x, tiny.experts
    )

    def step(*args):
      self.traces += 1
      return self.merger.step(*args)

    self.step = jax.jit(step)

  def batches(self):
    plan = self.merger.plan
    return [
      self.tiny.batch(max(plan.phases, 1), seed=i) for i in range(plan.steps)
    ]

  def go(self, experts=None):
    """Returns the states, from the first on, and the metrics of all steps."""
    experts = self.experts if experts is None else experts
    states, metrics = (
      [self.merger.init(jax.random.key(0), self.base, experts)],
      [],
    )
    for batch in self.batches():
      state, measured = self.step(states[-1], self.base, experts, batch)
      states.append(state)
      metrics.append(measured)
    return states, metrics

  @functools.cached_property
  def first(self):
    return self.go()


@pytest.fixture(scope='module')
def get_run(tiny):
  return functools.cache(lambda name: Run(METHODS[name], tiny))


@pytest.fixture(params=METHODS)
def run(request, get_run):
  return get_run(request.param)


def types(state):
  return jax.tree.map(jax.typeof, state)


def assert_close(got, want, tolerance=1e-5):
  """Raises unless the states agree, up to roundings."""
  plain = lambda x: (  # noqa: E731
    jax.random.key_data(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  chex.assert_trees_all_close(
    jax.tree.map(plain, got),
    jax.tree.map(plain, want),
    rtol=tolerance,
    atol=tolerance,
  )


def test_plan_says_what_the_steps_read(run):
  method = run.method
  assert run.merger.plan == dj.Plan(
    sum(method.stages), method.phases, method.references
  )


def test_state_keeps_its_type_and_the_step_one_trace(run):
  states, metrics = run.first
  for state in states[1:]:
    assert types(state) == types(states[0])
  for measured in metrics[1:]:
    assert types(measured) == types(metrics[0])
  assert [int(state.count) for state in states] == list(range(len(states)))
  assert run.traces == 1


def test_metrics_are_nan_where_the_step_lacks_the_phase(run):
  _, metrics = run.first
  stages = np.repeat([0, 1, 2], run.method.stages)
  adversary = run.method.adversary
  for stage, measured in zip(stages, metrics, strict=True):
    measured = dict(measured)
    assert measured.pop('finite')
    seen = {n: bool(jnp.isfinite(x).all()) for n, x in measured.items()}
    assert all(seen[n] or jnp.isnan(x).all() for n, x in measured.items())
    late = stage == 2
    want = {
      'perturbation/loss': adversary[stage],
      'perturbation/fooled': adversary[stage],
      'perturbation/grad_norm': adversary[stage],
      'coefficients/loss': late,
      'coefficients/grad_norm': late,
      'safety/loss': stage > 0 and adversary[stage],
    }
    assert seen == {n: want.get(n, stage == 1) for n in seen}
    assert all(x.shape in ((3,), ()) for x in measured.values())


def test_stages_move_what_they_should(run):
  states, _ = run.first
  stages = np.repeat([0, 1, 2], run.method.stages)
  for stage, (old, new) in zip(stages, itertools.pairwise(states), strict=True):

    def moved(field, old=old, new=new):
      leaves = zip(
        jax.tree.leaves(getattr(old, field)),
        jax.tree.leaves(getattr(new, field)),
        strict=True,
      )
      return [bool((np.asarray(x) != np.asarray(y)).any()) for x, y in leaves]

    assert all(moved('masks')) == (stage == 1 or not old.masks)
    assert any(moved('masks')) == (stage == 1 and bool(old.masks))
    assert any(moved('mask_states')) == (stage == 1 and bool(old.masks))
    assert any(moved('adversary')) == run.method.adversary[stage]
    assert any(moved('adversary_state')) == run.method.adversary[stage]
    assert any(moved('coefficient_state')) == (stage == 2)
    assert any(moved('coefficients')) == (run.method.coefficients and stage > 0)


@pytest.mark.parametrize('name', ['robust_leaf', 'robust_experts'])
def test_restarts_start_together_then_take_turns(get_run, name):
  states, _ = get_run(name).first
  turns = [{0, 1, 2, 3}, {0, 1, 2, 3}, {2}, {3}]
  for turn, (old, new) in zip(turns, itertools.pairwise(states), strict=True):
    for x, y in zip(old.adversary, new.adversary, strict=True):
      moved = (x != y).any(axis=(1, 2, 3, 4))
      assert set(np.flatnonzero(moved)) == turn


def test_the_adversary_starts_on_each_expert_alone(get_run, tiny):
  run = get_run('robust_experts')
  warm = run.method.stages[0]
  got = run.first[0][warm].adversary
  # A merge of K copies whose coefficients sum to 1 is the expert itself.
  for make in (run.method.make.func, dj.dam_robust):
    merger = make(tiny.logits_fn, **run.method.make.keywords, init=1 / 3)
    step = jax.jit(merger.step)
    for task in range(3):
      alone = dj.tree.stack([dj.tree.unstack(tiny.experts)[task]] * 3)
      state = merger.init(jax.random.key(0), tiny.base, alone)
      for batch in run.batches()[:warm]:
        state, _ = step(state, tiny.base, alone, batch)
      for x, y in zip(got, state.adversary, strict=True):
        np.testing.assert_allclose(x[:, task], y[:, task], rtol=1e-4, atol=1e-4)
  others = get_run('robust_leaf').first[0][warm].adversary
  assert jnp.abs(got.pattern_logits - others.pattern_logits).max() > 0.01


def test_merged_model_is_like_the_base(run):
  merged = run.finalize(run.first[0][-1], run.base, run.experts)
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, run.base)
  assert merged['step'] == run.base['step']
  for name in ('kernel', 'bias', 'gain'):
    assert (merged[name] != run.base[name]).any()


def test_no_task_vectors_give_the_base_bit_for_bit(run):
  num = len(run.experts['step'])
  experts = dj.tree.stack([run.base] * num)
  states, metrics = run.go(experts)
  assert metrics[-1]['finite']
  merged = run.finalize(states[-1], run.base, experts)
  chex.assert_trees_all_equal(merged, run.base)
  assert run.traces == 1


def test_the_last_good_state_stays_once_a_loss_is_not_finite(run):
  (good, *_), batch = run.first[0][1:], run.batches()[0]
  bad = batch._replace(images=batch.images * jnp.nan)
  state, metrics = run.step(good, run.base, run.experts, bad)
  assert not metrics['finite']
  chex.assert_trees_all_equal(state._replace(finite=good.finite), good)
  state, metrics = run.step(state, run.base, run.experts, batch)
  assert not metrics['finite']
  assert not state.finite
  chex.assert_trees_all_equal(state._replace(finite=good.finite), good)


@pytest.fixture(params=['concrete_leaf', 'robust_leaf'])
def some(request, get_run):
  return get_run(request.param)


def test_scanned_steps_are_a_loop_and_consume_their_own_state_only(some):
  states, metrics = some.first
  key = jax.random.key(0)
  given = (key, some.base, some.experts)
  state = some.merger.init(*given)
  batches = jax.tree.map(lambda *x: jnp.stack(x), *some.batches())
  scanned, measured = dj.scan_steps(some.merger)(
    state, some.base, some.experts, None, batches
  )
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves(given))
  assert_close(scanned, states[-1])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
  assert_close(measured, stacked)


def test_raveled_models_give_what_pytrees_give(some):
  states, _ = some.first
  flat = dj.tree.ravel(some.base)
  stacked = dj.tree.ravel(some.experts, leading=1)
  state, _ = some.step(states[0], flat, stacked, some.batches()[0])
  assert_close(state, states[1])
  merged = some.merger.finalize(states[-1], flat, stacked)
  assert_close(merged, some.finalize(states[-1], some.base, some.experts), 1e-2)


@pytest.mark.parametrize('name', ['paper_leaf', 'repo_sau'])
def test_bfloat16_logits_leave_the_state_in_float32(name, tiny, get_run):
  def logits_fn(params, images):
    return tiny.logits_fn(params, images.astype(jnp.bfloat16))

  (*_, want), _ = get_run(name).first
  (*_, state), metrics = Run(METHODS[name], tiny, logits_fn).first
  assert types(state) == types(want)
  assert all(x['finite'] for x in metrics)
  for mask in want.masks:
    apart = jnp.abs(state.masks[mask] - want.masks[mask])
    assert 0 < apart.max() < 0.2


def test_images_may_be_of_another_dtype(tiny):
  run = Run(METHODS['concrete_leaf'], tiny)
  state = run.merger.init(jax.random.key(0), run.base, run.experts)
  for batch in run.batches():
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch)
    state, metrics = run.step(state, run.base, run.experts, batch)
    assert metrics['finite']
    assert metrics['clean/loss'].dtype == jnp.float32


def test_models_raveled_apart_are_refused(tiny):
  merger = dj.adamerging(tiny.logits_fn)
  with pytest.raises(ValueError, match='raveled from different pytrees'):
    merger.init(
      jax.random.key(0), dj.tree.ravel(tiny.base), dj.tree.ravel(tiny.experts)
    )
  base = {**tiny.base, 'bias': jnp.zeros(9)}
  with pytest.raises(ValueError, match=r'bias: got float32\[3, 8\], want'):
    merger.init(jax.random.key(0), base, tiny.experts)
