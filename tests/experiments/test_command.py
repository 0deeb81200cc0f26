"""Tests what the experiments' commands share."""

import os

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
  command._spare_gpus()
  assert os.environ['XLA_FLAGS'] == wanted
