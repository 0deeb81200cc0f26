"""Fixtures and options of the tests."""

import os
from pathlib import Path

import hypothesis
import pytest

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
