"""What stands behind a config file's colon, and values set by name."""

import importlib
import pathlib

from ml_collections import config_dict
import pytest

from configs import audit
from configs import finetune
from configs import paper_vit_b32
from configs import paper_vit_l14
from experiments import settings

CONFIGS = sorted(
  path.stem for path in pathlib.Path(finetune.__file__).parent.glob('*.py')
)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_reads_names_and_values(name):
  module = importlib.import_module(f'configs.{name}')
  short, usual = module.get_config('runlocal'), module.get_config()
  assert short.to_dict() != usual.to_dict()
  assert module.get_config(None).to_dict() == usual.to_dict()
  assert module.get_config('runlocal=False').to_dict() == usual.to_dict()
  assert module.get_config('runlocal=true').to_dict() == short.to_dict()
  assert module.get_config(runlocal=True).to_dict() == short.to_dict()
  with pytest.raises(ValueError, match='fast is unknown.*runlocal'):
    module.get_config('fast')


def test_values_are_of_the_type_that_is_there():
  config = finetune.get_config('learning_rate=1,runlocal,steps=7,name=4')
  assert (config.learning_rate, config.steps, config.name) == (1.0, 7, '4')
  assert isinstance(config.learning_rate, float)
  assert config.batch == finetune.get_config('runlocal').batch
  assert audit.get_config('areas="3,4.5"').areas == (3.0, 4.5)


def test_keys_of_sections_have_dots_and_win_over_other_config_files():
  arg = "bad='0,1', merge.options.ties.density=0.5,finetune.compute=float32"
  config = paper_vit_l14.get_config(arg)
  assert config.bad == '0,1'
  assert config.merge.options.ties.density == 0.5
  assert (config.finetune.compute, config.attack.compute) == (
    'float32',
    'bfloat16',
  )
  assert paper_vit_b32.get_config().merge.options.ties.density != 0.5


def test_all_that_is_wrong_is_said_at_once():
  arg = 'runlocal=maybe,steps=many,steps=3,stepz=3,learning_rate,name='
  with pytest.raises(ValueError, match='argument') as e:
    finetune.get_config(arg)
  for line in (
    "runlocal is bool, got 'maybe'",
    'steps comes twice',
    'stepz is unknown: did you mean steps?',
    "learning_rate is float, got 'True'",
  ):
    assert line in str(e.value)
  assert 'name' not in str(e.value).split('\n', 1)[1]
  with pytest.raises(ValueError, match='merge is a section'):
    paper_vit_b32.get_config('merge=1')
  with pytest.raises(ValueError, match='No closing quotation'):
    finetune.get_config("name='a")


def test_nothing_is_set_where_something_is_wrong():
  config = config_dict.ConfigDict({'a': {'b': 1}, 'c': 'd'}).lock()
  assert settings.override(config, {'c': 'e', 'a.b': 2.5}) == [
    "a.b is int, got '2.5'"
  ]
  assert config.c == 'd'
  assert settings.override(config, {'c': 'e', 'a.b': 2}) == []
  assert config.to_dict() == {'a': {'b': 2}, 'c': 'e'}
