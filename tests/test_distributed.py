"""Several processes on one machine learn what one process learns."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dam_jax import checkpoint
from dam_jax import distributed
from dam_jax import sharding
from tests import distributed_worker as worker

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  """What two processes of four devices leave."""
  folder = tmp_path_factory.mktemp('together')
  address = f'127.0.0.1:{free_port()}'
  command = [sys.executable, '-m', 'tests.distributed_worker', address, '2']
  env = {k: x for k, x in os.environ.items() if k not in distributed.VARIABLES}
  running = [
    subprocess.Popen(
      [*command, str(i), str(folder)],
      cwd=ROOT,
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in running:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
  return folder


@pytest.fixture(scope='module')
def alone():
  """The same in this process, on eight devices."""
  return worker.learn(sharding.make_mesh({'data': 4, 'model': 2}))


def test_two_processes_learn_what_one_does(together, alone):
  _, merged, losses = alone
  with np.load(together / 'merged.npz') as file:
    np.testing.assert_allclose(file['losses'], losses, rtol=1e-5)
    for name, x in merged.items():
      np.testing.assert_allclose(file[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sizes', [{'data': 4, 'model': 2}, {'data': 8}])
def test_one_process_restores_what_two_have_saved(together, alone, sizes):
  mesh = sharding.make_mesh(sizes)
  merger, base, experts = worker.problem()
  merger = worker.dj.data_parallel(merger, mesh)
  like = merger.init(jax.random.key(0), *sharding.place(base, experts, mesh))
  found = checkpoint.restore_state(together / 'state', like)
  for got, want, wanted in zip(
    *map(jax.tree.leaves, (found, alone[0], like)), strict=True
  ):
    assert got.sharding == wanted.sharding
    if not jax.numpy.issubdtype(got.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_processes_that_were_given_different_things_say_which(together):
  for index in range(2):
    text = (together / f'error_{index}').read_text()
    assert 'seed: not that of process 0 on 1' in text
    assert 'config' not in text


def test_nothing_is_joined_unless_asked(monkeypatch):
  for name in distributed.VARIABLES:
    monkeypatch.delenv(name, raising=False)
  assert not distributed.initialize()
  with pytest.raises(ValueError, match='JAX_NUM_PROCESSES=None'):
    distributed.initialize('127.0.0.1:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(ValueError, match='JAX_PROCESS_ID=2'):
    distributed.initialize('127.0.0.1:1', process_id=2)
  distributed.check_agreement({'config': 1})


def test_images_that_do_not_divide_are_refused():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match='12 images a task do not divide over 8'):
    distributed.local_images(mesh, 12)


@pytest.mark.parametrize(
  ('starts', 'want'), [((8, 4, 4), slice(4, 12)), ((0, 8), None)]
)
def test_images_of_a_process_are_one_stretch(monkeypatch, starts, want):
  class OfThisProcess:
    """Has the images of some devices, as if others were elsewhere."""

    def __init__(self, mesh, spec):
      pass

    def addressable_devices_indices_map(self, shape):
      return {i: (slice(x, x + 4),) for i, x in enumerate(starts)}

  monkeypatch.setattr(distributed, 'NamedSharding', OfThisProcess)
  mesh = sharding.make_mesh({'data': 4, 'model': 2})
  if want is None:
    with pytest.raises(ValueError, match='do not lie side by side'):
      distributed.local_images(mesh, 16)
  else:
    assert distributed.local_images(mesh, 16) == want
