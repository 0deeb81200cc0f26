"""Compiles a merge for TPUs that are not there, and says what it would take.

  python -m experiments.aot --topology=v5e:4x4 --model=ViT-L/14 --tasks=20
  python -m experiments.aot --topology=v5e:4x4 --model=7B --tasks=8 \
    --method=task_arithmetic

Nothing runs: XLA's compiler for TPUs comes with `pip install -e '.[aot]'`. Of
each device it prints the memory, the operations, the bytes and collectives of
one step of a learned merge, or of a whole merge without data, and the time that
the chip's peak rates allow.
"""

from collections.abc import Mapping
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import time
from typing import Any

from absl import app
from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from rich.console import Console
from rich.table import Table

import dam_jax as dj
from dam_jax import parallel
from dam_jax import sharding
from dam_jax.models import clip
from dam_jax.models import inputs
from experiments import flops
from experiments import methods

TOWERS = {
  'ViT-B/32': clip.VIT_B32,
  'ViT-B/16': clip.VIT_B16,
  'ViT-L/14': clip.VIT_L14,
}
"""Image towers by name; beside them '7B' is a language model, see `_llama`."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of one device.

  Attributes:
    flops: operations a second, in bfloat16.
    memory: bytes.
    bandwidth: of the memory, bytes a second.
    links: to other chips together, bytes a second.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float


CHIPS = {
  'v4': Chip(275e12, 32e9, 1228e9, 300e9),
  'v5e': Chip(197e12, 16e9, 819e9, 200e9),
  'v5p': Chip(459e12, 95e9, 2765e9, 600e9),
  'v6e': Chip(918e12, 32e9, 1640e9, 448e9),
}
"""By the first part of a topology; from Google's pages on Cloud TPU."""

_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
  r'collective-permute)(?:-start)?\('
)
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16)\[([\d,]*)\]')


def _mesh(topology: str, model: int) -> Mesh:
  # A machine without TPUs has no server to ask what it is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  options = {}
  if topology.endswith(':1x1'):
    options['chips_per_host_bounds'] = (1, 1, 1)
  found = topologies.get_topology_desc(
    platform='tpu', topology_name=topology, **options
  )
  return sharding.make_mesh({'data': -1, 'model': model}, devices=found.devices)


def _llama() -> dict[str, Any]:
  """Returns the leaves of a language model of 6.7 billion parameters.

  In bfloat16, with the sizes of Touvron et al., `Llama 2: Open Foundation and
  Fine-Tuned Chat Models <https://arxiv.org/abs/2307.09288>`_, 2023.
  """
  width, hidden, words, layers = 4096, 11008, 32000, 32
  square = dict.fromkeys(('q', 'k', 'v', 'o'), (width, width))
  block = {
    **square,
    'gate': (width, hidden),
    'up': (width, hidden),
    'down': (hidden, width),
    'norm1': (width,),
    'norm2': (width,),
  }
  shapes = {
    'embed': (words, width),
    'head': (width, words),
    'norm': (width,),
    'layers': {str(i): block for i in range(layers)},
  }
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _abstract(*shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _on(mesh: Mesh, x: Any, spec: P) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
  )


def _merge(base: Any, method: str, tasks: int, mesh: Mesh):
  """Lowers a whole merge without data, all leaves split over all devices."""
  merger = dj.from_transform(methods.DATA_FREE[method]())
  experts = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((tasks, *x.shape), x.dtype), base
  )
  placed = [
    jax.tree.map(
      lambda x, spec: _on(mesh, x, spec),
      model,
      sharding.fsdp(model, mesh, leading=leading),
    )
    for model, leading in ((base, 0), (experts, 1))
  ]
  split: Any = dj.data_parallel(merger, mesh)
  state = jax.eval_shape(split.init, jax.random.key(0), *placed)
  return split.finalize.lower(state, *placed), 0


def _step(config: clip.VisionConfig, method: str, mesh: Mesh, **options):
  """Lowers one step of a learned merge, and counts its operations."""
  tasks, batch, replicated = (
    options[name] for name in ('tasks', 'batch', 'replicated')
  )
  tower = clip.VisionTower(
    config, dtype=jnp.bfloat16, scan_layers=True, remat=options['remat']
  )
  pixels = _abstract(1, *config.image_shape)
  base = jax.eval_shape(tower.init, jax.random.key(0), pixels)['params']
  heads = clip.stack_heads(
    [np.eye(config.projection_dim, 100, dtype=np.float32)] * tasks
  )

  def features_fn(params, pixels):
    return jnp.asarray(tower.apply({'params': params}, pixels))

  merger = methods.build(
    method,
    methods.resolve([method], {}, steps=1000, batch=batch, images=batch)[
      method
    ],
    logits_fn=clip.zero_shot(features_fn, heads),
    task_logits_fn=clip.zero_shot_task(features_fn, heads),
    preprocess_fn=clip.normalize,
    image_shape=config.image_shape,
    inputs_fn=inputs.dense_inputs(tower),
    levels=inputs.levels(config),
    seeds=None,
  )
  shape = (merger.plan.phases, tasks, batch)
  images = _abstract(*shape, *config.image_shape)
  references = _abstract(*shape, 100)
  draws = dj.Batch(images, references if merger.plan.references else None)

  def abstract(shards):
    layout = dj.tree.layout_of(base, shards=shards)
    flat, stacked = (
      dj.tree.Raveled(_abstract(*lead, *layout.shape), (), layout)
      for lead in ((), (tasks,))
    )
    state = jax.eval_shape(merger.init, jax.random.key(0), flat, stacked)
    return layout, (state, flat, stacked)

  total = flops.count(merger.step, *abstract(1)[1], draws)
  split: Any = dj.data_parallel(
    merger,
    mesh,
    sharding.VIT if mesh.shape['model'] > 1 else None,
    shard_state=not replicated,
    forward_dtype=jnp.bfloat16,
  )
  layout, held = abstract(1 if replicated else mesh.size)
  args = jax.tree.map(
    lambda x: _on(mesh, x, parallel.state_spec(x, layout, mesh)), held
  )
  fed = jax.tree.map(lambda x: _on(mesh, x, P(None, None, 'data')), draws)
  return split.step.lower(*args, fed), total


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Counts what devices send each other.

  Args:
    text: of a compiled program, for one device.

  Returns:
    By kind, how many there are, and the bytes of their results; those in the
    body of a loop count once.

  Examples:
    >>> collectives('%x = bf16[8,4]{1,0} all-gather(%y), dimensions={0}')
    {'all-gather': (1, 64)}
  """
  found: dict[str, tuple[int, int]] = {}
  for shapes, kind in _COLLECTIVE.findall(text):
    size = sum(
      int(np.prod([int(n) for n in dims.split(',') if n] or [1])) * _size(dtype)
      for dtype, dims in _ARRAY.findall(shapes)
    )
    num, total = found.get(kind, (0, 0))
    found[kind] = (num + 1, total + size)
  return found


def _size(dtype: str) -> int:
  return 1 if dtype == 'pred' else max(1, int(re.sub(r'\D', '', dtype)) // 8)


def _compile(lowered: Any, topology: str) -> tuple[Any, float]:
  """Returns a program, and the seconds that compiling it took."""
  begin = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise ValueError(f'too much for {topology}: {e}') from e
  return compiled, time.perf_counter() - begin


def measure(
  topology: str,
  model: str,
  *,
  method: str = 'dam_paper',
  tasks: int = 6,
  batch: int = 16,
  model_axis: int = 1,
  replicated: bool = False,
  remat: bool = False,
) -> dict[str, Any]:
  """Compiles a merge for a slice of TPUs.

  Args:
    topology: such as 'v5e:4x4'.
    model: one of `TOWERS`, or '7B'.
    method: a learned one of `experiments.methods`, or for a language model one
      without data.
    tasks: number of experts.
    batch: images a task and draw.
    model_axis: devices over which a forward pass splits heads and units.
    replicated: whether each device keeps all of the state.
    remat: whether gradients compute a tower's blocks again.

  Returns:
    What was asked, and by device: 'arguments', 'temporaries' and 'memory' in
    bytes, 'flops', 'bytes' moved (loop bodies once), 'collectives', 'compile'
    in seconds and 'roofline' in seconds by what bounds it.

  Raises:
    ValueError: where something is unknown, or XLA sees that it will not fit.
  """
  kind = topology.split(':')[0]
  lines = [f'no chip {kind!r}: {", ".join(CHIPS)}'] * (kind not in CHIPS)
  if model not in (*TOWERS, '7B'):
    lines.append(f'no model {model!r}: {", ".join([*TOWERS, "7B"])}')
  known = methods.DATA_FREE if model == '7B' else methods.LEARNED
  if method not in known:
    lines.append(f'no method {method!r} for {model}: {", ".join(known)}')
  if model == '7B' and (replicated or remat):
    lines.append('replicated and remat are for learned merges, 7B has none')
  if importlib.util.find_spec('libtpu') is None:
    lines.append("no compiler for TPUs: pip install -e '.[aot]'")
  if lines:
    raise ValueError('\n  '.join(['a program to compile:', *lines]))
  chip, mesh = CHIPS[kind], _mesh(topology, model_axis)
  if model == '7B':
    lowered, total = _merge(_llama(), method, tasks, mesh)
  else:
    lowered, total = _step(
      TOWERS[model],
      method,
      mesh,
      tasks=tasks,
      batch=batch,
      replicated=replicated,
      remat=remat,
    )
  compiled, seconds = _compile(lowered, topology)
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  # One device sends nothing, and jaxlib 0.10.2 cannot read a v5p's program.
  sent = collectives(compiled.as_text()) if mesh.size > 1 else {}
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  held -= memory.alias_size_in_bytes
  moved = costs['bytes accessed']
  return {
    'topology': topology,
    'model': model,
    'method': method,
    'tasks': tasks,
    'batch': batch,
    'mesh': dict(mesh.shape),
    'replicated': replicated,
    'remat': remat,
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'memory': held + memory.temp_size_in_bytes,
    'fits': held + memory.temp_size_in_bytes <= chip.memory,
    'flops': total / mesh.size,
    'bytes': moved,
    'collectives': sent,
    'compile': seconds,
    'roofline': {
      'operations': total / mesh.size / chip.flops,
      'memory': moved / chip.bandwidth,
      'links': sum(size for _, size in sent.values()) / chip.links,
    },
  }


def table(found: Mapping[str, Any]) -> Table:
  """Shows what `measure` found."""
  title = f'{found["method"]} of {found["tasks"]} x {found["model"]} on '
  out = Table(title=f'{title}{found["topology"]}, for each device')
  out.add_column('')
  out.add_column('', justify='right')
  times = found['roofline']
  bound = max(times, key=lambda name: times[name])
  rows = {
    'arguments': f'{found["arguments"] / 1e9:.2f} GB',
    'temporaries': f'{found["temporaries"] / 1e9:.2f} GB',
    'memory': f'{found["memory"] / 1e9:.2f} GB'
    + ('' if found['fits'] else ', too much'),
    'operations': f'{found["flops"] / 1e12:.2f} TFLOP',
    'bytes moved': f'{found["bytes"] / 1e9:.2f} GB',
    **{
      kind: f'{num}, {size / 1e6:.1f} MB'
      for kind, (num, size) in found['collectives'].items()
    },
    'compile': f'{found["compile"]:.0f} s',
    'roofline': f'{1e3 * times[bound]:.1f} ms, by {bound}',
  }
  for row in rows.items():
    out.add_row(*row)
  return out


def main(argv: list[str]) -> None:
  """Reads the flags, compiles, and prints the table."""
  del argv
  jax.config.update('jax_platforms', 'cpu')
  given = flags.FLAGS.flag_values_dict()
  names = inspect.signature(measure).parameters
  try:
    found = measure(**{name: given[name] for name in names})
  except ValueError as e:
    sys.exit(f'error: {e}')
  Console().print(table(found))


if __name__ == '__main__':
  flags.DEFINE_string('topology', 'v5e:4x4', 'of the TPU slice')
  flags.DEFINE_enum('model', 'ViT-B/32', [*TOWERS, '7B'], 'what to merge')
  flags.DEFINE_string(
    'method', 'dam_paper', 'a learned one, or for 7B one without data'
  )
  flags.DEFINE_integer('tasks', 6, 'experts, each for a task')
  flags.DEFINE_integer('batch', 16, 'images a task and draw')
  flags.DEFINE_integer('model_axis', 1, "devices of axis 'model'")
  flags.DEFINE_bool('replicated', False, 'keep all on each device')
  flags.DEFINE_bool('remat', False, 'compute blocks again in gradients')
  app.run(main)
