"""Tests what the experiments' commands share."""

import errno
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import command


@pytest.mark.parametrize(
  ('given', 'wanted'),
  [
    ('', '--xla_gpu_enable_triton_gemm=false'),
    ('--a=1', '--a=1 --xla_gpu_enable_triton_gemm=false'),
    ('--xla_gpu_enable_triton_gemm=true', '--xla_gpu_enable_triton_gemm=true'),
  ],
)
def test_triton_is_off_unless_a_user_says_otherwise(monkeypatch, given, wanted):
  monkeypatch.setenv('XLA_FLAGS', given)
  command.spare_gpus()
  assert os.environ['XLA_FLAGS'] == wanted


def test_programs_are_forgotten_where_there_are_many():
  double = jax.jit(lambda x: x * 2)
  double(jnp.ones(3))
  command.forget_programs()
  assert double._cache_size() == 1
  command.forget_programs(most=0)
  assert double._cache_size() == 0


def test_two_runs_do_not_share_a_workdir(tmp_path):
  with command.alone(tmp_path / 'run'):
    with (
      pytest.raises(ValueError, match='another run writes to it'),
      command.alone(tmp_path / 'run'),
    ):
      pass
    with command.alone(tmp_path / 'other'):
      pass
    assert not (tmp_path / 'other').exists()
    (tmp_path / 'run' / 'report.json').touch()
  with command.alone(tmp_path / 'run'):
    pass
  assert (tmp_path / 'run' / 'report.json').exists()


def test_a_folder_that_cannot_be_written_to_is_told_with_what_to_do():
  sealed = pathlib.Path('/sys')
  if not sealed.is_dir():
    pytest.skip('no folder here that even root cannot write to')
  with pytest.raises(OSError, match='dam_jax') as caught:
    (sealed / 'dam_jax').mkdir()
  told = command._told(caught.value)
  assert str(caught.value) in told
  assert 'choose another --workdir' in told


@pytest.mark.parametrize(
  ('error', 'advised'),
  [
    (OSError(errno.ENOSPC, 'No space left on device'), True),
    (FileNotFoundError(errno.ENOENT, 'No such file', 'a'), False),
    (ValueError('b'), False),
  ],
)
def test_other_errors_are_told_as_they_are(error, advised):
  assert ('--workdir' in command._told(error)) is advised
