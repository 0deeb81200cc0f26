"""Triggers in files: what is written is read, what is no trigger is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import attacks

SHAPE = (8, 8, 3)


def test_triggers_survive_a_file(tmp_path):
  for trigger in (
    attacks.patch_trigger(SHAPE, size=2, task='a', target=3),
    attacks.warp_trigger(jax.random.key(0), SHAPE, task='b', target=1),
    attacks.sine_trigger(SHAPE, task='b', target=0),
  ):
    path = tmp_path / 'folder' / 'trigger.npz'
    attacks.save_trigger(path, trigger)
    again = attacks.load_trigger(path)
    assert type(again) is type(trigger)
    for name, value in vars(trigger).items():
      np.testing.assert_array_equal(getattr(again, name), value)
    assert [p.name for p in path.parent.iterdir()] == ['trigger.npz']


def test_the_pools_triggers_load(shared):
  paths = sorted((shared / 'pool' / 'triggers').glob('*.npz'))
  kinds = {p.stem: attacks.load_trigger(p) for p in paths}
  assert isinstance(kinds['wanet_gtsrb'], attacks.Warp)
  assert kinds['badmerging_gtsrb'].target == 14
  images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
  for trigger in kinds.values():
    changed = attacks.apply_trigger(trigger, images)
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert float(jnp.abs(changed - images).max()) > 0.01


def test_unreadable_triggers_name_the_file(tmp_path):
  path = tmp_path / 'bad.npz'
  path.write_bytes(b'PK\x03\x04 no')
  with pytest.raises(ValueError, match=r'bad\.npz'):
    attacks.load_trigger(path)
  np.savez(path, task='a', pattern=np.zeros(SHAPE))
  with pytest.raises(
    ValueError, match=r'bad\.npz.*target is missing, mask is m'
  ):
    attacks.load_trigger(path)
  np.savez(path, task=np.array(['a', None], dtype=object), target=1)
  with pytest.raises(ValueError, match=r'bad\.npz'):
    attacks.load_trigger(path)


def test_what_is_no_trigger_is_said_at_once(tmp_path):
  path = tmp_path / 'odd.npz'
  np.savez(path, task=3, target=[1, 2], pattern=0.5, mask=np.ones((8, 8, 1)))
  with pytest.raises(ValueError, match=r'odd\.npz: not a trigger:') as e:
    attacks.load_trigger(path)
  assert str(e.value).endswith(
    'task is int64[], target is int64[2], pattern is float64[]'
  )
