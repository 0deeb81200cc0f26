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


@pytest.fixture(autouse=True, scope='session')
def _doctest_names(doctest_namespace):
  import dam_jax

  doctest_namespace.update(
    dj=dam_jax, jax=jax, jnp=jnp, np=np, optax=optax
  )
