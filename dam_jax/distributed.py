"""Many hosts: joining them, feeding each its images, seeing that they agree.

Every host runs the same program on the same inputs. `initialize` joins them
before JAX looks at a device; `local_images` says which of a step's images a
host reads, `global_batch` makes one batch of what all have read, and
`check_agreement` stops a run whose hosts were given different things.
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dam_jax.sharding import check_images
from dam_jax.typing import Batch

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
"""Environment variables that `initialize` reads."""


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Joins the processes of a run, where there are several.

  Args:
    coordinator: 'host:port' of process 0; 'auto' has JAX find all three by
      itself, as it can on Cloud TPU, SLURM, Kubernetes and Open MPI. None reads
      `VARIABLES`.
    num_processes: of the run; likewise.
    process_id: of this one, from 0; likewise.

  Returns:
    Whether there is anything to join: False where nothing was given.

  Raises:
    ValueError: where only some of the three are given, or make no sense.
  """
  if coordinator == 'auto':
    jax.distributed.initialize()
    return True
  given = (coordinator, num_processes, process_id)
  address, *counts = (
    os.environ.get(name) if x is None else str(x)
    for name, x in zip(VARIABLES, given, strict=True)
  )
  if address is None and counts == [None, None]:
    return False
  num, own = (int(x) if x and x.isdigit() else -1 for x in counts)
  if address is None or not 0 <= own < num:
    found = zip(VARIABLES, (address, *counts), strict=True)
    raise ValueError(
      'processes that join need an address, their number, and each its own '
      f'from 0, got {", ".join(f"{name}={x}" for name, x in found)}'
    )
  jax.distributed.initialize(address, num, own)
  return True


def is_first() -> bool:
  """Whether this process is the one that writes what is not written by all."""
  return jax.process_index() == 0


def agreed(value: bool) -> bool:
  """Returns on every process what process 0 was given.

  Args:
    value: what it decided, such as whether a file is there.
  """
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def wait(name: str) -> None:
  """Returns once every process has come here.

  Args:
    name: of the place, the same on all of them.

  Raises:
    ValueError: where the names differ.
  """
  multihost_utils.sync_global_devices(name)


@dataclasses.dataclass(frozen=True)
class Hosts:
  """The processes of this run, for work that each does a part of.

  `dam_jax.streaming.merge_leaves` and `dam_jax.checkpoint.ModelWriter` take it.
  """

  @property
  def index(self) -> int:
    """Of this process, from 0."""
    return jax.process_index()

  @property
  def count(self) -> int:
    """Of all."""
    return jax.process_count()

  def exchange(self, data: bytes) -> list[bytes]:
    """Returns what every process was given here, in their order.

    Args:
      data: of this process, of any length.
    """
    own = np.frombuffer(data, np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size, np.int32))
    sizes = np.reshape(sizes, -1)
    padded = np.pad(own, (0, int(sizes.max()) - own.size))
    rows = multihost_utils.process_allgather(padded[None], tiled=True)
    return [row[:n].tobytes() for row, n in zip(rows, sizes, strict=True)]


def share(
  leaves: Mapping[str, jax.ShapeDtypeStruct], hosts: Hosts | None
) -> set[str]:
  """Says which leaves are this process's.

  Args:
    leaves: of a model, by path.
    hosts: all processes; None is one.

  Returns:
    Their paths: each leaf is one process's, and each has about as many bytes.
  """
  if hosts is None:
    return {*leaves}
  sizes = {p: math.prod(x.shape) * x.dtype.itemsize for p, x in leaves.items()}
  loads, own = [0] * hosts.count, set()
  for path in sorted(sizes, key=lambda p: (-sizes[p], p)):
    least = loads.index(min(loads))
    loads[least] += sizes[path]
    if least == hosts.index:
      own.add(path)
  return own


def combiner(largest: bool) -> np.ufunc:
  """Returns what makes one of two parts of a total: their sum, or larger."""
  return np.maximum if largest else np.add


def total_over(
  hosts: Hosts,
  found: Mapping[str, tuple[Any, Any]],
  like: Mapping[str, Any],
  *,
  largest: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
  """Sums arrays over processes.

  Args:
    hosts: all of them.
    found: by name, pytrees of NumPy arrays to sum, and of arrays that are the
      same wherever they are.
    like: pytrees of the same structures for all names, of which a process may
      have found some.
    largest: names of which the largest is wanted, in place of the sum.

  Returns:
    The same for all names.
  """
  data = io.BytesIO()
  leaves = {
    f'{i} {j}': x
    for i, name in enumerate(like)
    for j, x in enumerate(jax.tree.leaves(found.get(name)))
  }
  np.savez(data, **leaves)
  sent = [
    dict(np.load(io.BytesIO(each), allow_pickle=False))
    for each in hosts.exchange(data.getvalue())
  ]

  def total(i, name, parts, same):
    shapes = jax.tree.leaves((parts, same))
    every = [
      [each[f'{i} {j}'] for j in range(len(shapes))]
      for each in sent
      if f'{i} 0' in each
    ]
    num, add = len(jax.tree.leaves(parts)), combiner(name in largest)
    sums = [functools.reduce(add, x) for x in zip(*every, strict=True)]
    return jax.tree.unflatten(
      jax.tree.structure((parts, same)), [*sums[:num], *every[0][num:]]
    )

  return {name: total(i, name, *x) for i, (name, x) in enumerate(like.items())}


def gather(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns on every process what all of them have.

  Args:
    arrays: of this process, by names that no other has.
  """
  if jax.process_count() == 1:
    return dict(arrays)
  file, out = io.BytesIO(), {}
  np.savez(file, **dict[str, Any](arrays))
  for each in Hosts().exchange(file.getvalue()):
    out |= np.load(io.BytesIO(each), allow_pickle=False)
  return out


def from_first(like: Any, values: Any) -> Any:
  """Returns on every process the arrays of process 0, on a device of its own.

  Args:
    like: a pytree of such arrays, which every process has.
    values: on process 0; others may have None.
  """
  if jax.process_count() == 1:
    return values
  values = multihost_utils.broadcast_one_to_all(values if is_first() else like)
  return jax.device_put(values, jax.local_devices()[0])


def check_agreement(facts: Mapping[str, Any]) -> None:
  """Raises on every process unless all of them were given the same.

  Args:
    facts: what must agree, by name: a config, versions, hashes of files;
      anything that JSON can hold.

  Raises:
    ValueError: naming all facts that differ, and the processes that depart
      from the first.
  """
  digests = [
    np.frombuffer(
      hashlib.sha256(json.dumps(x, sort_keys=True).encode()).digest(), np.uint8
    )
    for x in facts.values()
  ]
  if jax.process_count() == 1:
    return
  names = np.frombuffer(hashlib.sha256(' '.join(facts).encode()).digest(), 'u1')
  _compare({'names of facts': names})
  _compare(dict(zip(facts, digests, strict=True)))


def _compare(digests: Mapping[str, np.ndarray]) -> None:
  everywhere = multihost_utils.process_allgather(np.stack([*digests.values()]))
  lines = []
  for i, name in enumerate(digests):
    differ = (everywhere[:, i] != everywhere[0, i]).any(axis=-1)
    if differ.any():
      found = ', '.join(map(str, np.flatnonzero(differ)))
      lines.append(f'{name}: not that of process 0 on {found}')
  if lines:
    raise ValueError('\n  '.join(['processes do not agree:', *lines]))


def local_images(mesh: Mesh, num: int) -> slice:
  """Says which images of a step this process reads.

  Args:
    mesh: of `dam_jax.sharding.make_mesh`.
    num: of images a task and draw on all processes, `B`.

  Returns:
    Their places: no process reads another's, unless devices of both share them
    over axis 'model'.

  Raises:
    ValueError: where images do not divide over axis 'data', or this process's
      are not one stretch of them.

  Examples:
    >>> local_images(dj.sharding.make_mesh(), 16)
    slice(0, 16, None)
  """
  check_images(num, mesh.shape['data'])
  sharding = NamedSharding(mesh, P('data'))
  found = sharding.addressable_devices_indices_map((num,)).values()
  spans = sorted({index[0].indices(num)[:2] for index in found if index})
  if any(a[1] != b[0] for a, b in itertools.pairwise(spans)):
    raise ValueError(
      "the devices of this process do not lie side by side on axis 'data': "
      'order the devices of the mesh by process'
    )
  return slice(spans[0][0], spans[-1][1])


def global_batch(local: Batch, mesh: Mesh) -> Batch:
  """Makes one batch of what the processes have read.

  Args:
    local: leaves `[S, T, b, ...]`, the images of `local_images`.
    mesh: of the devices.

  Returns:
    Leaves `[S, T, B, ...]`, split over axis 'data'.

  Examples:
    >>> local = dj.Batch(np.ones((1, 2, 16, 4, 4, 3), np.float32))
    >>> batch = global_batch(local, dj.sharding.make_mesh())
    >>> batch.images.addressable_shards[0].data.shape
    (1, 2, 2, 4, 4, 3)
  """
  sharding = NamedSharding(mesh, P(None, None, 'data'))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    local,
  )
