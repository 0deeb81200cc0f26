"""Floating-point operations of a program, counted on what JAX traces.

XLA's own count takes a loop's body once, and knows neither fused nor
recomputed products of a program that is not compiled yet.
"""

import math
from typing import Any

import jax
from jax.extend import core


def count(fn: Any, *args: Any) -> int:
  """Counts the operations of a function's matrix products.

  Args:
    fn: traced, not run.
    *args: of it; arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    Multiplications and additions. The body of a scan counts as often as it
    runs, the dearest branch of a condition once, and a body of a loop without
    a known length once.

  Examples:
    >>> x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    >>> count(lambda x: x @ x.T, x)
    512
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
  if equation.primitive.name == 'dot_general':
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params['dimension_numbers']
    inner = math.prod(left[i] for i in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  counts = [_count(jaxpr) for jaxpr in _inside(equation.params)]
  if equation.primitive.name == 'cond':
    return max(counts)
  return sum(counts) * equation.params.get('length', 1)


def _inside(params: Any) -> list[Any]:
  """Returns the jaxprs among an equation's parameters."""
  found = []
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        found.append(x.jaxpr)
      elif isinstance(x, core.Jaxpr):
        found.append(x)
  return found
