"""What a study runs: its config, its sections and their cells.

A cell is one run of `experiments.merge`: a pool, which uploads are bad, a seed
and some methods. Its name says which, and never changes.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from ml_collections import config_dict

from configs import pool as pool_config
from dam_jax import attacks
from dam_jax.data import tasks as tasks_lib
from experiments import load
from experiments import merge_run
from experiments import methods
from experiments import settings

SECTIONS = {
  'succession': 'Succession: what a merge with one bad expert inherits',
  'transfer': 'Transfer: the same triggers on tasks whose expert is clean',
  'number': 'Number of bad experts, and number of tasks',
  'defences': 'Defences on the same images and steps, before and after',
  'ablation': 'Ablation of Defense-Aware Merging',
  'curve': 'Accuracy against attack success over the safety weight',
  'adaptive': 'An attacker who knows the defence',
}
"""Titles of the sections; 'transfer' is read off the cells of 'succession'."""

KEYS = {
  'pool': "folder of the real pool, for the section 'number'",
  'nano_pool': 'folder of the pool with many seeds an attack, for all others; '
  'its uploads are called <attack>_<task>_<seed>',
  'nano_tasks': 'its tasks to merge, names with commas; empty is all',
  'sections': f"names with commas of {', '.join(SECTIONS)}, or 'all'",
  'attacks': 'of the section succession, names with commas',
  'attacked': 'tasks of the nano pool, each attacked in cells of its own',
  'attack_seeds': 'uploads of each attack on each task',
  'merge_seeds': 'of each method that is random',
  'methods': 'merges of the section succession; see experiments.methods',
  'tasks': 'of the real pool, merged when counting bad experts',
  'bad': 'backdoored checkpoints of the real pool, in the order they are added',
  'bad_counts': 'numbers of bad experts, with commas',
  'bad_rotations': 'choices of the bad experts where not all of them are bad',
  'task_counts': 'numbers of tasks, with commas',
  'task_order': 'tasks of the real pool, in the order they are added',
  'task_bad': 'the bad expert while tasks are added',
  'number_methods': 'merges of the section number',
  'defences': 'of the section defences, beside the plain merge',
  'defence_attacks': 'attacks of the section defences',
  'defence_images': 'dev images a task there, with labels for who reads them',
  'ablation_attacks': 'attacks of the section ablation',
  'curve_attacks': 'attacks of the section curve',
  'safety_weights': 'of dam_robust there, with commas',
  'adaptive_attacks': 'attacks of the section adaptive',
  'adaptive_methods': 'merges of the section adaptive',
  'options': 'of each method, see configs/pool.py',
  'steps': 'see experiments.load, as for what follows',
  'batch': '',
  'dev': '',
  'test': '',
  'transfer_test': '',
  'audit': 'in cells that have a dam_robust; see experiments.load',
  'draws': 'of the bootstrap',
  'seed': 'of everything random; merges take this one and those after it',
}
"""What a config says."""

ABLATION: dict[str, tuple[str, Mapping[str, Any]]] = {
  'dam_paper, both in turn': ('dam_paper', {}),
  'dam_paper, M1 only': ('dam_paper', {'masks': ('shared',)}),
  'dam_paper, M2 only': ('dam_paper', {'masks': ('safety',)}),
  'dam_paper, joint': ('dam_paper', {'update': 'joint'}),
  'dam_paper, exact gradient': ('dam_paper', {'inner_gradient': 'exact'}),
  'dam_released': ('dam_released', {}),
  'dam_robust': ('dam_robust', {}),
  'dam_robust, no safety': ('dam_robust', {'safety_weight': 0.0}),
}
"""Rows of the ablation: a method, and its options that depart from usual."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of `experiments.merge`.

  Attributes:
    section: of the study.
    name: of its folder.
    group: rows of the section's table that are compared with each other.
    x: where the group or its variant is on an axis, if there is one.
    task: that is attacked; where groups have several, uploads of each are drawn
      apart.
    upload: number of the attack's seed, or of the choice of bad experts.
    seed: of the merge.
    methods: names.
    changes: of configs/pool.py's config, by dotted key.
    rows: what a method is called in the table, where not by its name.
  """

  section: str
  name: str
  group: str
  x: float | None = None
  task: str = ''
  upload: int = 0
  seed: int = 0
  methods: Sequence[str]
  changes: Mapping[str, Any]
  rows: Mapping[str, str] = dataclasses.field(default_factory=dict)


def sections(config: config_dict.ConfigDict) -> list[str]:
  """Returns the names of a config's sections, in the order of `SECTIONS`."""
  named = settings.split(config.sections)
  return [s for s in SECTIONS if s in named or 'all' in named]


def make(config: config_dict.ConfigDict) -> list[Cell]:
  """Makes all cells of a study, and checks that each can run.

  Args:
    config: see `KEYS`.

  Returns:
    Cells, section by section.

  Raises:
    ValueError: with all that is wrong with the config, or missing.
  """
  _check(config)
  wanted = sections(config)
  out: list[Cell] = []
  if 'succession' in wanted or 'transfer' in wanted:
    out += _crossed(config, 'succession', config.attacks, config.methods)
  if 'number' in wanted:
    out += [*_bad_counts(config), *_task_counts(config)]
  if 'defences' in wanted:
    out += _crossed(
      config,
      'defences',
      config.defence_attacks,
      config.defences,
      changes={'dev': config.defence_images},
    )
  if 'ablation' in wanted:
    for row, (name, chosen) in ABLATION.items():
      changes = {f'options.{name}.{key}': x for key, x in chosen.items()}
      given = config.ablation_attacks, name
      out += _crossed(
        config, 'ablation', *given, variant=row, changes=changes, name=name
      )
  if 'curve' in wanted:
    for weight in map(float, settings.split(config.safety_weights)):
      out += _crossed(
        config,
        'curve',
        *(config.curve_attacks, 'dam_robust'),
        variant=f'dam_robust, weight {weight:g}',
        changes={'options.dam_robust.safety_weight': weight},
        name='dam_robust',
        x=weight,
      )
  if 'adaptive' in wanted:
    given = config.adaptive_attacks, config.adaptive_methods
    out += _crossed(config, 'adaptive', *given)
  _check_cells(config, out)
  return out


def _check(config: config_dict.ConfigDict) -> None:
  """Raises with all that is wrong with a config's values."""
  lines = settings.wrong_keys(config, KEYS)
  if not lines:
    lines += settings.not_positive(
      config, but=('audit', 'dev', 'test', 'transfer_test', 'steps', 'seed')
    )
    lines += [
      f'{key} must not be negative, got {config[key]}'
      for key in ('dev', 'test', 'transfer_test', 'steps', 'seed')
      if config[key] < 0
    ]
    named = settings.split(config.sections)
    lines += [
      f'unknown section {s!r}, allowed are {", ".join([*SECTIONS, "all"])}'
      for s in named
      if s not in (*SECTIONS, 'all')
    ]
    if not named:
      lines.append(f'no section, there are {", ".join(SECTIONS)}')
    for key, kind in (
      ('bad_counts', int),
      ('task_counts', int),
      ('safety_weights', float),
    ):
      lines += _not_numbers(key, config[key], kind)
    wanted = sections(config)
    used = [config.pool] * ('number' in wanted)
    used += [config.nano_pool] * bool(set(wanted) - {'number'})
    lines += [
      f'{folder}: no such folder'
      for folder in used
      if not pathlib.Path(folder).is_dir()
    ]
    lines += _too_many(config) if not lines and 'number' in wanted else []
  settings.raise_if(lines)


def _not_numbers(key: str, text: str, kind: type) -> list[str]:
  try:
    good = all(kind(x) >= 0 for x in settings.split(text))
  except ValueError:
    good = False
  return [] if good else [f'{key} must be numbers with commas, got {text!r}']


def _too_many(config: config_dict.ConfigDict) -> list[str]:
  return [
    f'{count} of {key}, which has {len(settings.split(config[key]))}'
    for counts, key in (('bad_counts', 'bad'), ('task_counts', 'task_order'))
    for count in map(int, settings.split(config[counts]))
    if count > len(settings.split(config[key]))
  ]


def nano_tasks(config: config_dict.ConfigDict) -> list[str]:
  """Returns the names of the nano pool's tasks that are merged."""
  there = tasks_lib.task_names(config.nano_pool)
  return settings.split(config.nano_tasks) or there


def _named(names: str, seeds: int, num_tasks: int):
  """Yields a seed's number and the methods to run with it.

  Methods that draw nothing run with the first seed alone.
  """
  found = [merge_run.PLAIN, *methods.parse(names, num_tasks)]
  found = list(dict.fromkeys(found))
  yield 0, found
  again = [name for name in found if methods.is_random(name)]
  for i in range(1, seeds if again else 1):
    yield i, again


def _seeded(names: Sequence[str], seed: int) -> dict[str, Any]:
  """Returns the changes of a config that set the seed of all methods."""
  own = {
    f'options.{name}.seed': seed
    for name in names
    if 'seed' in methods.options(name)
  }
  return {'seed': seed, **own}


def _upload(folder: str, attack: str, task: str, number: int) -> str:
  """Returns a checkpoint's name, which may lack a number where it is 0."""
  bare = f'{attack}_{task}'
  path = pathlib.Path(folder) / 'checkpoints' / f'{bare}.safetensors'
  return bare if not number and path.exists() else f'{bare}_{number}'


def _crossed(
  config: config_dict.ConfigDict,
  section: str,
  attack_names: str,
  method_names: str,
  *,
  changes: Mapping[str, Any] | None = None,
  variant: str = '',
  name: str = '',
  x: float | None = None,
) -> Iterator[Cell]:
  """Yields attacks x attacked tasks x attack seeds x merge seeds.

  Args:
    config: see `KEYS`.
    section: of the study.
    attack_names: with commas.
    method_names: with commas.
    changes: of the merge's config.
    variant: what a method is called in the table.
    name: of that method.
    x: of the variant on an axis.
  """
  tasks = nano_tasks(config)
  slug = variant.replace(', ', '_').replace(' ', '_')
  for attack in settings.split(attack_names):
    for task in settings.split(config.attacked):
      for number in range(config.attack_seeds):
        for i, named in _named(method_names, config.merge_seeds, len(tasks)):
          seed = config.seed + i
          upload = _upload(config.nano_pool, attack, task, number)
          parts = [section, slug, attack, task, str(number), f's{seed}']
          yield Cell(
            section=section,
            name='-'.join(p for p in parts if p),
            group=attack,
            x=x,
            task=task,
            upload=number,
            seed=seed,
            methods=named,
            changes={
              'pool': config.nano_pool,
              'tasks': ','.join(tasks),
              'bad': upload,
              'methods': ','.join(named),
              **_seeded(named, seed),
              **(changes or {}),
            },
            rows={name: variant} if variant else {},
          )


def _bad_counts(config: config_dict.ConfigDict) -> Iterator[Cell]:
  bad, tasks = settings.split(config.bad), settings.split(config.tasks)
  for count in map(int, settings.split(config.bad_counts)):
    turns = config.bad_rotations if 0 < count < len(bad) else 1
    for turn in range(min(turns, len(bad))):
      chosen = [bad[(turn + i) % len(bad)] for i in range(count)]
      for cell in _real(config, tasks, chosen, bad if not count else []):
        yield dataclasses.replace(
          cell,
          name=f'number-bad-{count}-{turn}-s{cell.seed}',
          group=f'{count} bad of {len(tasks)}',
          x=count,
          upload=turn,
        )


def _task_counts(config: config_dict.ConfigDict) -> Iterator[Cell]:
  order = settings.split(config.task_order)
  for count in map(int, settings.split(config.task_counts)):
    for cell in _real(config, order[:count], [config.task_bad], []):
      yield dataclasses.replace(
        cell,
        name=f'number-tasks-{count}-s{cell.seed}',
        group=f'1 bad of {count} tasks',
        x=count,
      )


def _real(config, tasks, bad, probes) -> Iterator[Cell]:
  """Yields cells of the real pool, a merge seed each, still without a name."""
  given = config.number_methods, config.merge_seeds, len(tasks)
  for i, named in _named(*given):
    seed = config.seed + i
    yield Cell(
      section='number',
      name='',
      group='',
      seed=seed,
      methods=named,
      changes={
        'pool': config.pool,
        'tasks': ','.join(tasks),
        'bad': ','.join(bad) or '0',
        'triggers': ','.join(probes),
        'methods': ','.join(named),
        **_seeded(named, seed),
      },
    )


def merge_config(
  config: config_dict.ConfigDict, cell: Cell
) -> config_dict.ConfigDict:
  """Returns the config of a cell's run.

  Args:
    config: of the study.
    cell: one of it.
  """
  out = pool_config.get_config()
  out.options = config.options.copy_and_resolve_references()
  for key in ('steps', 'batch', 'dev', 'test', 'transfer_test'):
    out[key] = config[key]
  out.audit = config.audit and any(
    name.startswith('dam_robust') for name in cell.methods
  )
  out.update_from_flattened_dict(dict(cell.changes))
  return out


def _check_cells(config: config_dict.ConfigDict, cells: Sequence[Cell]) -> None:
  """Raises where a file that a cell needs is not there, or an option is."""
  named = list(dict.fromkeys(n for cell in cells for n in cell.methods))
  methods.resolve(named, config.options, steps=config.steps, batch=config.batch)
  load.check_config(merge_config(config, cells[0]))
  names = [cell.name for cell in cells]
  lines = [f'one cell {n} only' for n in names if names.count(n) > 1]
  merges = [
    (c['pool'], c['tasks'], c['bad'], c.get('triggers', ''))
    for c in (cell.changes for cell in cells)
  ]
  for pool, tasks, bad, probes in dict.fromkeys(merges):
    chosen = [] if bad == '0' else settings.split(bad)
    lines += _lacks(
      pathlib.Path(pool), settings.split(tasks), chosen, settings.split(probes)
    )
  if lines:
    raise ValueError('\n  '.join(['the study lacks', *dict.fromkeys(lines)]))


def _lacks(
  folder: pathlib.Path,
  tasks: Sequence[str],
  bad: Sequence[str],
  probes: Sequence[str],
) -> list[str]:
  """Returns a line for each file that a merge would miss."""
  checkpoints = folder / 'checkpoints'
  triggers = {
    name: folder / 'triggers' / f'{name}.npz' for name in (*bad, *probes)
  }
  wanted = [checkpoints / 'config.json', checkpoints / 'base.safetensors']
  wanted += [folder / 'tasks' / f'{task}.npz' for task in tasks]
  wanted += [checkpoints / f'clean_{task}.safetensors' for task in tasks]
  wanted += [checkpoints / f'{name}.safetensors' for name in bad]
  lines = [str(p) for p in (*wanted, *triggers.values()) if not p.exists()]
  if lines:
    return lines
  for name, path in triggers.items():
    found = attacks.load_trigger(path)
    homes = tasks_lib.find_upload(checkpoints, name, found, tasks)
    lines += [
      f'{task}, the task of {name}, among {", ".join(tasks)}'
      for task in dict.fromkeys([found.task, *homes])
      if task not in tasks
    ]
  return lines
