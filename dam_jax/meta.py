"""One meta-learning step for AdaMerging, Concrete and Defense-Aware Merging.

The merged model is `theta = theta_0 + sum_t w_t * (m * tau_t)` with
coefficients `w` and masks `m` over the task vectors `tau`. A step, at most:

  1. draws the masks; *inner*: adapts `w` to them on unlabelled images;
  2. *perturbation*: searches the adversary that fools `theta`, fixed;
  3. *masks*: lowers the clean loss on images and the safety loss on perturbed
     images, over the logits of the masks (and `w`, where asked).

When the masks are done, *coefficients* may follow: `w` is learned under frozen
masks. Which parts a method has, `dam_jax.meta_spec` says; `dam_jax.learned`
names the published ones.

All tasks' images go through one forward pass, and the arithmetic on parameters
is on raveled vectors: pass `base` and `experts` through `dam_jax.tree.ravel`
once to spare every step that copy.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from dam_jax import losses
from dam_jax import masks as masks_lib
from dam_jax.base import Merger
from dam_jax.meta_spec import MetaSpec
from dam_jax.meta_state import Draws
from dam_jax.meta_state import MetaState
from dam_jax.meta_state import model_of
from dam_jax.typing import Batch, LogitsFn, Params, PreprocessFn, TaskLogitsFn


def identity(images: jax.Array) -> jax.Array:
  """Preprocesses nothing."""
  return images


def meta_merger(
  logits_fn: LogitsFn,
  spec: MetaSpec,
  *,
  preprocess_fn: PreprocessFn = identity,
  task_logits_fn: TaskLogitsFn | None = None,
  num_tasks: int | None = None,
) -> Merger:
  """Makes the merger that a spec describes.

  Args:
    logits_fn: one forward pass for the images of all tasks.
    spec: which parts the step has.
    preprocess_fn: from images in [0, 1] to what `logits_fn` reads.
    task_logits_fn: where given, the adversary starts by fooling each expert
      alone: that is where it moves before the first step of the masks.
    num_tasks: `T`; None takes the number of experts.

  Returns:
    A merger over `Batch`es; its metrics are `phase/loss` `[T]` and more, NaN in
    steps that lack the phase, and `finite` [].
  """
  engine = _Engine(logits_fn, spec, preprocess_fn, task_logits_fn, num_tasks)
  return Merger(engine.init, engine.step, engine.finalize, spec.plan())


@dataclasses.dataclass(frozen=True)
class _Engine:
  """The pure functions of `meta_merger`; see there."""

  logits_fn: LogitsFn
  spec: MetaSpec
  preprocess_fn: PreprocessFn
  task_logits_fn: TaskLogitsFn | None
  num_tasks: int | None
  axis_name: str | None = None

  def init(self, key: jax.Array, base: Params, experts: Params) -> MetaState:
    """Returns the state before the first step."""
    model = model_of(base, experts)
    r, c = self.spec, self.spec.coefficients
    num, *shape = model.experts.vector.shape
    dtype = model.experts.vector.dtype
    leaves = (len(model.base.layout.names),) if c.granularity == 'leaf' else ()
    coefficients = c.start((num, *leaves), dtype)
    logits = {
      name: jnp.full((num, *shape) if m.per_task else shape, m.init, dtype)
      for name, m in r.masks.items()
    }
    mask_key, adversary_key = jax.random.split(key)
    adversary = adversary_state = None
    if r.adversary is not None:
      adversary = r.adversary.start(adversary_key, self.num_tasks or num)
      adversary_state = jax.vmap(r.adversary.tx.init)(adversary)
    return MetaState(
      key=mask_key,
      count=jnp.zeros([], jnp.int32),
      finite=jnp.ones([], bool),
      coefficients=coefficients,
      inner_state=c.inner_tx and c.inner_tx.init(coefficients),
      joint_state=c.joint_tx and c.joint_tx.init(coefficients),
      coefficient_state=c.tx.init(coefficients),
      leak=jnp.zeros_like(coefficients),
      masks=logits,
      mask_states={n: r.masks[n].tx.init(x) for n, x in logits.items()},
      adversary=adversary,
      adversary_state=adversary_state,
    )

  def step(self, state, base, experts, batch: Batch, *, axis_name=None):
    """Returns the state after one step, and what it measured."""
    r, model = self.spec, model_of(base, experts)
    this = dataclasses.replace(self, axis_name=axis_name)
    early = functools.partial(this._mask_stage, model=model, batch=batch)
    late = functools.partial(this._coefficient_stage, model=model, batch=batch)
    end = r.warmup_steps + r.mask_steps
    if not end:
      new, metrics = late(state)
    elif not r.coefficient_steps:
      new, metrics = early(state)
    else:
      new, metrics = lax.cond(state.count < end, early, late, state)
    finite = state.finite & metrics.pop('finite')
    new = new._replace(count=state.count + 1)
    # Masks are kept where they move, so that no step holds two copies of them.
    rest = jax.tree.map(
      functools.partial(_select, finite),
      _without_masks(new),
      _without_masks(state),
    )
    new = rest._replace(
      finite=finite, masks=new.masks, mask_states=new.mask_states
    )
    return new, {**metrics, 'finite': finite}

  def finalize(self, state, base, experts) -> Params:
    """Returns the merged model, like the base."""
    model, c = model_of(base, experts), self.spec.coefficients
    coefficients = state.coefficients
    if c.inner_tx is not None and not self.spec.coefficient_steps:
      coefficients = c.start(coefficients.shape, coefficients.dtype)
    values = self._final_values(state, model.base.layout)
    return model.base.unravel(self._combine(model, coefficients, values))

  def _mean(self, x):
    """Averages over the devices that share a batch, if there are several."""
    return x if self.axis_name is None else lax.pmean(x, self.axis_name)

  # --- masks ---

  def _uniforms(self, state, step, layout):
    """Draws one uniform a mask and parameter."""
    return {
      name: m.uniform_fn(
        jax.random.fold_in(state.key, i), step, state.masks[name], layout
      )
      for i, (name, m) in enumerate(self.spec.masks.items())
    }

  def _values(self, logits, uniforms):
    return {
      name: masks_lib.value(m, logits[name], uniforms[name])
      for name, m in self.spec.masks.items()
    }

  def _final_values(self, state, layout):
    r = self.spec
    uniforms = self._uniforms(state, r.mask_steps, layout)
    return {
      name: masks_lib.final_value(m, state.masks[name], uniforms[name], r.final)
      for name, m in r.masks.items()
    }

  # --- the model ---

  def _forward(self, model, theta):
    """Returns `pixels -> logits` of the merged model."""
    params = model.base.unravel(theta)
    # Losses and metrics have the parameters' dtype, whatever the model's.
    return lambda pixels: self.logits_fn(params, pixels).astype(theta.dtype)

  def _combine(self, model, coefficients, values):
    """Returns `theta_0 + sum_t w_t * (m * tau_t)`, raveled."""
    return model.base.vector + masks_lib.masked_sum(
      model.deltas, model.base.layout, coefficients, self.spec.masks, values
    )

  def _clean(self, model, theta, images, references):
    """Clean loss `[T]`."""
    logits = self._forward(model, theta)(self.preprocess_fn(images))
    return self.spec.clean(logits, references)

  # --- phases ---

  def _inner(self, state, model, values, images, references):
    """Adapts the coefficients to the masks, from their initial value."""
    c = self.spec.coefficients
    start = c.start(state.coefficients.shape, state.coefficients.dtype)
    at = state.coefficients if c.stale else start

    def objective(w):
      theta = self._combine(model, w, values)
      each = self._clean(model, theta, images, references)
      return jnp.sum(each), each

    assert c.inner_tx is not None
    grad, each = self._mean(jax.grad(objective, has_aux=True)(at))
    grad = grad + state.leak if c.leak else grad
    updates, inner_state = c.inner_tx.update(grad, state.inner_state, start)
    return optax.apply_updates(start, updates), inner_state, each

  def _alone(self, model):
    """Returns `pixels -> logits` of the experts, each on its own task."""
    logits_fn, base = self.task_logits_fn, model.base.vector
    vectors = model.experts.vector
    assert logits_fn is not None

    def forward(pixels):
      def one(args):
        vector, task, own = args
        params = model.base.unravel(base + (vector - base))
        return logits_fn(params, task, own)

      tasks = jnp.arange(len(vectors))
      return lax.map(one, (vectors, tasks, pixels)).astype(vectors.dtype)

    return forward

  def _ascend(self, state, model, theta, draws: Batch, *, warm=False):
    """Returns where the adversary moves; no gradient in the weights."""
    r, adversary = self.spec, self.spec.adversary
    assert adversary is not None
    forward = self._forward(model, theta)
    if warm and self.task_logits_fn is not None:
      forward = self._alone(model)
    if r.shared:
      plain = self._combine(model, state.coefficients, {})
      reference = self._forward(model, plain)

    def gain_fn(pixels, images, references, classes):
      clean = self.preprocess_fn(images)
      predicted = forward(clean) if r.labels == 'prediction' else references
      labels, logits = jnp.argmax(predicted, axis=-1), forward(pixels)
      each = losses.cross_entropy(logits, labels)
      gain = jnp.mean(jnp.minimum(each, adversary.cap), axis=-1)
      if adversary.seeds is not None:
        away = losses.targeted(logits, labels, jnp.maximum(classes, 0))
        gain = jnp.where(classes < 0, gain, -away)
      if r.shared:
        apart = losses.unshared_divergence(
          logits,
          reference(pixels),
          labels,
          jnp.argmax(reference(clean), axis=-1),
        )
        gain = r.shared.untargeted * gain - r.shared.divergence * apart
      fooled = jnp.argmax(logits, axis=-1) != labels
      return gain, jnp.mean(fooled.astype(gain.dtype), axis=-1)

    params, opt_state, found = adversary.ascend(
      state.adversary,
      state.adversary_state,
      adversary.turns(state.count, warm=warm),
      draws,
      gain_fn,
      self._mean,
    )
    moved = {'adversary': params, 'adversary_state': opt_state}
    return moved, {f'perturbation/{key}': x for key, x in found.items()}

  def _outer(self, state, model, draws, clean: float, safety: float):
    """Returns `theta -> (loss, metrics)` over one or two draws of images."""
    r = self.spec
    (images, references), (safe_images, safe_references) = draws[0], draws[-1]
    needs_clean = clean or r.shared or r.safety_loss == 'consistency'
    views = [self.preprocess_fn(images)] if needs_clean else []
    shunned = None
    if safety and r.adversary is not None:
      perturbed, shunned = r.adversary.deal(
        state.adversary, safe_images, state.count, self.axis_name
      )
      views.append(perturbed)
    pixels, num = jnp.concatenate(views, axis=1), images.shape[1]
    if r.shared and safety:
      plain = self._combine(model, state.coefficients, {})
      reference = jnp.argmax(self._forward(model, plain)(pixels), axis=-1)

    def objective(theta):
      logits = self._forward(model, theta)(pixels)
      fixed, perturbed = lax.stop_gradient(logits[:, :num]), logits[:, -num:]
      total, metrics = 0.0, {}
      if clean:
        each = self.spec.clean(logits[:, :num], references)
        metrics['clean/loss'] = each
        total += clean * jnp.sum(each)
      if safety:
        each = r.safety(perturbed, fixed, safe_references, shunned)
        metrics['safety/loss'] = each
        total += safety * jnp.sum(each)
      if safety and r.shared:
        each = losses.unlearn_shared(
          perturbed, fixed, reference[:, :num], reference[:, num:]
        )
        metrics['shared/loss'] = each
        total += r.shared.weight * jnp.sum(each)
      return total, metrics

    return objective

  # --- stages ---

  def _mask_stage(self, state, *, model, batch: Batch):
    r, c = self.spec, self.spec.coefficients
    draws = Draws(batch)
    step, layout = state.count - r.warmup_steps, model.base.layout
    uniforms = self._uniforms(state, step, layout)
    values = self._values(state.masks, uniforms)
    measured = {}
    coefficients, inner_state = state.coefficients, state.inner_state
    inner_draw = None
    if c.inner_tx is not None:
      inner_draw = draws.one()
      coefficients, inner_state, each = self._inner(
        state, model, values, *inner_draw
      )
      measured['inner/loss'] = each
    if r.adversary is not None:
      theta = self._combine(model, coefficients, values)
      seen = (state, model, theta, draws.many(r.adversary.ascents))
      if r.warmup_steps:
        warm = state.count < r.warmup_steps
        warm_up = functools.partial(self._ascend, warm=True)
        moved, fooled = lax.cond(warm, warm_up, self._ascend, *seen)
      else:
        moved, fooled = self._ascend(*seen)
      state = state._replace(**moved)
      measured.update(fooled)
    learn = functools.partial(
      self._learn,
      model=model,
      draws=draws,
      uniforms=uniforms,
      coefficients=coefficients,
      inner_state=inner_state,
      inner_draw=inner_draw,
      measured=measured,
    )
    if not r.warmup_steps:
      return learn(state)
    return _when(
      state.count >= r.warmup_steps,
      lambda state, _: learn(state),
      state,
      self._metrics(measured, draws),
    )

  def _learn(
    self,
    state,
    *,
    model,
    draws,
    uniforms,
    coefficients,
    inner_state,
    inner_draw,
    measured,
  ):
    """Moves the masks, and the coefficients where they are learned jointly."""
    r, c = self.spec, self.spec.coefficients
    measured, leak = dict(measured), jnp.zeros_like(coefficients)
    draws = draws.rest()
    for names, clean, safety in r.updates:
      outer = self._outer(
        state,
        model,
        [draws.one() for _ in range(self.spec.draws(clean, safety))],
        clean,
        safety,
      )

      def objective(logits, w, outer=outer, state=state):
        values = self._values({**state.masks, **logits}, uniforms)
        if c.inner_tx is not None and c.inner_gradient == 'exact':
          w, _, _ = self._inner(state, model, values, *inner_draw)
        return outer(self._combine(model, w, values))

      moved = {name: state.masks[name] for name in names}
      # The gradient in the coefficients reads all task vectors once more.
      argnums = (0, 1) if c.reads_leak else (0,)
      grads, each = self._mean(
        jax.grad(objective, argnums=argnums, has_aux=True)(moved, coefficients)
      )
      norm = optax.tree.norm(grads)
      measured.update(each, **{f'{"+".join(names)}/grad_norm': norm})
      leak = functools.reduce(jnp.add, grads[1:], leak)
      finite = state.finite & _all_finite(measured)

      def move(logits, states, grads=grads[0]):
        logits, states = dict(logits), dict(states)
        for name, grad in grads.items():
          updates, states[name] = r.masks[name].tx.update(
            grad, states[name], logits[name]
          )
          logits[name] = optax.apply_updates(logits[name], updates)
        return logits, states

      moved_states = {name: state.mask_states[name] for name in names}
      moved, moved_states = _when(finite, move, moved, moved_states)
      state = state._replace(
        masks={**state.masks, **moved},
        mask_states={**state.mask_states, **moved_states},
      )
    if c.joint_tx is not None:
      updates, joint_state = c.joint_tx.update(
        leak, state.joint_state, coefficients
      )
      coefficients = optax.apply_updates(coefficients, updates)
      state = state._replace(joint_state=joint_state)
    state = state._replace(
      coefficients=coefficients, inner_state=inner_state, leak=leak
    )
    return state, self._metrics(measured, draws)

  def _coefficient_stage(self, state, *, model, batch: Batch):
    r, c = self.spec, self.spec.coefficients
    draws, values = Draws(batch), self._final_values(state, model.base.layout)
    measured = {}
    first = state.count == r.warmup_steps + r.mask_steps
    coefficients = state.coefficients
    if c.inner_tx is not None:
      coefficients = jnp.where(first, c.init, coefficients)
    if r.coefficient_safety and r.adversary is not None:
      theta = self._combine(model, coefficients, values)
      images = draws.many(r.adversary.ascents)
      moved, measured = self._ascend(state, model, theta, images)
      state = state._replace(**moved)
    safety = r.coefficient_safety
    own = [draws.one() for _ in range(self.spec.draws(1.0, safety))]
    outer = self._outer(state, model, own, 1.0, safety)
    grad, each = self._mean(
      jax.grad(lambda w: outer(self._combine(model, w, values)), has_aux=True)(
        coefficients
      )
    )
    if c.leak_last:
      grad = jnp.where(first, grad + state.leak, grad)
    updates, coefficient_state = c.tx.update(
      grad, state.coefficient_state, coefficients
    )
    each['coefficients/loss'] = each.pop('clean/loss')
    each['coefficients/grad_norm'] = optax.tree.norm(grad)
    state = state._replace(
      coefficients=optax.apply_updates(coefficients, updates),
      coefficient_state=coefficient_state,
    )
    return state, self._metrics({**measured, **each}, draws)

  def _metrics(self, measured, draws):
    """Adds NaN for what this step did not measure, so that all steps agree."""
    per_task, scalars = self.spec.metrics()
    num_tasks, dtype = draws.num_tasks, jnp.result_type(*measured.values())
    nan = {name: jnp.full(num_tasks, jnp.nan, dtype) for name in per_task}
    nan |= {name: jnp.full([], jnp.nan, dtype) for name in scalars}
    return {**nan, **measured, 'finite': _all_finite(measured)}


def _all_finite(measured: Mapping[str, jax.Array]) -> jax.Array:
  finite = [jnp.all(jnp.isfinite(x)) for x in measured.values()]
  return jnp.all(jnp.stack(finite))


def _when(condition: jax.Array, fn: Callable, *carry: Any) -> Any:
  """Returns `fn(*carry)` where a condition holds, else what it was given.

  A loop of one turn or none: it changes what it carries in place, where a
  `lax.cond` copies what a branch leaves as it is.
  """
  turns = condition.astype(jnp.int32)
  return lax.fori_loop(0, turns, lambda _, carry: fn(*carry), carry)


def _without_masks(state: MetaState) -> MetaState:
  return state._replace(masks={}, mask_states={})


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
  return jnp.where(condition, new, old)
