"""Images a second that the host reads, decodes and lays into batches.

  python -m benchmarks.bench_input --folder=DISK --out=FILE

Random images, prepared as data sets are (`dam_jax.data.builders`), read in
random order by `dam_jax.data.batches`, whole epochs at a time, and the files'
pages in the system's memory.

  png_32          PNG files of 32 x 32 pixels, as they are
  png_32_host     ... resized to 224 by PIL, as CLIP does
  png_32_device   ... resized to 224 by JAX, on the device that there is
  jpeg_256_host   JPEG files of 256 x 256 pixels, resized to 224 by PIL
  resident_224    images of 224 that lie on the device, gathered and normalised
                  there: what each step of a merge or of fine-tuning reads

Kinds take turns. CPU seconds are those of all threads of the process.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks import runs
from dam_jax import checkpoint
from dam_jax.data import batches
from dam_jax.data import builders
from dam_jax.data import pipeline
from dam_jax.data import prepared
from dam_jax.data import preprocess
from dam_jax.models import clip

RESIDENT = 'resident_224'
KINDS = ('png_32', 'png_32_host', 'png_32_device', 'jpeg_256_host', RESIDENT)
_CLIP = 224  # pixels

_KINDS = flags.DEFINE_list('kinds', ','.join(KINDS), 'what to measure')
_IMAGES = flags.DEFINE_integer('images', 2048, 'of each set')
_BATCH = flags.DEFINE_integer('batch', 64, 'images a batch')
_THREADS = flags.DEFINE_list('threads', '1,2', 'that read')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'epochs of each at most')
_SECONDS = flags.DEFINE_float('seconds', 120, 'after which no round begins')
_FOLDER = flags.DEFINE_string(
  'folder', '', 'on the disk to read from; empty is a temporary one'
)
_QUICK = flags.DEFINE_bool('quick', False, 'few images, few runs')
_OUT = flags.DEFINE_string('out', '', 'file to append a line a row to')


def _picture(seed: int, size: int) -> Image.Image:
  """Smooth colours with some noise: compresses as a photograph does."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
  smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
  noise = rng.normal(scale=6, size=smooth.shape)
  return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def make_set(folder: Path, name: str) -> prepared.Images:
  """Prepares the images of a kind, '<suffix>_<pixels>', and opens them."""
  suffix, _, size = name.partition('_')
  files = folder / 'files' / name / 'train' / 'one'
  files.mkdir(parents=True)
  for i in range(_IMAGES.value):
    _picture(i, int(size)).save(files / f'{i:06d}.{suffix}')
  own = builders.prepare_folder(files.parents[1], folder, name=name)
  about = prepared.sets.get(own)
  return prepared.Prepared(
    about=about,
    label_names=('one',),
    sizes={'train': _IMAGES.value},
    folder=prepared.place(about, folder),
  ).train


def reader(
  images: prepared.Images, kind: str, threads: int
) -> Callable[[], None]:
  """Returns what reads an epoch."""
  transform = None
  if kind.endswith('_host'):
    transform = functools.partial(preprocess.resize_crop, size=_CLIP)
  resize = jax.jit(preprocess.on_device, static_argnums=1)
  stream = batches.batches(
    images,
    _BATCH.value,
    seed=0,
    epochs=1,
    transform=transform,
    threads=threads,
  )

  def read() -> None:
    for batch in stream:
      if kind.endswith('_device'):
        jax.block_until_ready(resize(batch, _CLIP))

  return read


def resident() -> Callable[[], None]:
  """Returns what gathers an epoch from images on the device."""
  num = _IMAGES.value
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (1, num, _CLIP, _CLIP, 3), np.uint8)
  data = pipeline.Unlabelled(jnp.asarray(images))
  indices = pipeline.epoch_indices(
    0, [num], steps=num // _BATCH.value, phases=1, batch=_BATCH.value
  )
  gather = jax.jit(lambda *x: clip.normalize(pipeline.gather(*x).images))

  def read() -> None:
    for step in indices:
      jax.block_until_ready(gather(data, step))

  return read


def timed(read: Callable[[], None]) -> Callable[[], dict[str, float]]:
  """Returns what measures an epoch, once files and programs are there."""

  def run() -> dict[str, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    read()
    seconds = time.perf_counter() - begin
    return {'seconds': seconds, 'cpu': time.process_time() - cpu}

  read()
  return run


def measure_all(folder: Path) -> Iterator[dict[str, Any]]:
  """Yields a row for each kind and number of threads."""
  read = [k for k in _KINDS.value if k != RESIDENT]
  names = {k: '_'.join(k.split('_')[:2]) for k in read}
  opened = {x: make_set(folder, x) for x in dict.fromkeys(names.values())}
  cases = [(k, int(t)) for k in read for t in _THREADS.value]
  readers = [timed(reader(opened[names[k]], k, t)) for k, t in cases]
  if RESIDENT in _KINDS.value:
    cases.append((RESIDENT, 0))
    readers.append(timed(resident()))
  times = runs.alternate(readers, _REPEATS.value, _SECONDS.value)
  num = _IMAGES.value // _BATCH.value * _BATCH.value
  for (kind, threads), found in zip(cases, times, strict=True):
    seconds = statistics.median(x['seconds'] for x in found)
    yield {
      **{'kind': kind, 'threads': threads, 'batch': _BATCH.value},
      **{'images': num, 'seconds': seconds, 'per_second': num / seconds},
      'cpu': statistics.median(x['cpu'] for x in found),
      'runs': found,
    }


def _table(rows: list[Mapping[str, Any]]) -> Table:
  table = Table('kind', 'threads', 'images/s', 'range', 'CPU ms an image')
  for row in rows:
    speeds = [row['images'] / x['seconds'] for x in row['runs']]
    table.add_row(
      *(row['kind'], str(row['threads']), f'{row["per_second"]:.0f}'),
      f'{min(speeds):.0f}-{max(speeds):.0f}',
      f'{1000 * row["cpu"] / row["images"]:.3g}',
    )
  return table


def main(argv):
  """Measures and prints."""
  del argv
  if _QUICK.value:
    runs.set_defaults(images=256, repeats=3, seconds=20.0)
  unknown = sorted({*_KINDS.value} - {*KINDS})
  if unknown:
    raise app.UsageError(f'unknown: {", ".join(unknown)}')
  load = os.getloadavg()
  with tempfile.TemporaryDirectory(dir=_FOLDER.value or None) as folder:
    rows = list(measure_all(Path(folder)))
  records.append(
    *(_OUT.value, 'input', rows),
    load=load,
    device=jax.devices()[0].device_kind,
    versions=checkpoint.versions(),
  )
  console = Console(width=None if sys.stdout.isatty() else 100)
  console.print(_table(rows), f'load before: {load[0]:.1f}')


if __name__ == '__main__':
  app.run(main)
