"""The Python in docs/ runs as it is."""

from pathlib import Path
import re

import pytest

DOCS = Path(__file__).parents[1] / 'docs'
BLOCKS = [
  (path.name, i, block)
  for path in sorted(DOCS.glob('*.md'))
  for i, block in enumerate(
    re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL)
  )
]


@pytest.mark.parametrize(
  ('name', 'block'),
  [(name, block) for name, _, block in BLOCKS],
  ids=[f'{name}-{i}' for name, i, _ in BLOCKS],
)
def test_a_block_runs(name, block):
  exec(compile(block, name, 'exec'), {})
