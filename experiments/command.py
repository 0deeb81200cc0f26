"""What the experiments' commands share: their flags, errors in one line."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import sys
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_dict
from ml_collections import config_flags
from rich.console import Console
from rich.text import Text

from dam_jax import distributed
from experiments import preemption

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', "where to write; empty is runs/<config's name>-<time>"
)

Run = Callable[[config_dict.ConfigDict, pathlib.Path, Console], Any]
"""What a command does with its config, its workdir and a console."""


_TRITON = '--xla_gpu_enable_triton_gemm'


def spare_gpus() -> None:
  """Has XLA leave matrix products on GPUs to cuBLAS, unless told otherwise.

  XLA of jaxlib 0.11.2 aborts in `triton_tiling_propagation.cc` where it fuses
  those of a tower of 8 x 8 patches: seen on an H200, in compiling
  `dam_jax.evaluate.predict` and `dam_jax.attacks.universal_patch`.
  """
  given = os.environ.get('XLA_FLAGS', '')
  if _TRITON not in given:
    os.environ['XLA_FLAGS'] = f'{given} {_TRITON}=false'.strip()


def forget_programs(most: int = 40_000) -> None:
  """Frees compiled programs, for runs that compile many.

  Linux lets a process map 65530 pieces of memory, of which each program takes
  nine; where there are no more, LLVM aborts.

  Args:
    most: pieces that may stay mapped.
  """
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_text().count('\n') > most:
    jax.clear_caches()


def _define_hosts() -> None:
  flags.DEFINE_string(
    'coordinator',
    None,
    "host:port of process 0; 'auto' finds all three by itself, on Cloud TPU, "
    'SLURM, Kubernetes and Open MPI',
  )
  flags.DEFINE_integer('num_processes', None, 'of the run')
  flags.DEFINE_integer('process_id', None, 'of this process, from 0')


def _join() -> None:
  """Joins other hosts where flags or the environment name them."""
  joined = distributed.initialize(
    flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id
  )
  if joined and not _WORKDIR.value:
    raise ValueError('several hosts need --workdir, on a disk that all share')


_UNWRITABLE = {
  getattr(errno, name)
  for name in ('EACCES', 'EDQUOT', 'ENOSPC', 'EPERM', 'EROFS')
}


def _told(error: Exception) -> str:
  """Returns what went wrong, and what to do where files cannot be written."""
  if isinstance(error, OSError) and error.errno in _UNWRITABLE:
    return (
      f'{error}\nfree some space or choose another --workdir, then start '
      'again; what was saved so far stays'
    )
  return str(error)


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir: two would break each other's saves.

  Args:
    workdir: is made where it is not there, and taken away again where nothing
      was written.

  Raises:
    ValueError: where another run is in it.
  """
  new = not workdir.exists()
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / '.lock'
  with path.open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(f'{workdir}: another run writes to it') from e
    try:
      yield
    finally:
      if new and [*workdir.iterdir()] == [path]:
        path.unlink()
        workdir.rmdir()


def start(run: Run, example: str, *, hosts: bool = False) -> None:
  """Reads the flags and runs.

  Args:
    run: raises ValueError, FloatingPointError or OSError for what a user can
      mend.
    example: of a config.
    hosts: whether several hosts may run it together.
  """
  if hosts:
    _define_hosts()

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)
    spare_gpus()
    if _CONFIG.value is None:
      raise app.UsageError(f'--config is missing, such as {example}')
    try:
      if hosts:
        _join()
    except ValueError as e:
      raise app.UsageError(str(e)) from e
    console = Console(
      width=None if sys.stdout.isatty() else 160,
      quiet=not distributed.is_first(),
    )
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    stamp = time.strftime('%Y%m%d-%H%M%S')
    workdir = pathlib.Path(
      _WORKDIR.value or f'runs/{pathlib.Path(file).stem}-{stamp}'
    )
    console.print(
      f'workdir: {workdir} (pass --workdir={workdir} to go on in it)'
    )
    if jax.process_count() == 1:
      preemption.exit_at_once()
    try:
      with (
        alone(workdir) if distributed.is_first() else contextlib.nullcontext()
      ):
        run(_CONFIG.value, workdir, console)
    except preemption.Preempted as e:
      console.print(f'{e}: start again with this workdir to go on')
      raise
    except (ValueError, FloatingPointError, OSError) as e:
      logging.debug('', exc_info=True)
      message = Text.assemble(('error: ', 'bold red'), _told(e))
      console.quiet = False
      console.print(message, highlight=False, soft_wrap=True)
      sys.exit(1)

  app.run(main)
