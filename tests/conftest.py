"""Fixtures and options of the tests."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dam_jax as dj

# Programs of tests run once, on little. Most of their time is compilation, and
# LLVM is a sixth faster without its slow passes. Subprocesses inherit it.
_FLAG = '--xla_llvm_disable_expensive_passes'
if _FLAG not in (flags := os.environ.get('XLA_FLAGS', '')):
  os.environ['XLA_FLAGS'] = f'{flags} {_FLAG}=true'.strip()

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get('DAM_JAX_SHARED', ROOT.parent / 'shared'))

hypothesis.settings.register_profile(
  'dam_jax', deadline=None, derandomize=True, max_examples=20
)
hypothesis.settings.load_profile('dam_jax')


def pytest_addoption(parser):
  parser.addoption(
    '--golden',
    type=Path,
    default=SHARED / 'golden',
    metavar='FOLDER',
    help='arrays of the reference implementation to compare with',
  )
  for peer in ('fusion_bench', 'mergekit', 'torch'):
    parser.addoption(
      f'--{peer}_python',
      default='',
      metavar='PYTHON',
      help=f'an environment with {peer} to compare with',
    )


@pytest.fixture(scope='session')
def shared() -> Path:
  """The folder of checkpoints and reference arrays beside the repository."""
  if not SHARED.is_dir():
    pytest.skip(f'no {SHARED}: set DAM_JAX_SHARED to the folder that has it')
  return SHARED


@pytest.fixture(scope='session')
def golden(request) -> Path:
  """The folder of reference arrays that `--golden` names."""
  folder = request.config.getoption('golden')
  if not folder.is_dir():
    pytest.skip(f'no {folder}: pass --golden=<folder>')
  return folder


class Tiny(NamedTuple):
  """A model of 400 parameters for three tasks, of 5, 3 and 4 classes.

  Attributes:
    base: parameters of three dtypes.
    experts: the same, leaves `[3, ...]`.
    heads: `[3, 8, 5]`, frozen.
  """

  base: Any
  experts: Any
  heads: np.ndarray
  image_shape = (4, 4, 3)
  classes = (5, 3, 4)

  def logits_fn(self, params, images):
    """Maps images `[3, B, 4, 4, 3]` to logits `[3, B, 5]`."""
    dtype = images.dtype
    kernel, bias, gain = (
      params[name].astype(dtype) for name in ('kernel', 'bias', 'gain')
    )
    x = images.reshape(*images.shape[:2], -1) @ kernel
    x = jnp.tanh(x + bias[None, None]) * gain[None, None]
    logits = jnp.einsum('tbd,tdl->tbl', x, jnp.asarray(self.heads, dtype))
    real = np.arange(5)[None] < np.array(self.classes)[:, None]
    return jnp.where(real[:, None], logits, dj.losses.MASKED_LOGIT)

  def batch(self, phases, *, seed=0, size=4):
    """Returns images and references of one step."""
    rng = np.random.default_rng(seed)
    shape = (phases, 3, size)
    logits = np.where(
      np.arange(5) < np.array(self.classes)[:, None, None],
      2 * rng.normal(size=(*shape, 5)),
      -np.inf,
    )
    return dj.Batch(
      jnp.asarray(rng.uniform(size=(*shape, *self.image_shape)), jnp.float32),
      jax.nn.softmax(jnp.asarray(logits, jnp.float32)),
    )


@pytest.fixture(scope='session')
def tiny() -> Tiny:
  """A model, its experts and batches, for the learned merges."""
  rng = np.random.default_rng(0)
  base = {
    'kernel': jnp.asarray(rng.normal(size=(48, 8)) / 4, jnp.float32),
    'bias': jnp.zeros(8),
    'gain': jnp.ones(8, jnp.bfloat16),
    'step': jnp.array(3, jnp.int32),
  }
  experts = jax.tree.map(
    lambda x: (
      x[None] + jnp.asarray(rng.normal(size=(3, *x.shape)) / 4, x.dtype)
    ),
    {name: base[name] for name in ('kernel', 'bias', 'gain')},
  )
  heads = rng.normal(size=(3, 8, 5)).astype(np.float32)
  return Tiny(base, {**experts, 'step': jnp.arange(3)}, heads)
