"""Data sets of your own, prepared as TFDS prepares its: npz files and folders.

`prepare_npz` reads a pool's task (`dam_jax.data.tasks`), or any npz file with
arrays `<split>_images` and `<split>_labels`, or `images` and `labels`.
`prepare_folder` reads `<split>/<class>/<image>` or `<class>/<image>`. Both
write array_record files, all at once or nothing, without TensorFlow; then
`dam_jax.data.prepared.open_set` reads them as it reads every other set.

An npz file is never unpickled, and its images keep their order. Images of a
folder are shuffled, the same way each time, so that a part of a split is a
random one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import hashlib
import io
import os
import re
from typing import Any, NamedTuple
import zipfile

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dam_jax.checkpoint import file_hash
from dam_jax.data import sets
from dam_jax.data import tasks

SUFFIXES = ('.png', '.jpg', '.jpeg', '.ppm', '.bmp', '.webp', '.tif', '.tiff')
"""Of the files of a folder that are images; others are passed over."""

_KEPT = ('.png', '.jpg', '.jpeg')  # what TFDS stores as it is


class _Row(NamedTuple):
  """An image: its place or path, the bytes of a PNG or JPEG file, its class."""

  key: int | str
  image: bytes
  label: int


class _Content(NamedTuple):
  """What a builder writes.

  Attributes:
    splits: by name, what yields the rows.
    label_names: of the classes.
    digest: of what it was read from.
    ordered: whether rows keep their order.
  """

  splits: Mapping[str, Callable[[], Iterator[_Row]]]
  label_names: Sequence[str]
  digest: str
  ordered: bool


class _Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes a content."""

  VERSION = tfds.core.Version(sets.OWN_VERSION)

  def __init__(self, *, content: _Content, **kwargs: Any):
    self._content = content
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(names=list(self._content.label_names))
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({'image': image, 'label': label}),
      supervised_keys=('image', 'label'),
      disable_shuffling=self._content.ordered,
      metadata=tfds.core.MetadataDict(source=self._content.digest),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    return {
      split: self._generate_examples(rows)
      for split, rows in self._content.splits.items()
    }

  def _generate_examples(self, rows: Callable[[], Iterator[_Row]]):
    for row in rows():
      image = io.BytesIO(row.image)
      yield row.key, {'image': image, 'label': row.label}


class _Arrays(_Own, skip_registration=True):
  name = sets.ARRAYS


class _Folders(_Own, skip_registration=True):
  name = sets.FOLDERS


def prepare_npz(
  path: epath.PathLike, data_dir: epath.PathLike, *, name: str = ''
) -> str:
  """Writes the images of an npz file as a prepared data set, once.

  Args:
    path: of the file: `<split>_images` `[N, H, W]` or `[N, H, W, C]` uint8,
      with `C` 1 or 3, and `<split>_labels` `[N]` for each split, or `images`
      and `labels`, which become split 'train'; a pool's `train_jpeg` becomes
      that too. `label_names` are numbers where it has none.
    data_dir: of prepared data sets.
    name: of the set; the file's stem where empty.

  Returns:
    'arrays/<name>', which `dam_jax.data.prepared.open_set` takes.

  Raises:
    ValueError: with all that is wrong with the file, or where the set was
      prepared from another one.
  """
  path = epath.Path(path)
  splits, label_names = _read_npz(path)
  content = _Content(
    splits={s: _array_rows(*xy) for s, xy in splits.items()},
    label_names=label_names,
    digest=file_hash(path),
    ordered=True,
  )
  return _prepare(_Arrays, content, data_dir, name or path.stem)


def _read_npz(
  path: epath.Path,
) -> tuple[dict[str, tasks.Split], tuple[str, ...]]:
  """Reads and checks splits and names."""
  try:
    with np.load(os.fspath(path), allow_pickle=False) as file:
      found = {
        k: file[k]
        for k in file.files
        if k in ('images', 'labels', 'label_names')
        or k.endswith(('_images', '_labels'))
      }
      jpeg = 'train_jpeg' in file.files
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path}: no readable npz file: {e}') from e
  if jpeg:
    size = found['test_images'].shape[1] if 'test_images' in found else 32
    images, labels = tasks.load_train(path, size)
    found |= {'train_images': images, 'train_labels': labels}
  for what in ('images', 'labels'):
    if what in found:
      found.setdefault(f'train_{what}', found.pop(what))
  names = sorted({k.rpartition('_')[0] for k in found if k.endswith('_images')})
  lines = [] if names else ['there are no images']
  splits = {}
  for name in names:
    images = found[f'{name}_images']
    labels = found.get(f'{name}_labels', np.zeros(0, np.int32))
    if (
      images.dtype != np.uint8
      or images.ndim not in (3, 4)
      or images.shape[3:] not in ((), (1,), (3,))
      or not images.size
    ):
      lines.append(
        f'{name}_images are {images.dtype}{list(images.shape)}, want '
        'uint8[N, H, W], [N, H, W, 1] or [N, H, W, 3] with N > 0'
      )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
      lines.append(
        f'{name}_labels are {labels.dtype}{list(labels.shape)}, want one '
        f'integer for each of {len(images)} images'
      )
    else:
      splits[name] = tasks.Split(images, labels)
  highest = max((int(y.max()) for _, y in splits.values() if len(y)), default=0)
  lowest = min((int(y.min()) for _, y in splits.values() if len(y)), default=0)
  label_names = tuple(
    map(str, found.get('label_names', np.arange(highest + 1)))
  )
  if not 0 <= lowest <= highest < len(label_names):
    lines.append(
      f'labels run from {lowest} to {highest}, there are {len(label_names)} '
      'classes'
    )
  if len(set(label_names)) < len(label_names):
    lines.append('a label name comes twice')
  if lines:
    raise ValueError('\n  '.join([f'{path}:', *lines]))
  return splits, label_names


def _array_rows(
  images: np.ndarray, labels: np.ndarray
) -> Callable[[], Iterator[_Row]]:
  def rows() -> Iterator[_Row]:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      squeezed = image[..., 0] if image.shape[2:] == (1,) else image
      yield _Row(i, _png(Image.fromarray(squeezed)), int(label))

  return rows


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'PNG')
  return file.getvalue()


def prepare_folder(
  folder: epath.PathLike, data_dir: epath.PathLike, *, name: str = ''
) -> str:
  """Writes a folder of images as a prepared data set, once.

  Args:
    folder: `<split>/<class>/<image>`, or `<class>/<image>` for one split
      'train'. Classes are numbered by their folders' names in order; files
      without one of `SUFFIXES` are passed over. PNG and JPEG files are kept as
      they are, others become PNG.
    data_dir: of prepared data sets.
    name: of the set; the folder's name where empty.

  Returns:
    'folders/<name>', which `dam_jax.data.prepared.open_set` takes.

  Raises:
    ValueError: where there are no images, one cannot be read, a split lacks a
      class that another has, or the set was prepared from other files.
  """
  folder = epath.Path(folder)
  found = _list_folder(folder)
  label_names = sorted({c for classes in found.values() for c in classes})
  content = _Content(
    splits={
      split: _file_rows(classes, label_names)
      for split, classes in found.items()
    },
    label_names=label_names,
    digest=_list_digest(folder, found),
    ordered=False,
  )
  return _prepare(_Folders, content, data_dir, name or folder.resolve().name)


_Files = Mapping[str, Mapping[str, Sequence[epath.Path]]]


def _list_folder(folder: epath.Path) -> _Files:
  """Finds files by split and class."""
  if not folder.is_dir():
    raise ValueError(f'{folder}: no such folder')
  found = {}
  if files := _classes(folder):
    found['train'] = files
  else:
    splits = {x.name: _classes(x) for x in _folders(folder)}
    found = {split: files for split, files in splits.items() if files}
  if not found:
    raise ValueError(
      f'{folder}: no images at <split>/<class>/ or <class>/ that end in '
      f'{", ".join(SUFFIXES)}'
    )
  every = {c for classes in found.values() for c in classes}
  lines = [
    f'{split} lacks {", ".join(sorted(every - set(classes)))}'
    for split, classes in found.items()
    if every - set(classes)
  ]
  if lines:
    raise ValueError('\n  '.join([f'{folder}: classes differ', *lines]))
  return found


def _folders(folder: epath.Path) -> list[epath.Path]:
  return sorted(
    x
    for x in folder.iterdir()
    if x.is_dir() and not x.name.startswith(('.', '_'))
  )


def _classes(folder: epath.Path) -> dict[str, list[epath.Path]]:
  """Returns the images of each folder that has some."""
  files = {
    x.name: sorted(y for y in x.iterdir() if y.suffix.lower() in SUFFIXES)
    for x in _folders(folder)
  }
  return {name: images for name, images in files.items() if images}


def _list_digest(folder: epath.Path, found: _Files) -> str:
  """Of the files' names and sizes: reading them takes as long as writing."""
  digest = hashlib.sha256()
  for split, classes in sorted(found.items()):
    for files in classes.values():
      for path in files:
        size = path.stat().length
        name = path.relative_to(folder)
        digest.update(f'{split}\0{name}\0{size}\n'.encode())
  return digest.hexdigest()


def _file_rows(
  classes: Mapping[str, Sequence[epath.Path]], label_names: Sequence[str]
) -> Callable[[], Iterator[_Row]]:
  def rows() -> Iterator[_Row]:
    for name, files in classes.items():
      for path in files:
        label = label_names.index(name)
        yield _Row(f'{name}/{path.name}', _read_image(path), label)

  return rows


def _read_image(path: epath.Path) -> bytes:
  content = path.read_bytes()
  try:
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      kept = path.suffix.lower() in _KEPT
      return content if kept else _png(image)
  except (OSError, SyntaxError, ValueError) as e:
    raise ValueError(f'{path}: not an image that can be read: {e}') from e


def _prepare(
  builder: type[_Own], content: _Content, data_dir: epath.PathLike, name: str
) -> str:
  """Writes a content unless it is there; returns the set's name."""
  if not re.fullmatch(r'\w[\w.-]*', name):
    raise ValueError(
      f'{name!r} cannot name a data set: want letters, digits, _ . and -'
    )
  full_name = f'{builder.name}/{name}'
  own = builder(
    content=content,
    data_dir=os.fspath(data_dir),
    config=tfds.core.BuilderConfig(name=name),
  )
  if not own.is_prepared():
    try:
      own.download_and_prepare(
        file_format='array_record',
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
    except OSError:
      # Another process may have put it there meanwhile.
      if not own.is_prepared():
        raise
  there = tfds.builder_from_directory(own.data_dir).info.metadata
  if dict(there or {}).get('source') != content.digest:
    raise ValueError(
      f'{full_name} in {data_dir} was prepared from other files: give another '
      f'name, or remove {own.data_dir}'
    )
  return full_name
