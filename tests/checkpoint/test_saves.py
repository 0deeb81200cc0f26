"""Saves of a run: whole or not at all, kept by policy, and said when bad."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from dam_jax import checkpoint
from dam_jax import sharding
from dam_jax.checkpoint import Keep


def make(step, size=64):
  return {
    'key': jax.random.key(step),
    'count': jnp.array(step, jnp.int32),
    'masks': jnp.arange(size, dtype=jnp.float32) + step,
  }


def save_all(folder, steps, **options):
  with checkpoint.Saves(folder, **options) as saves:
    for step in steps:
      saves.save(step, make(step), {'loss': np.arange(step, dtype=np.float32)})


def assert_is(save, step):
  assert save.step == step
  want = make(step)
  np.testing.assert_array_equal(save.state['masks'], want['masks'])
  assert save.state['count'] == step
  assert save.state['key'] == want['key']
  np.testing.assert_array_equal(save.metrics['loss'], np.arange(step))


def test_the_newest_save_is_read(tmp_path):
  with checkpoint.Saves(tmp_path / 'states') as saves:
    assert saves.restore(make(0)) is None
  save_all(tmp_path / 'states', [3, 7])
  with checkpoint.Saves(tmp_path / 'states') as saves:
    assert saves.steps == [7]
    assert_is(saves.restore(make(0)), 7)


def test_saves_are_kept_by_policy(tmp_path):
  save_all(tmp_path, range(1, 10), keep=Keep(last=2, every=4))
  with checkpoint.Saves(tmp_path) as saves:
    assert saves.steps == [4, 8, 9]
  with pytest.raises(ValueError, match='last=0 and every=-1'):
    Keep(last=0, every=-1)


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros(2_000_000)
  with checkpoint.Saves(tmp_path, keep=Keep(last=5)) as saves:
    for i in range(1, 6):
      x = step(x)
      saves.save(i, {'x': x}, {'loss': np.zeros(i)})
      x = step(x)
  for i in range(5, 0, -1):
    with checkpoint.Saves(tmp_path) as saves:
      found = saves.restore({'x': jnp.zeros(2_000_000)})
    np.testing.assert_array_equal(found.state['x'], 2 * i - 1)
    assert found.step == i
    checkpoint_folder = tmp_path / str(i)
    checkpoint_folder.rename(tmp_path.parent / f'gone_{i}')


def test_a_save_is_read_onto_another_mesh(tmp_path):
  def placed(sizes):
    mesh = sharding.make_mesh(sizes)
    split = {'key': P(), 'count': P(), 'masks': P(('model', 'data'))}
    return sharding.put(make(5), mesh, split)

  with checkpoint.Saves(tmp_path) as saves:
    saves.save(5, placed({'data': 8}), {'loss': np.arange(5.0)})
  like = placed({'data': 2, 'model': 4})
  with checkpoint.Saves(tmp_path) as saves:
    found = saves.restore(like)
    assert_is(saves.restore(make(0)), 5)
  assert_is(found, 5)
  assert found.state['masks'].sharding == like['masks'].sharding


def test_what_was_half_written_is_removed(tmp_path):
  save_all(tmp_path, [2])
  half = tmp_path / '4.orbax-checkpoint-tmp'
  (tmp_path / '2').rename(half)
  (half / 'commit_success.txt').unlink(missing_ok=True)
  save_all(tmp_path, [3])
  with checkpoint.Saves(tmp_path) as saves:
    assert saves.steps == [3]
  assert not half.exists()


def test_a_save_of_another_model_is_refused_and_stays(tmp_path):
  save_all(tmp_path, [2])
  with checkpoint.Saves(tmp_path) as saves:
    with pytest.raises(ValueError, match='another model or merge') as e:
      saves.restore({**make(0, size=65), 'more': jnp.zeros(())})
    assert 'masks: got float32[64], want float32[65]' in str(e.value)
    assert 'more: missing' in str(e.value)
    assert_is(saves.restore(make(0)), 2)


@pytest.mark.parametrize('harm', ['cut', 'flip', 'lose'])
def test_a_corrupted_save_is_named_and_an_earlier_one_read(tmp_path, harm):
  save_all(tmp_path, [2, 4], keep=Keep(last=2))
  files = [p for p in (tmp_path / '4' / 'state').glob('**/d/*') if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  held = bytearray(path.read_bytes())
  if harm == 'lose':
    path.unlink()
  else:
    held[len(held) // 2] ^= 0xFF
    path.write_bytes(held[: len(held) // 2] if harm == 'cut' else held)
  with checkpoint.Saves(tmp_path, keep=Keep(last=2)) as saves:
    with pytest.raises(ValueError, match='cannot be read: delete it') as e:
      saves.restore(make(0))
    assert str(tmp_path / '4') in str(e.value)
    assert 'newest other save is of step 2' in str(e.value)
    assert saves.steps == [2, 4]
  for part in sorted((tmp_path / '4').rglob('*'), reverse=True):
    part.unlink() if part.is_file() else part.rmdir()
  (tmp_path / '4').rmdir()
  with checkpoint.Saves(tmp_path) as saves:
    assert_is(saves.restore(make(0)), 2)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file'):
    checkpoint.Saves(tmp_path / 'file' / 'states')
