"""Descents that are watched: what they leave, and how they go on."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import descent
from experiments import preemption


@jax.jit
def _double(state, start):
  """Four steps: each doubles, and counts."""

  def body(x, i):
    return 2 * x + 1, {'loss': x, 'step': (start + i).astype(jnp.float32)}

  return jax.lax.scan(body, state, jnp.arange(4))


def _log(workdir, *, who='me', seen=None, max_lost=16):
  def advance(name, done, steps):
    if seen is not None:
      seen.append((name, done, steps))

  return descent.Log(
    workdir, lambda: {'who': who}, max_lost=max_lost, advance=advance
  )


def _down(log, name='down', steps=24):
  return log(_double, jnp.float32(0), name=name, steps=steps, chunk=4)


@pytest.fixture
def stop(monkeypatch):
  """Has SIGTERM come after so many chunks."""

  def after(chunks):
    left = iter([False] * (chunks - 1) + [True])
    monkeypatch.setattr(preemption.Watch, 'asked', lambda self: next(left))

  yield after
  monkeypatch.undo()


def test_a_descent_leaves_its_curve(tmp_path):
  seen = []
  assert _down(_log(tmp_path, seen=seen, max_lost=100)) == 2.0**24 - 1
  assert seen == [('0-down', n, 24) for n in range(0, 24, 4)]
  with (tmp_path / 'curves' / '0-down.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [float(row['step']) for row in rows] == [*range(24)]
  assert [float(row['loss']) for row in rows] == [2.0**n - 1 for n in range(24)]
  assert not (tmp_path / 'states').exists()
  assert descent.descend(
    _double, jnp.float32(0), steps=24, chunk=4
  ) == pytest.approx(2.0**24 - 1)


def test_descents_go_on_one_by_one(tmp_path, monkeypatch, stop):
  stop(6 + 3)
  log = _log(tmp_path)
  _down(log)
  with pytest.raises(preemption.Preempted, match='1-other: .* step 12'):
    _down(log, 'other')
  monkeypatch.undo()
  seen = []
  log = _log(tmp_path, seen=seen)
  assert _down(log) == 2.0**24 - 1
  assert _down(log, 'other') == 2.0**24 - 1
  assert [done for _, done, _ in seen] == [12, 16, 20]
  text = (tmp_path / 'curves' / '1-other.csv').read_text()
  assert len(text.splitlines()) == 25
  log.forget()
  assert not (tmp_path / 'states').exists()


def test_another_run_does_not_go_on(tmp_path, stop, monkeypatch):
  stop(2)
  with pytest.raises(preemption.Preempted):
    _down(_log(tmp_path))
  monkeypatch.undo()
  with pytest.raises(ValueError, match='saves of a run with another config'):
    _down(_log(tmp_path, who='you'))
  with pytest.raises(ValueError, match='of another model'):
    _log(tmp_path)(_double, {'x': jnp.zeros(2)}, name='down', steps=24, chunk=4)
  assert _down(_log(tmp_path)) == 2.0**24 - 1


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
  def run(state, start):
    loss = jnp.where(start + jnp.arange(4) > 9, jnp.nan, 1.0)
    return state, {'loss': loss, 'grad_norm': jnp.ones(4)}

  log = _log(tmp_path, max_lost=8)
  with pytest.raises(FloatingPointError, match='at step 10: lower learn'):
    log(run, jnp.zeros(()), name='up', steps=24, chunk=4)
  text = (tmp_path / 'curves' / '0-up.csv').read_text()
  assert np.isnan(float(text.splitlines()[11].split(',')[-1]))
