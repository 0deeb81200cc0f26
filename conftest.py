"""Settings of JAX and names that the tests and every doctest rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

# Strict promotion is for this package: optax mixes its integer step counts
# with floats in Adam's bias correction and in schedules.
_standard = jax.numpy_dtype_promotion('standard')
optax.tree.bias_correction = _standard(optax.tree.bias_correction)


def _standard_schedule(factory):
  return lambda *args, **kwargs: _standard(factory(*args, **kwargs))


for _name in [name for name in dir(optax) if name.endswith('_schedule')]:
  if _name != 'scale_by_schedule':
    setattr(optax, _name, _standard_schedule(getattr(optax, _name)))


@pytest.fixture(autouse=True, scope='session')
def _doctest_names(doctest_namespace):
  import dam_jax

  doctest_namespace.update(dj=dam_jax, jax=jax, jnp=jnp, np=np, optax=optax)
