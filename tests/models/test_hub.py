"""Whole CLIPs from folders, Orbax and the Hub's cache, and back."""

import dataclasses
import json
import shutil

import huggingface_hub
from huggingface_hub import constants
import jax
import numpy as np
import pytest

from dam_jax import checkpoint
from dam_jax.models import convert
from dam_jax.models import hub

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture(scope='module')
def folder(golden, vocabulary, tmp_path_factory):
  """A folder as transformers leaves it."""
  model = golden['new']
  path = tmp_path_factory.mktemp('hub') / 'model'
  shutil.copytree(vocabulary, path)
  (path / 'config.json').write_text(json.dumps(model.raw))
  (path / 'preprocessor_config.json').write_text('{"do_resize": true}')
  checkpoint.save_params(
    path / 'model.safetensors', model.params, name_map=convert.clip
  )
  return path


def same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_folder_is_read_and_written(golden, folder, tmp_path):
  model = hub.load(folder)
  assert model.config == golden['new'].config
  same(model.params, golden['new'].params)
  scale = np.exp(golden['new'].params['logit_scale'])
  assert model.scale == pytest.approx(float(scale))
  assert model.tokenizer()(['cat']).shape == (1, 16)
  hub.save(tmp_path / 'out', model, dtype='float16')
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {path.name for path in folder.iterdir()}
  again = hub.load(tmp_path / 'out')
  assert again.config == model.config
  half = jax.tree.map(lambda x: np.float16(x).astype(np.float32), model.params)
  same(again.params, half)


def test_model_without_files_is_written_with_a_config(golden, tmp_path):
  one = golden['legacy']
  model = hub.Pretrained(config=one.config, params=one.params)
  with pytest.raises(ValueError, match='no files, and so no tokenizer'):
    model.tokenizer()
  hub.save(tmp_path / 'out', model)
  again = hub.load(tmp_path / 'out')
  assert again.config == one.config
  same(again.params, one.params)
  with pytest.raises(ValueError, match='exists: pass overwrite=True'):
    hub.save(tmp_path / 'out', model)
  hub.save(tmp_path / 'out', model, overwrite=True)


def test_orbax_is_read_with_files_from_elsewhere(golden, folder, tmp_path):
  opened = checkpoint.open_model(folder, name_map=convert.clip)
  checkpoint.save_orbax(tmp_path / 'orbax', opened)
  model = hub.load(tmp_path / 'orbax', files=folder)
  same(model.params, golden['new'].params)
  assert model.files.folder == folder


def test_opened_leaf_by_leaf_buffers_are_left_out(golden, folder, tmp_path):
  one = golden['new'].params
  shutil.copytree(folder, tmp_path / 'a')
  (tmp_path / 'a' / 'model.safetensors').unlink()
  names = checkpoint.open_model(folder).leaves
  source = checkpoint.open_model(folder)
  tensors = {name: source.read(name) for name in names}
  for tower in ('text', 'vision'):
    tensors[f'{tower}_model/embeddings/position_ids'] = np.arange(5)[None]
  checkpoint.save_params(tmp_path / 'a' / 'model.safetensors', tensors)
  opened = checkpoint.open_model(tmp_path / 'a', name_map=convert.clip)
  assert opened.config['model_type'] == 'clip'
  assert len(opened.leaves) == len(jax.tree.leaves(one))
  leaf = 'text/layers_1/mlp/fc1/kernel'
  kernel = one['text']['layers_1']['mlp']['fc1']['kernel']
  np.testing.assert_array_equal(opened.read(leaf), kernel)


def test_weights_that_do_not_fit_are_named(golden, folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'a')
  raw = dict(golden['new'].raw)
  raw['text_config'] = {**raw['text_config'], 'max_position_embeddings': 20}
  (tmp_path / 'a' / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=r'(?s)position_embedding.*\[20, 12\]'):
    hub.load(tmp_path / 'a')
  model = hub.load(folder)
  broken = {**model.params, 'logit_scale': np.ones(1, np.float32)}
  with pytest.raises(ValueError, match='(?s)do not fit.*logit_scale'):
    hub.save(tmp_path / 'b', dataclasses.replace(model, params=broken))
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize(
  ('name_map', 'projected'),
  [
    (convert.clip_vision, True),
    (convert.clip_vision, False),
    (convert.clip_vision_bare, False),
  ],
)
def test_tower_alone_is_read(golden, folder, tmp_path, name_map, projected):
  model, vision = hub.load(folder), golden['legacy'].params['vision']
  moved = jax.tree.map(lambda x: np.asarray(x) + 1, vision)
  held = dict(moved)
  if not projected:
    del held['visual_projection']
  checkpoint.save_params(
    tmp_path / 'model.safetensors', held, name_map=name_map
  )
  found = hub.load_tower(tmp_path, model)
  whose = moved if projected else model.params['vision']
  same(found, {**moved, 'visual_projection': whose['visual_projection']})
  del held['layers_1']['mlp']
  checkpoint.save_params(
    tmp_path / 'model.safetensors', held, name_map=name_map
  )
  with pytest.raises(ValueError, match='(?s)does not fit the CLIP.*layers_1/'):
    hub.load_tower(tmp_path, model)


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
  """The Hub's cache with one repository, and no network."""
  repo = tmp_path / 'models--someone--clip'
  shutil.copytree(folder, repo / 'snapshots' / COMMIT)
  (repo / 'refs').mkdir()
  (repo / 'refs' / 'main').write_text(COMMIT)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))

  def refuse(*args, **kwargs):
    raise ConnectionError('no network')

  monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', refuse)
  return repo


@pytest.mark.parametrize('revision', [None, 'main', COMMIT])
def test_cached_repository_is_read_without_network(
  golden, cache, tmp_path, revision
):
  model = hub.load('someone/clip', revision=revision)
  assert (model.files.repo, model.files.commit) == ('someone/clip', COMMIT)
  same(model.params, golden['new'].params)
  hub.save(tmp_path / 'out', model)
  metadata = checkpoint.load_metadata(tmp_path / 'out' / 'model.safetensors')
  assert metadata['base_repo'] == 'someone/clip'
  assert metadata['base_commit'] == COMMIT


def test_pinned_commit_asks_nobody(cache, monkeypatch):
  asked = []
  monkeypatch.setattr(
    huggingface_hub.HfApi, 'model_info', lambda *_, **__: asked.append(1)
  )
  assert hub.snapshot('someone/clip', revision=COMMIT).commit == COMMIT
  assert not asked


@pytest.mark.parametrize(
  ('source', 'revision', 'message'),
  [
    ('someone/other', None, 'not in the cache .*ConnectionError: no network'),
    ('someone/clip', 'v2', 'clip, revision v2: not in the cache'),
    ('someone/clip', '9' * 40, 'revision 9999.*: not in the cache'),
    ('no/such/folder', None, 'no such folder, and no name of a repository'),
  ],
)
def test_what_cannot_be_had_is_said_at_once(cache, source, revision, message):
  with pytest.raises(ValueError, match=message):
    hub.snapshot(source, revision=revision)


def test_folder_has_no_revision(folder):
  with pytest.raises(ValueError, match='is a folder, which has no revision'):
    hub.snapshot(folder, revision='main')


def test_repository_of_pickles_alone_is_refused(cache):
  (cache / 'snapshots' / COMMIT / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match='no safetensors, and pickles are not'):
    hub.load('someone/clip')
