"""Methods that `jax.jit` compiles once an object."""

from collections.abc import Callable
import functools
from typing import Any

import jax


def compiled(*static_argnums: int) -> Callable[[Callable[..., Any]], Any]:
  """Has `jax.jit` compile a method, with its object's `compiler_options`.

  Args:
    *static_argnums: of the method's arguments, without `self`.

  >>> class Scale:
  ...   compiler_options = {'xla_backend_optimization_level': 0}
  ...   factor = 3.0
  ...   @compiled(1)
  ...   def times(self, x, power):
  ...     return x * self.factor ** power
  >>> float(Scale().times(2.0, 2))
  18.0
  """

  def of(method: Callable[..., Any]) -> functools.cached_property:
    return functools.cached_property(
      lambda self: jax.jit(
        functools.partial(method, self),
        static_argnums=static_argnums,
        compiler_options=self.compiler_options,
      )
    )

  return of
