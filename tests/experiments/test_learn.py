"""Runs that are killed, asked to stop, or cannot write: nothing is lost."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import preemption
from tests.experiments import learn_worker as worker

STATES = ('states', worker.NAME)


@pytest.fixture(scope='module')
def context():
  """Makes processes that have imported what the worker needs, and no more."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(
    ['tests.experiments.learn_worker', 'orbax.checkpoint.v1']
  )
  return context


@pytest.fixture(scope='module')
def whole(context, tmp_path_factory):
  """The folder of a run that nothing interrupts."""
  folder = tmp_path_factory.mktemp('runs') / 'whole'
  process = context.Process(target=worker.run, args=(folder,))
  process.start()
  process.join(timeout=120)
  assert process.exitcode == 0
  return folder


def assert_same(folder, whole):
  """Checks bit for bit that two runs ended alike."""
  for found, want in (
    (load_file(f / 'merged.safetensors') for f in (folder, whole)),
    (dict(np.load(f / 'metrics.npz')) for f in (folder, whole)),
  ):
    assert found.keys() == want.keys()
    for name, x in want.items():
      np.testing.assert_array_equal(found[name], x, name)
  table = f'curves/{worker.NAME}.csv'
  assert (folder / table).read_text() == (whole / table).read_text()


def starts(folder):
  """Returns for each start where it began, and how far it came."""
  found = (folder / 'done').read_text().split('start\n')[1:]
  return [[int(x) for x in text.split()] for text in found]


def test_a_run_that_is_killed_at_any_moment_loses_few_steps(context, whole):
  rng, kills, rounds = random.Random(0), 0, 0
  while kills < 20:
    folder = whole.parent / f'killed_{rounds}'
    rounds += 1
    while not (folder / 'metrics.npz').exists():
      started = context.Event()
      process = context.Process(
        target=worker.run_slowly, args=(folder, started)
      )
      process.start()
      assert started.wait(timeout=120)
      if kills < 20:
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
      process.join(timeout=120)
      kills += process.exitcode == -signal.SIGKILL
      assert process.exitcode in (0, -signal.SIGKILL)
    assert_same(folder, whole)
    reached = 0
    for steps in starts(folder):
      if steps:
        assert steps[0] >= reached - worker.MAX_LOST
        reached = max(reached, *steps)
    assert reached == worker.STEPS


def test_a_run_that_is_asked_to_stop_saves_and_exits_with_a_code(
  context, whole
):
  folder = whole.parent / 'asked'
  started, asked = context.Event(), context.Event()
  process = context.Process(
    target=worker.run_until_asked, args=(folder, started, asked)
  )
  process.start()
  assert started.wait(timeout=120)
  os.kill(process.pid, signal.SIGTERM)
  asked.set()
  process.join(timeout=60)
  assert process.exitcode == preemption.EXIT_CODE
  # Chunks of 3 would not end with the steps from where it goes on.
  process = context.Process(
    target=worker.run, args=(folder,), kwargs={'max_lost': 6}
  )
  process.start()
  process.join(timeout=120)
  assert process.exitcode == 0
  first, second = starts(folder)
  assert 0 < first[-1] < worker.STEPS
  # The chunk that was under way is done and saved, not announced.
  assert second[0] == first[-1] + worker.MAX_LOST // 2
  assert_same(folder, whole)


def test_a_full_disk_is_said_and_the_run_can_go_on(context, whole):
  folder = whole.parent / 'full'
  process = context.Process(target=worker.run_on_a_full_disk, args=(folder,))
  process.start()
  process.join(timeout=120)
  assert 'free some space' in (folder / 'error').read_text()
  process = context.Process(target=worker.run, args=(folder,))
  process.start()
  process.join(timeout=120)
  assert process.exitcode == 0
  assert_same(folder, whole)
