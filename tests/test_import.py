"""`import dam_jax` is light: what it loads and how long that takes."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
  'flax',
  'grain',
  'huggingface_hub',
  'matplotlib',
  'orbax',
  'rich',
  'sklearn',
  'tensorflow',
  'tensorflow_datasets',
  'tokenizers',
)
PROBE = """
import json, sys, time
import dam_jax
print(json.dumps([time.process_time(), sorted(sys.modules)]))
"""


@pytest.fixture(scope='module')
def imports():
  """`(CPU seconds of the process, names of loaded modules)` of three runs."""

  def run():
    done = subprocess.run(
      [sys.executable, '-c', PROBE],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    return json.loads(done.stdout)

  return [run() for _ in range(3)]


def test_import_loads_nothing_heavy(imports):
  _, modules = imports[0]
  assert 'dam_jax' in modules
  assert [name for name in HEAVY if name in modules] == []


def test_import_takes_under_two_seconds(imports):
  # CPU time does not depend on who else uses the machine.
  assert min(seconds for seconds, _ in imports) < 2
