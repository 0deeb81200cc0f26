"""What the package promises about itself: metadata, commands, structure."""

import ast
import importlib.metadata
from pathlib import Path
import re
import runpy
import sys
import types

import pytest

import dam_jax
from dam_jax import catalogue

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'dam_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))

# A module imports from layers above its own only.
LAYERS = (
  ('typing',),
  ('compilation', 'layout'),
  ('tree',),
  ('base',),
  ('selection', 'warps'),
  (
    'losses',
    'masks',
    'matrices',
    'perturbations',
    'statistics',
    'transforms',
  ),
  ('aggregators', 'attacks', 'audit', 'localization', 'pruning'),
  ('competition', 'geometry', 'weighted'),
  ('meta_spec', 'meta_state'),
  ('meta',),
  ('defences', 'informed', 'learned', 'recipes', 'spectral'),
  ('catalogue',),
)
# What stands beside the layers, and all that it may import of the package.
BESIDE = {
  'evaluate': ('typing', 'tree', 'losses'),
  'checkpoint': ('typing', 'tree', 'base', 'distributed'),
  'metric_writer': ('typing', 'tree', 'base'),
  'blocks': ('typing',),
  'streaming': (
    *('typing', 'tree', 'base', 'selection'),
    *('blocks', 'distributed'),
  ),
  'sharding': ('typing', 'tree'),
  'distributed': ('typing', 'sharding'),
  'turns': ('tree', 'base', 'selection'),
  'parallel': ('typing', 'layout', 'tree', 'base', 'sharding', 'turns'),
}
NOT_IN_CORE = {'flax', 'grain', 'orbax', 'tensorflow', 'tensorflow_datasets'}


def module_name(path):
  """Returns 'tree' for dam_jax/tree.py, 'data' for dam_jax/data/tasks.py."""
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path):
  """Yields the dotted name of everything that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def imported_modules(path):
  """Returns the modules of dam_jax that a file imports."""
  names = [name.split('.') for name in imported(path)]
  return {name[1] for name in names if name[0] == 'dam_jax' and name[1:]}


def imported_distributions(paths):
  """Returns the distributions, as pip spells them, that files import."""
  owners = importlib.metadata.packages_distributions()
  local = {
    'benchmarks',
    'configs',
    'conftest',
    'dam_jax',
    'experiments',
    'tests',
  }
  tops = {name.split('.')[0] for path in paths for name in imported(path)}
  tops -= local | sys.stdlib_module_names
  # What is not installed, such as the benchmarks' peers, is its own owner.
  return {canonical(owners.get(top, [top])[0]) for top in tops}


def canonical(requirement):
  name = re.match(r'[\w.-]+', requirement)[0]
  return re.sub(r'[-_.]+', '-', name).lower()


@pytest.fixture
def metadata(monkeypatch):
  """The arguments that setup.py passes to setuptools."""
  arguments = {}
  setuptools = types.ModuleType('setuptools')
  setuptools.setup = arguments.update
  setuptools.find_packages = lambda **_: ['dam_jax']
  monkeypatch.setitem(sys.modules, 'setuptools', setuptools)
  runpy.run_path(str(ROOT / 'setup.py'))
  return arguments


def readme_commands():
  block = re.search(
    r'```(?:bash|sh|shell|console)\n(.*?)```',
    (ROOT / 'README.md').read_text(),
    re.DOTALL,
  )[1]
  return block.strip().split('\n')


def test_readme_opens_with_two_commands(metadata):
  commands = readme_commands()
  assert len(commands) == 2
  for command, module in zip(
    commands, ('experiments.merge', 'pytest'), strict=True
  ):
    extra, run = re.fullmatch(
      r"pip install -e '\.\[(\w+)\]' && python -m ([\w.]+)( .*)?", command
    ).group(1, 2)
    assert extra in metadata['extras_require']
    assert run == module


def test_readme_examples_run():
  text = (ROOT / 'README.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})


def test_readme_lists_every_method():
  assert catalogue.table() in (ROOT / 'README.md').read_text()


def test_versions_agree(metadata):
  top = re.search(
    r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE
  )[1]
  assert dam_jax.__version__ == top == metadata['version']


@pytest.mark.parametrize(
  ('pattern', 'extras'),
  [
    (
      'dam_jax/**/*.py',
      ['clip', 'data', 'experiments', 'tensorboard', 'text'],
    ),
    ('dam_jax/data/*.py', ['data', 'text']),
    ('dam_jax/*.py', ['tensorboard']),
    ('dam_jax/checkpoint/*.py', []),
    ('dam_jax/models/*.py', ['clip']),
    ('experiments/**/*.py', ['experiments']),
    ('configs/**/*.py', ['experiments']),
    ('benchmarks/**/*.py', ['bench']),
    ('tests/**/*.py', ['test']),
  ],
)
def test_imports_are_declared(metadata, pattern, extras):
  declared = [*metadata['install_requires']]
  for extra in extras:
    declared += metadata['extras_require'][extra]
  undeclared = imported_distributions(ROOT.glob(pattern)) - {
    canonical(requirement) for requirement in declared
  }
  assert undeclared <= {'jaxlib'}


def test_core_requirements_are_used(metadata):
  declared = {canonical(r) for r in metadata['install_requires']}
  files = [*MODULES, *ROOT.glob('experiments/**/*.py')]
  assert declared <= imported_distributions(files)


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_module_is_small_and_documented(path):
  text = path.read_text()
  tree = ast.parse(text)
  assert ast.get_docstring(tree)
  assert len(text.splitlines()) <= 500
  assert path.stem != 'utils'
  lengths = {
    node.name: node.end_lineno - node.lineno + 1
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
  }
  assert {name: n for name, n in lengths.items() if n > 90} == {}


def test_imports_point_one_way():
  allowed = {
    '__init__': None,
    'cli': None,
    'models': None,
    'data': None,
    **BESIDE,
  }
  above = ()
  for layer in LAYERS:
    allowed |= dict.fromkeys(layer, above)
    above += layer
  for path in MODULES:
    name = module_name(path)
    assert name in allowed, f'{name}: give it a place in LAYERS or BESIDE'
    if allowed[name] is not None:
      assert imported_modules(path) - {name} <= set(allowed[name]), path


def test_core_takes_parameters_not_models():
  core = {name for layer in LAYERS for name in layer} | {'__init__'}
  for path in MODULES:
    if module_name(path) in core:
      assert not imported_modules(path) & {'models', 'data'}, path
      tops = {name.split('.')[0] for name in imported(path)}
      assert not tops & NOT_IN_CORE, path
