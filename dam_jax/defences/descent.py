"""The one training loop of the defences, and the check of their numbers.

What is trained is any pytree: masks, or a model as one vector.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import optax
  >>> keys = jax.random.split(jax.random.key(0), 3)
  >>> x, _ = descend(lambda x, key: 2 * x, optax.sgd(0.25), jnp.ones(1), keys)
  >>> x.tolist()
  [0.125]
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


def descend(
  grad_fn: Callable[[Any, jax.Array], Any],
  tx: optax.GradientTransformation,
  params: Any,
  keys: jax.Array,
  state: Any = None,
  *,
  project: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, Any]:
  """Takes one step a key.

  Args:
    grad_fn: maps `(params, key)` to what `tx` reads.
    tx: optax transformation.
    params: where to start, any pytree.
    keys: `[steps]`.
    state: of `tx`, None for a fresh one.
    project: back into the allowed set, after each step.

  Returns:
    Where it leads, and the state there.
  """

  def step(carry, key):
    params, state = carry
    updates, state = tx.update(grad_fn(params, key), state, params)
    return (project(optax.apply_updates(params, updates)), state), None

  state = tx.init(params) if state is None else state
  return jax.lax.scan(step, (params, state), keys)[0]


def check_at_least(low: float, **values: float) -> None:
  """Raises where a value is lower, or nan."""
  for name, value in values.items():
    if not value >= low:
      raise ValueError(f'{name} must be at least {low}, got {value}')
