"""What is known of data sets, against TFDS's own builders."""

import dataclasses

import pytest
import tensorflow_datasets as tfds

from dam_jax.data import sets

TFDS = [x for x in sets.SETS.values() if not x.builder.startswith('folders')]


@pytest.mark.parametrize('about', TFDS, ids=lambda x: x.name)
def test_description_is_that_of_tfds(about, tmp_path):
  builder = tfds.builder(about.builder, data_dir=tmp_path)
  features = builder.info.features
  assert str(builder.version) == about.version
  assert features['image'].shape == about.image_shape
  found = features['label'].names
  names = about.label_names(found)
  assert len(names) == about.num_classes == len(set(names))
  assert not any('_' in name or name.startswith('/') for name in names)
  assert {key for key, _ in about.renamed} <= set(found)
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    assert about.manual


def test_the_paper_comes_first():
  want = ('cifar100', 'mnist', 'gtsrb', 'svhn_cropped', 'resisc45', 'eurosat')
  assert want == sets.PAPER


@pytest.mark.parametrize('about', sets.SETS.values(), ids=lambda x: x.name)
def test_templates_have_one_place_and_differ(about):
  assert all(x.count('{}') == 1 for x in about.templates)
  assert len(set(about.templates)) == len(about.templates)
  hash(about)


@pytest.mark.parametrize(
  ('name', 'found', 'want'),
  [
    (
      'sun397',
      ['/a/apartment_building/outdoor', '/a/abbey'],
      ('apartment building outdoor', 'abbey'),
    ),
    (
      'oxford_flowers102',
      ['pink-yellow dahlia?', 'ball moss', 'rose'],
      ('pink and yellow dahlia', 'air plant', 'rose'),
    ),
    ('fashion_mnist', ['T-shirt/top', 'Ankle boot'], None),
    ('emnist', [str(i) for i in range(3)], ('A', 'B')),
  ],
)
def test_names_are_words(name, found, want):
  about = sets.get(name)
  about = dataclasses.replace(
    about,
    names=about.names[:2],
    num_classes=len(found) - about.first_label,
  )
  assert about.label_names(found) == (want or tuple(found))


def test_another_number_of_classes_is_refused():
  with pytest.raises(ValueError, match='mnist: 9 classes found, 10 are known'):
    sets.get('mnist').label_names([str(i) for i in range(9)])
  with pytest.raises(ValueError, match='25 classes found, 26'):
    sets.get('emnist').label_names([str(i) for i in range(26)])


@pytest.mark.parametrize('name', ['cifar', 'folders/', 'arrays/a/b', ''])
def test_unknown_names_are_refused(name):
  with pytest.raises(ValueError, match='no data set'):
    sets.get(name)


def test_prompts_are_names_in_templates():
  prompts = sets.get('gtsrb').prompts(['stop', 'x'])
  assert prompts[0] == [
    'a zoomed in photo of a "stop" traffic sign.',
    'a centered photo of a "stop" traffic sign.',
    'a close up photo of a "stop" traffic sign.',
  ]
  assert len(prompts) == 2
