"""Settings of JAX and names that the tests and every doctest rely on."""

import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# XLA's older emitters compile what the tests do in a third of the time. It
# reads this once, when it first compiles; processes that tests start inherit
# it, and an XLA that knows no such option ignores it.
_EMITTERS = '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_EMITTERS}'

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
def _compile_fast(tmp_path_factory):
  """Tests compile much, often the same, and compute little.

  So do the processes that they start, which read the environment. All that
  pytest runs at once share what is compiled.
  """
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  options = {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': str(folder / 'compiled'),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: jax.config.values[name] for name in options}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in options.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True, scope='session')
def _collect_less_garbage():
  """What imports leave is for good, and need not be looked at again."""
  before = gc.get_threshold()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)
  yield
  gc.set_threshold(*before)
  gc.unfreeze()


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  yield
  from experiments import command

  command.forget_programs()


@pytest.fixture(autouse=True, scope='session')
def _doctest_names(doctest_namespace):
  import dam_jax

  doctest_namespace.update(dj=dam_jax, jax=jax, jnp=jnp, np=np, optax=optax)
