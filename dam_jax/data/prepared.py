"""Prepared data sets, read at random and without TensorFlow.

`prepare` has TFDS download a set and write it as array_record files, once;
`open_set` reads what is there. Neither waits for a network that is not there:
a set that is not prepared, or cannot be, is an error that says what to do.

Only preparing most of TFDS's own sets needs TensorFlow, in whichever
environment does it (`dam_jax.data.sets.DataSet.tensorflow`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib.util
import io
import operator
import os
import pathlib
from typing import Any, SupportsIndex, TypedDict
import urllib.error
import urllib.request

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dam_jax.data import builders
from dam_jax.data import preprocess
from dam_jax.data import sets
from dam_jax.data.sets import DataSet

_REACH = 10  # seconds to wait for a host


class Example(TypedDict):
  """An image `[H, W, 3]` uint8, and its class, counted from 0."""

  image: np.ndarray
  label: int


class Images:
  """The images of a split, decoded when they are read.

  Several threads may read at once.
  """

  def __init__(self, records: Sequence[Any], about: DataSet):
    self._records = records
    self._about = about

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: SupportsIndex) -> Example:
    record = self._records[operator.index(index)]
    with Image.open(io.BytesIO(record['image'])) as image:
      pixels = preprocess.to_rgb(image)
    if self._about.transposed:
      pixels = pixels.swapaxes(0, 1)
    label = int(record['label']) - self._about.first_label
    return Example(image=pixels, label=label)

  def __iter__(self) -> Iterator[Example]:
    return (self[i] for i in range(len(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A data set that is there.

  Attributes:
    about: what is known of it.
    label_names: for prompts, in order of labels.
    sizes: number of images by name of its whole splits.
    folder: that it lies in.
  """

  about: DataSet
  label_names: tuple[str, ...]
  sizes: Mapping[str, int]
  folder: epath.Path

  def images(self, split: str) -> Images:
    """Opens a split.

    Args:
      split: in TFDS's notation, such as 'test' or 'train[:80%]'.

    Raises:
      ValueError: where there is no such split.
    """
    builder: Any = tfds.builder_from_directory(self.folder)
    skipped = {
      name: tfds.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    try:
      records = builder.as_data_source(split, decoders=skipped)
    except (KeyError, ValueError) as e:
      raise ValueError(
        f'{self.about.name}: no split {split!r} in {self.folder}, which has '
        f'{", ".join(self.sizes)}'
      ) from e
    return Images(records, self.about)

  @property
  def train(self) -> Images:
    """The images to fine-tune on."""
    return self.images(self.about.train)

  @property
  def test(self) -> Images:
    """The images to report on."""
    return self.images(self.about.test)


def place(about: DataSet, data_dir: epath.PathLike) -> epath.Path:
  """Returns the folder of a data set, which may not be there."""
  root = epath.Path(data_dir).expanduser()
  return root / about.builder / about.version


def is_prepared(name: str | DataSet, data_dir: epath.PathLike) -> bool:
  """Says whether a data set may be opened.

  Args:
    name: as in `open_set`.
    data_dir: of prepared data sets.
  """
  return (place(_about(name), data_dir) / 'dataset_info.json').exists()


def open_set(name: str | DataSet, data_dir: epath.PathLike) -> Prepared:
  """Opens a prepared data set.

  Args:
    name: as in `dam_jax.data.sets.get`, or a description.
    data_dir: of prepared data sets.

  Returns:
    The set; its files are read when images are.

  Raises:
    ValueError: where it is not prepared, saying how to, or is something else
      than its description says.
  """
  about = _about(name)
  folder = place(about, data_dir)
  if not is_prepared(about, data_dir):
    raise ValueError(
      f'{about.name} is not prepared in {folder}: {how_to(about, data_dir)}'
    )
  info = tfds.builder_from_directory(folder).info
  file_format = info.file_format and info.file_format.value
  lines = []
  if file_format != 'array_record':
    lines.append(f'files are {file_format}, want array_record')
  features = info.features
  names: tuple[str, ...] = ()
  if 'image' not in features or 'label' not in features:
    lines.append(f'features are {", ".join(features)}, want image and label')
  else:
    try:
      names = about.label_names(features['label'].names)
    except ValueError as e:
      lines.append(str(e))
  there = {name: split.num_examples for name, split in info.splits.items()}
  lines += [
    f'no split {split!r} among {", ".join(there)}'
    for split in (about.train, about.test)
    if split.partition('[')[0] not in there
  ]
  if lines:
    raise ValueError('\n  '.join([f'{about.name} in {folder}:', *lines]))
  return Prepared(about=about, label_names=names, sizes=there, folder=folder)


def _about(name: str | DataSet) -> DataSet:
  return name if isinstance(name, DataSet) else sets.get(name)


def how_to(about: DataSet, data_dir: epath.PathLike) -> str:
  """Says what to type to prepare a data set, and what must lie where.

  Args:
    about: the set.
    data_dir: of prepared data sets.
  """
  kind, known = about.builder.partition('/')[0], sets.SETS.get(about.name)
  if known and known.builder == about.builder:
    call = f"prepared.prepare({about.name!r}, '{data_dir}')"
  elif kind == sets.ARRAYS:
    call = f"builders.prepare_npz('FILE', '{data_dir}', name={about.name!r})"
  else:
    call = f"builders.prepare_folder('FOLDER', '{data_dir}', "
    call += f'name={about.name!r})'
  module = call.partition('.')[0]
  said = f'run\n  python -c "from dam_jax.data import {module}; {call}"'
  if about.manual:
    said += f'\n  once {_manual(about, data_dir)} holds {about.manual_from}'
  if about.tensorflow:
    said += '\n  in an environment with TensorFlow (pip install tensorflow)'
  return said


def _downloads(data_dir: epath.PathLike) -> pathlib.Path:
  return pathlib.Path(data_dir).expanduser() / 'downloads'


def _manual(about: DataSet, data_dir: epath.PathLike) -> pathlib.Path:
  """Where TFDS looks for what it cannot download."""
  return _downloads(data_dir) / 'manual' / about.manual


def prepare(
  name: str, data_dir: epath.PathLike, *, download: bool = True
) -> epath.Path:
  """Prepares a data set unless it is there.

  Args:
    name: a key of `dam_jax.data.sets.SETS`.
    data_dir: of prepared data sets; what is downloaded lies in 'downloads'.
    download: whether it may be downloaded.

  Returns:
    The set's folder, which appears whole or not at all.

  Raises:
    ValueError: with all that is missing: files to place by hand, the leave to
      download, the host to download from, TensorFlow.
  """
  if name not in sets.SETS:
    raise ValueError(
      f'no data set {name!r} to prepare: there are {", ".join(sets.SETS)}; '
      'dam_jax.data.builders prepares your own files'
    )
  about = sets.get(name)
  folder = place(about, data_dir)
  if is_prepared(about, data_dir):
    return folder
  lines = []
  files = _manual(about, data_dir)
  if about.manual and not files.is_dir():
    lines.append(f'{files} must hold {about.manual_from}')
  if about.tensorflow and importlib.util.find_spec('tensorflow') is None:
    lines.append(
      'TFDS prepares it with TensorFlow: pip install tensorflow, only where '
      'you prepare'
    )
  kind, _, own = about.builder.partition('/')
  if kind != sets.FOLDERS and not about.manual:
    lines += _why_not_download(about, data_dir, download)
  if lines:
    raise ValueError('\n  '.join([f'{name} cannot be prepared:', *lines]))
  if kind == sets.FOLDERS:
    builders.prepare_folder(files, data_dir, name=own)
    return folder
  builder = _builder(about, data_dir)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  builder.download_and_prepare(
    file_format='array_record', download_config=config
  )
  return folder


def _builder(
  about: DataSet, data_dir: epath.PathLike
) -> tfds.core.DatasetBuilder:
  root = os.fspath(epath.Path(data_dir).expanduser())
  return tfds.builder(f'{about.builder}:{about.version}', data_dir=root)


def _why_not_download(
  about: DataSet, data_dir: epath.PathLike, download: bool
) -> list[str]:
  """Says what keeps a set from being downloaded.

  TFDS itself tries for minutes before it says so. Where some of its files are
  there, all may be.
  """
  builder = _builder(about, data_dir)
  if any((_downloads(data_dir) / builder.name).rglob('*.INFO')):
    return []
  if not download:
    return ['it must be downloaded, and download=False']
  for url in list(builder.url_infos or {})[:1]:
    request = urllib.request.Request(url, method='HEAD')
    try:
      with urllib.request.urlopen(request, timeout=_REACH):
        pass
    except urllib.error.HTTPError:
      pass  # the host is there, whatever it thinks of the question
    except OSError as e:
      return [f'{url} cannot be reached: {e}']
  return []
