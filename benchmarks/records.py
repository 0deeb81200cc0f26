"""Rows of benchmarks as lines of JSON, each with what it was measured on."""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

from benchmarks.runs import ROOT


def _git(*args: str) -> str:
  done = subprocess.run(
    ['git', *args],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    check=False,
  )
  return done.stdout.strip()


def commit() -> str:
  """Returns the commit of this checkout, with a + where files differ from it.

  Empty where there is no git, or no checkout of it.
  """
  return _git('rev-parse', 'HEAD') + '+' * bool(_git('status', '--short'))


def processor() -> str:
  """Returns the name of this machine's processor."""
  path = Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [x.partition(':')[2].strip() for x in lines if 'model name' in x]
  return names[0] if names else platform.processor() or platform.machine()


def append(
  path: str, benchmark: str, rows: Sequence[Mapping[str, Any]], **about: Any
) -> None:
  """Appends rows to a file, a line each.

  Args:
    path: of the file; empty: nothing is written.
    benchmark: its name.
    rows: what was measured.
    **about: what all rows have in common: device, versions, threads.
  """
  if not path:
    return
  common = {
    'benchmark': benchmark,
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': commit(),
    'processor': processor(),
    'cores': len(os.sched_getaffinity(0)),
    **about,
  }
  with Path(path).open('a', encoding='utf-8') as file:
    for row in rows:
      file.write(json.dumps({**common, **row}) + '\n')


def read(path: str, benchmark: str | None = None) -> list[dict[str, Any]]:
  """Returns the rows of a file, of one benchmark if it is named."""
  lines = Path(path).read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  return [r for r in rows if benchmark in (None, r['benchmark'])]
