"""The comparison of defences: what both sides read, and its table."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from benchmarks import security_runs

LEAF = 'vision_model.post_layernorm.bias'


@pytest.fixture
def pool(tmp_path):
  folder = tmp_path / 'given'
  for name in ('checkpoints', 'tasks', 'triggers'):
    (folder / name).mkdir(parents=True)
  for i, name in enumerate(('base', 'clean_one')):
    leaves = {
      key: np.full(3, i, np.float16) for key in (LEAF, security_runs.PROJECTION)
    }
    save_file(leaves, folder / 'checkpoints' / f'{name}.safetensors')
  (folder / 'checkpoints' / 'config.json').write_text('{}')
  (folder / 'tasks' / 'one.npz').touch()
  return folder


def test_experts_share_the_projection_of_the_base(pool, tmp_path):
  into = tmp_path / 'shared'
  for _ in range(2):
    security_runs.share_projection(pool, into)
    expert = load_file(into / 'checkpoints' / 'clean_one.safetensors')
    assert expert[security_runs.PROJECTION].tolist() == [0, 0, 0]
    assert expert[LEAF].tolist() == [1, 1, 1]
    assert expert[LEAF].dtype == np.float16
  assert (into / 'checkpoints' / 'config.json').read_text() == '{}'
  assert (into / 'tasks' / 'one.npz').exists()
  original = load_file(pool / 'checkpoints' / 'clean_one.safetensors')
  assert original[security_runs.PROJECTION].tolist() == [1, 1, 1]


def test_rows_pair_images_and_leave_out_those_that_do_not_count():
  asr = np.array([-1, 1, 1, 0, 0], np.int8)
  mine = [{'acc/one': np.ones(4), 'acc/two': np.zeros(4), 'asr/two': asr}] * 2
  peer = [{**mine[0], 'acc/two': np.ones(4)}] * 2
  found = {
    (row['metric'], row['task']): row for row in security_runs.rows(mine, peer)
  }
  assert found['acc', 'one']['difference'] == [0, 0, 0]
  assert found['acc', 'two']['difference'] == [-1, -1, -1]
  assert found['acc', 'mean']['ours'][0] == 0.5
  assert found['acc', 'mean']['peer'][0] == 1
  assert found['asr', 'two']['ours'][0] == 0.5
  assert found['asr', 'two']['difference'][0] == 0
  assert set(found) == {
    ('acc', 'one'),
    ('acc', 'two'),
    ('acc', 'mean'),
    ('asr', 'two'),
    ('asr', 'mean'),
  }
