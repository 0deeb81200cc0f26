"""What is known of each data set: where it comes from, its splits and prompts.

Builders, versions and splits are those of TensorFlow Datasets (TFDS), which
`dam_jax.data.prepared` reads without TensorFlow. Prompts are the templates and
class names that CLIP's authors published (data/prompts.md of their repository),
and for `fashion_mnist`, `emnist` and `kmnist`, which CLIP's authors did not
use, those of FusionBench 0.2.33.

Names are TFDS's, with spaces for underscores, unless they say nothing (a number
for a traffic sign) or CLIP's authors changed them.

`resisc45` and `eurosat` have no official test images: the last fifth in TFDS's
order is for testing and the first three for training, as in VTAB. TFDS has
`gtsrb` only as a part of the Visual Domain Decathlon, shrunk and with no labels
of test images, so it is read from folders.

  >>> get('eurosat').prompts(['river'])[0][0]
  'a centered satellite photo of river.'

References:
  Radford et al., `Learning transferable visual models from natural language
  supervision <https://arxiv.org/abs/2103.00020>`_, 2021

  Zhai et al., `A large-scale study of representation learning with the visual
  task adaptation benchmark <https://arxiv.org/abs/1910.04867>`_, 2019
"""

from collections.abc import Sequence
import dataclasses

from dam_jax.models import clip

ARRAYS = 'arrays'
"""Builder of sets made from npz files: `arrays/<name>`."""
FOLDERS = 'folders'
"""Builder of sets made from folders of images: `folders/<name>`."""
OWN_VERSION = '1.0.0'
"""Of what these two write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
  """A data set, without its images.

  Attributes:
    name: ours.
    builder: TFDS's name, `<builder>` or `<builder>/<config>`.
    version: of the builder; another is not read.
    templates: prompts with `{}` for a class name.
    train: split to fine-tune on, in TFDS's notation.
    test: split to report on.
    num_classes: `L`, or 0 where only the prepared set knows.
    image_shape: height, width and channels as stored; None where images differ.
    names: prompts' class names in order of labels, instead of the builder's.
    renamed: some of the builder's names, each with the prompts' name for it.
    first_label: what the builder calls class 0.
    transposed: whether images lie on their side.
    manual: folder to place among the manual files, where nothing can be
      downloaded.
    manual_from: what that folder holds.
    tensorflow: whether TFDS needs TensorFlow to prepare it.
    mean: of R, G and B in [0, 1], to subtract.
    std: to divide by.
  """

  name: str
  builder: str
  version: str
  templates: tuple[str, ...]
  train: str = 'train'
  test: str = 'test'
  num_classes: int = 0
  image_shape: tuple[int | None, int | None, int] = (None, None, 3)
  names: tuple[str, ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()
  first_label: int = 0
  transposed: bool = False
  manual: str = ''
  manual_from: str = ''
  tensorflow: bool = True
  mean: tuple[float, float, float] = clip.MEAN
  std: tuple[float, float, float] = clip.STD

  def label_names(self, found: Sequence[str]) -> tuple[str, ...]:
    """Returns the class names for prompts, in order of labels.

    Args:
      found: the builder's names, one a label that it may give.

    Raises:
      ValueError: where their number is not that of the classes.

    Examples:
      >>> get('dtd').label_names([f'a_{i}' for i in range(47)])[3]
      'a 3'
    """
    # Labels from 1 on leave the builder's first name without images; what is
    # beyond the classes has none either.
    known = len(self.names) or self.num_classes
    names = [str(x) for x in found][self.first_label :]
    names = names[:known] if self.first_label else names
    if known and len(names) != known:
      raise ValueError(
        f'{self.name}: {len(names)} classes found, {known} are known'
      )
    renamed = dict(self.renamed)
    return self.names or tuple(renamed.get(x, _plain(x)) for x in names)

  def prompts(self, label_names: Sequence[str]) -> list[list[str]]:
    """Returns each class's prompts, one a template.

    Args:
      label_names: as `label_names` gives them.
    """
    return [[t.format(x) for t in self.templates] for x in label_names]


def _plain(name: str) -> str:
  """Makes words of an identifier or, in sun397, a path '/a/abbey'."""
  if name.startswith('/'):
    name = name.split('/', 2)[2].replace('/', ' ')
  return name.replace('_', ' ')


def get(name: str) -> DataSet:
  """Finds a data set's description.

  Args:
    name: a key of `SETS`, or `arrays/<name>` or `folders/<name>` for what
      `dam_jax.data.builders` wrote.

  Returns:
    The description; of the latter kinds without more than their splits 'train'
    and 'test': `dataclasses.replace` changes what differs.

  Raises:
    ValueError: where there is no such set.

  Examples:
    >>> get('folders/birds').name
    'birds'
  """
  kind, _, own = name.partition('/')
  if kind in (ARRAYS, FOLDERS) and own and '/' not in own:
    return DataSet(
      name=own,
      builder=name,
      version=OWN_VERSION,
      templates=('a photo of a {}.',),
      tensorflow=False,
    )
  if name not in SETS:
    raise ValueError(
      f'no data set {name!r}: there are {", ".join(SETS)}, and {ARRAYS}/... '
      f'and {FOLDERS}/... of your own'
    )
  return SETS[name]


_A_THE = ('a photo of a {}.', 'a photo of the {}.')
_DIGITS = ('a photo of the number: "{}".',)
_CIFAR = tuple(
  f'a {kind} of {article} {size}{{}}.'
  for article in ('a', 'the')
  for kind, size in (
    ('photo', ''),
    ('blurry photo', ''),
    ('black and white photo', ''),
    ('low contrast photo', ''),
    ('high contrast photo', ''),
    ('bad photo', ''),
    ('good photo', ''),
    ('photo', 'small '),
    ('photo', 'big '),
  )
)
_AERIAL = tuple(
  f'{view} of {article}{{}}.'
  for article in ('', 'a ', 'the ')
  for view in (
    'satellite imagery',
    'aerial imagery',
    'satellite photo',
    'aerial photo',
    'satellite view',
    'aerial view',
  )
)
_TEXTURE = tuple(
  f'a photo of {article} {{}} {noun}.'
  for article in ('a', 'the')
  for noun in ('texture', 'pattern', 'thing', 'object')
)
_CARS = (
  *_A_THE,
  'a photo of my {}.',
  'i love my {}!',
  *(f'a photo of my {x} {{}}.' for x in ('dirty', 'clean', 'new', 'old')),
)
_SIGNS = (
  'red and white circle 20 kph speed limit',
  'red and white circle 30 kph speed limit',
  'red and white circle 50 kph speed limit',
  'red and white circle 60 kph speed limit',
  'red and white circle 70 kph speed limit',
  'red and white circle 80 kph speed limit',
  'end / de-restriction of 80 kph speed limit',
  'red and white circle 100 kph speed limit',
  'red and white circle 120 kph speed limit',
  'red and white circle red car and black car no passing',
  'red and white circle red truck and black car no passing',
  'red and white triangle road intersection warning',
  'white and yellow diamond priority road',
  'red and white upside down triangle yield right-of-way',
  'stop',
  'empty red and white circle',
  'red and white circle no truck entry',
  'red circle with white horizonal stripe no entry',
  'red and white triangle with exclamation mark warning',
  'red and white triangle with black left curve approaching warning',
  'red and white triangle with black right curve approaching warning',
  'red and white triangle with black double curve approaching warning',
  'red and white triangle rough / bumpy road warning',
  'red and white triangle car skidding / slipping warning',
  'red and white triangle with merging / narrow lanes warning',
  'red and white triangle with person digging / construction / road work '
  'warning',
  'red and white triangle with traffic light approaching warning',
  'red and white triangle with person walking warning',
  'red and white triangle with child and person walking warning',
  'red and white triangle with bicyle warning',
  'red and white triangle with snowflake / ice warning',
  'red and white triangle with deer warning',
  'white circle with gray strike bar no speed limit',
  'blue circle with white right turn arrow mandatory',
  'blue circle with white left turn arrow mandatory',
  'blue circle with white forward arrow mandatory',
  'blue circle with white forward or right turn arrow mandatory',
  'blue circle with white forward or left turn arrow mandatory',
  'blue circle with white keep right arrow mandatory',
  'blue circle with white keep left arrow mandatory',
  'blue circle with white arrows indicating a traffic circle',
  'white circle with gray strike bar indicating no passing for cars has ended',
  'white circle with gray strike bar indicating no passing for trucks has '
  'ended',
)
_LAND = (
  'annual crop land',
  'forest',
  'brushland or shrubland',
  'highway or road',
  'industrial buildings or commercial buildings',
  'pasture land',
  'permanent crop land',
  'residential buildings or homes or apartments',
  'river',
  'lake or sea',
)
_VTAB = {'train': 'train[:60%]', 'test': 'train[80%:]'}

_ALL = (
  DataSet(
    name='cifar100',
    builder='cifar100',
    version='3.0.2',
    num_classes=100,
    image_shape=(32, 32, 3),
    templates=_CIFAR,
  ),
  DataSet(
    name='mnist',
    builder='mnist',
    version='3.0.1',
    num_classes=10,
    image_shape=(28, 28, 1),
    templates=_DIGITS,
  ),
  DataSet(
    name='gtsrb',
    builder=f'{FOLDERS}/gtsrb',
    version=OWN_VERSION,
    num_classes=43,
    names=_SIGNS,
    tensorflow=False,
    manual='gtsrb',
    manual_from=(
      'train/<class> and test/<class>, folders 00000 to 00042 of the images of '
      'the German Traffic Sign Recognition Benchmark; docs/data.md sorts its '
      'archives'
    ),
    templates=tuple(
      f'a {x} photo of a "{{}}" traffic sign.'
      for x in ('zoomed in', 'centered', 'close up')
    ),
  ),
  DataSet(
    name='svhn_cropped',
    builder='svhn_cropped',
    version='3.1.0',
    num_classes=10,
    image_shape=(32, 32, 3),
    templates=_DIGITS,
  ),
  DataSet(
    name='resisc45',
    builder='resisc45',
    version='3.0.0',
    num_classes=45,
    image_shape=(256, 256, 3),
    manual='NWPU-RESISC45',
    manual_from="a folder a class, from the archive 'NWPU-RESISC45.rar'",
    templates=_AERIAL,
    **_VTAB,
  ),
  DataSet(
    name='eurosat',
    builder='eurosat/rgb',
    version='2.0.0',
    num_classes=10,
    image_shape=(64, 64, 3),
    names=_LAND,
    templates=tuple(
      f'a centered satellite photo of {x}{{}}.' for x in ('', 'a ', 'the ')
    ),
    **_VTAB,
  ),
  DataSet(
    name='sun397',
    builder='sun397/standard-part1-120k',
    version='4.0.0',
    num_classes=397,
    templates=_A_THE,
  ),
  DataSet(
    name='cars196',
    builder='cars196',
    version='2.1.0',
    num_classes=196,
    templates=_CARS,
  ),
  DataSet(
    name='dtd',
    builder='dtd',
    version='3.0.1',
    num_classes=47,
    templates=_TEXTURE,
  ),
  DataSet(
    name='cifar10',
    builder='cifar10',
    version='3.0.2',
    num_classes=10,
    image_shape=(32, 32, 3),
    templates=_CIFAR,
  ),
  DataSet(
    name='fashion_mnist',
    builder='fashion_mnist',
    version='3.0.1',
    num_classes=10,
    image_shape=(28, 28, 1),
    templates=_A_THE,
  ),
  DataSet(
    name='emnist',
    builder='emnist/letters',
    version='3.1.0',
    num_classes=26,
    image_shape=(28, 28, 1),
    names=tuple('ABCDEFGHIJKLMNOPQRSTUVWXYZ'),
    first_label=1,
    transposed=True,
    templates=('a photo of the digit character: "{}".',),
  ),
  DataSet(
    name='kmnist',
    builder='kmnist',
    version='3.0.1',
    num_classes=10,
    image_shape=(28, 28, 1),
    names=tuple('おきすつなはまやれを'),
    templates=('a photo of the character {}.',),
  ),
  DataSet(
    name='stl10',
    builder='stl10',
    version='1.0.0',
    num_classes=10,
    image_shape=(96, 96, 3),
    templates=_A_THE,
  ),
  DataSet(
    name='oxford_iiit_pet',
    builder='oxford_iiit_pet',
    version='4.0.0',
    num_classes=37,
    templates=('a photo of a {}, a type of pet.',),
  ),
  DataSet(
    name='oxford_flowers102',
    builder='oxford_flowers102',
    version='2.1.1',
    num_classes=102,
    renamed=(
      ('globe-flower', 'globe flower'),
      ('pink-yellow dahlia?', 'pink and yellow dahlia'),
      ('ball moss', 'air plant'),
    ),
    templates=('a photo of a {}, a type of flower.',),
  ),
  DataSet(
    name='food101',
    builder='food101',
    version='2.0.0',
    test='validation',
    num_classes=101,
    tensorflow=False,
    templates=('a photo of {}, a type of food.',),
  ),
)
SETS = {x.name: x for x in _ALL}
"""Descriptions by name; the first six are those of the paper."""
PAPER = tuple(SETS)[:6]
"""Names of the data sets of Defense-Aware Merging."""
