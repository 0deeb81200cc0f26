"""`dam-jax merge` and `dam-jax check`."""

import argparse
import ast
import json
import pathlib
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import DownloadColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
from rich.table import Table

from dam_jax import checkpoint
from dam_jax import distributed
from dam_jax.cli import adapters
from dam_jax.cli import command
from dam_jax.cli import job as jobs


def _add_job(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add('--base', metavar='PATH', help='model that all experts come from')
  add(
    '--expert',
    action='append',
    default=[],
    metavar='[NAME=]PATH',
    help='a fine-tuned model, or a LoRA adapter of the base; repeat it',
  )
  add('--method', metavar='NAME', help='one of those that `methods` lists')
  add(
    '--set',
    action='append',
    default=[],
    metavar='[LABEL.]KEY=VALUE',
    help='an option of the method, or of the leaves with that label',
  )
  add(
    '--rule',
    action='append',
    default=[],
    metavar='REGEX=LABEL',
    help='label of leaves whose whole path matches, the first rule wins: keep '
    '(the base, bit for bit), the name of an expert, or one of your own',
  )
  add(
    '--vocab',
    action='append',
    default=[],
    metavar='REGEX=RULE',
    help='what to do where rows differ in number: keep, pad or intersect',
  )
  add('--dtype', choices=('float32', 'bfloat16', 'float16'), help='to write')
  add('--shard-gb', type=float, default=None, help='of a file, 5 by default')
  add(
    '--carry',
    metavar='FOLDER',
    help="to copy config, tokenizer and licence from; the base's if not given",
  )
  add('--workers', type=int, default=None, help='leaves at a time, 2')
  add('--config', metavar='FILE', help='JSON with any of these, overridden')


def _add_merge(parser: argparse.ArgumentParser) -> None:
  _add_job(parser)
  parser.add_argument(
    '--out', required=True, metavar='PATH', help='folder, or x.safetensors'
  )
  parser.add_argument('--format', choices=('safetensors', 'orbax'))
  parser.add_argument('--overwrite', action='store_true')
  parser.add_argument(
    '--adapter',
    action='store_true',
    help='of LoRA adapters, write one, not a model',
  )
  parser.add_argument(
    '--rank', type=int, help='of that adapter; the sum of ranks if not given'
  )
  hosts = parser.add_argument_group(
    'several hosts', 'that share a disk, each started with the same arguments'
  )
  hosts.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help="of process 0; 'auto' finds all three by itself, on Cloud TPU, SLURM, "
    'Kubernetes and Open MPI',
  )
  hosts.add_argument('--num-processes', type=int, metavar='N')
  hosts.add_argument('--process-id', type=int, metavar='I', help='from 0')


def _pair(flag: str, text: str) -> tuple[str, str]:
  left, equals, right = text.rpartition('=')
  if not (left and equals and right):
    raise ValueError(f'{flag} {text!r}: want two parts with = between')
  return left, right


def _value(text: str) -> Any:
  """Returns a Python literal, or the text itself."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return {'true': True, 'false': False, 'none': None}.get(text.lower(), text)


def _experts(given: list[str]) -> dict[str, str]:
  found: dict[str, str] = {}
  for text in given:
    name, equals, path = text.partition('=')
    if not equals:
      name, path = pathlib.Path(text).stem, text
    if name in found or not path:
      raise ValueError(f'--expert {text!r}: names must differ, paths be given')
    found[name] = path
  return found


def _job(args: argparse.Namespace) -> jobs.Job:
  """Makes a job of the command's arguments."""
  fields: dict[str, Any] = {}
  if args.config:
    try:
      fields = json.loads(pathlib.Path(args.config).read_text())
    except (OSError, json.JSONDecodeError) as e:
      raise ValueError(f'--config {args.config}: {e}') from e
    known = set(jobs.Job.__dataclass_fields__)
    if not isinstance(fields, dict) or set(fields) - known:
      raise ValueError(
        f'--config {args.config}: want an object with keys of {sorted(known)}'
      )
  rules = [_pair('--rule', text) for text in args.rule]
  fields['rules'] = [*rules, *map(tuple, fields.get('rules', ()))]
  vocabulary = [_pair('--vocab', text) for text in args.vocab]
  fields['vocabulary'] = [
    *vocabulary,
    *map(tuple, fields.get('vocabulary', ())),
  ]
  options = dict(fields.get('options', {}))
  labels = {k: dict(x) for k, x in fields.get('labels', {}).items()}
  own = {label for _, label in fields['rules']}
  for text in args.set:
    key, equals, value = text.partition('=')
    if not equals:
      raise ValueError(f'--set {text!r}: want KEY=VALUE')
    label, dot, rest = key.partition('.')
    if dot and label in own:
      labels.setdefault(label, {})[rest] = _value(value)
    else:
      options[key] = _value(value)
  fields |= {'options': options, 'labels': labels}
  fields['experts'] = {**fields.get('experts', {}), **_experts(args.expert)}
  given = {
    'base': args.base,
    'method': args.method,
    'dtype': args.dtype,
    'carry': args.carry,
    'workers': args.workers,
    'max_shard_bytes': args.shard_gb and args.shard_gb * 1e9,
  }
  fields |= {key: x for key, x in given.items() if x is not None}
  needed = {'base': 'base', 'method': 'method', 'experts': 'expert'}
  missing = [f'--{flag}' for key, flag in needed.items() if not fields.get(key)]
  if missing:
    raise ValueError(f'missing: {", ".join(missing)}')
  return jobs.Job(**fields)


def _show(plan: jobs.Plan, console: Console) -> None:
  """Prints what a merge will do."""
  found = plan.describe()
  table = Table(show_header=False, box=None, pad_edge=False)
  table.add_row('method', f'{found["method"]} of {found["experts"]} experts')
  counts = ', '.join(f'{k} {n}' for k, n in found['labels'].items())
  table.add_row(
    'leaves', f'{found["leaves"]} ({counts}), {found["parameters"]:,} numbers'
  )
  if found['tied']:
    pairs = ', '.join(f'{p} = {s}' for p, s in found['tied'].items())
    table.add_row('tied', pairs)
  passes = ', '.join(f'{k} {n}' for k, n in found['passes'].items())
  table.add_row(
    'to read', f'{command.size(found["read_bytes"])}, passes: {passes}'
  )
  table.add_row(
    'to write', f'{command.size(found["write_bytes"])}, {found["dtype"]}'
  )
  table.add_row(
    'peak memory', f'{command.size(found["memory_bytes"])} of leaves at most'
  )
  console.print(table)


def _run_check(args: argparse.Namespace) -> int:
  plan = jobs.prepare(_job(args))
  if args.json:
    command.emit(plan.describe())
  else:
    _show(plan, Console())
  return 0


def _run_adapter(job: jobs.Job, args: argparse.Namespace) -> int:
  if args.overwrite or args.format == 'orbax':
    raise ValueError('an adapter is a new folder of safetensors')
  merged = adapters.merge(job, args.rank)
  first = checkpoint.open_lora(next(iter(job.experts.values())))
  checkpoint.save_lora(args.out, merged, like=first)
  record = adapters.record(job, args.command)
  card = checkpoint.model_card(record, library_name='peft')
  for name, text in (
    ('merge_record.json', record.to_json()),
    ('README.md', card),
  ):
    checkpoint.write(pathlib.Path(args.out) / name, text)
  ranks = {path: f.rank for path, f in merged.factors.items()}
  if args.json:
    command.emit({'out': args.out, 'ranks': ranks})
  else:
    Console(stderr=True, soft_wrap=True).print(
      f'{args.out}: an adapter of {len(ranks)} leaves and rank '
      f'{max(ranks.values())}'
    )
  return 0


def _run_merge(args: argparse.Namespace) -> int:
  job = _job(args)
  if args.adapter:
    return _run_adapter(job, args)
  if args.rank is not None:
    raise ValueError('--rank is the rank of an adapter: pass --adapter')
  joined = distributed.initialize(
    args.coordinator, args.num_processes, args.process_id
  )
  plan = jobs.prepare(job)
  distributed.check_agreement({'plan': jobs.identity(plan), 'out': args.out})
  first = distributed.is_first()
  console = Console(stderr=True, quiet=not first)
  _show(plan, console)
  begin = time.perf_counter()
  with Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    DownloadColumn(),
    TimeRemainingColumn(),
    console=console,
  ) as progress:
    task = progress.add_task(plan.job.method, total=plan.read_bytes)
    record = jobs.run(
      plan,
      args.out,
      orbax=args.format == 'orbax',
      overwrite=args.overwrite,
      command=args.command,
      on_leaf=lambda path, size: progress.advance(task, size),
      on_resume=lambda done: console.print(
        f'goes on: an interrupted run wrote {done} leaves'
      ),
      hosts=distributed.Hosts() if joined else None,
    )
  seconds = time.perf_counter() - begin
  if args.json and first:
    found = {
      'out': args.out,
      'seconds': seconds,
      'plan': plan.describe(),
      'record': json.loads(record.to_json()),
    }
    command.emit(found)
  else:
    console.print(f'{args.out}: written in {seconds:.1f} s', soft_wrap=True)
  return 0


MERGE = command.Command(
  'merge',
  'Merges models, leaf by leaf, into a new one.',
  _add_merge,
  _run_merge,
)
CHECK = command.Command(
  'check',
  'Validates a merge before any heavy work and prints its plan.',
  _add_job,
  _run_check,
)
