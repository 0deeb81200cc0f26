"""A merge from files to files: what to do, what it will cost, doing it."""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from dam_jax import blocks
from dam_jax import catalogue
from dam_jax import checkpoint
from dam_jax import streaming
from dam_jax import tree
from dam_jax.distributed import Hosts

MERGE, KEEP = 'merge', 'keep'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to merge, and how; JSON values.

  Attributes:
    base: path of the model that all experts were fine-tuned from.
    experts: paths by name; models, or LoRA adapters of the base.
    method: its name in `dam_jax.catalogue`.
    options: of the method.
    rules: pairs of a regular expression and a label; a leaf gets the label of
      the first that matches its whole path, 'merge' if none does. 'keep' is the
      base's leaf bit for bit, an expert's name that expert's.
    labels: what else a label stands for: options that differ, and 'method'.
    vocabulary: pairs of a regular expression and a rule of
      `dam_jax.checkpoint.fit_rows`.
    dtype: of what is written; None keeps the base's.
    max_shard_bytes: of a file of weights.
    carry: folder whose config, tokenizer, processor and licence are copied;
      that of the base if it has a config.json, where None.
    workers: how many leaves are under way at a time.
  """

  base: str
  experts: Mapping[str, str]
  method: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rules: Sequence[tuple[str, str]] = ()
  labels: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  vocabulary: Sequence[tuple[str, str]] = ()
  dtype: str | None = None
  max_shard_bytes: float = 5e9
  carry: str | None = None
  workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A job whose every part was checked, and what it will cost.

  Attributes:
    job: what to do.
    base: the opened base.
    experts: the opened experts by name.
    txs: what each label stands for, as `streaming.merge_leaves` takes it.
    labels: of leaves by path.
    tied: leaves that are another's value.
    passes: how often each label's leaves are read.
    vocab_sizes: numbers of rows that changed, from the base's.
  """

  job: Job
  base: checkpoint.Model
  experts: Mapping[str, checkpoint.Model]
  txs: Mapping[str, Any]
  labels: Mapping[str, str]
  tied: Mapping[str, str]
  passes: Mapping[str, int]
  vocab_sizes: Mapping[int, int]

  @functools.cached_property
  def read_bytes(self) -> int:
    """Bytes that will be read, every pass counted."""
    models = (self.base, *self.experts.values())
    return sum(
      self.passes[self.labels[path]] * _bytes(model.leaves[path])
      for model in models
      for path in self.labels
    )

  @functools.cached_property
  def write_bytes(self) -> int:
    """Bytes that will be written."""
    return sum(_bytes(x, self.job.dtype) for x in self.base.leaves.values())

  @functools.cached_property
  def memory_bytes(self) -> int:
    """Bytes of leaves that are held at a time, an estimate from above.

    For each worker the largest leaf of the base and of each expert, or a block
    of small ones, its task vectors and as much again for what the method
    computes with them.
    """
    sizes = [math.prod(x.shape) for x in self.base.leaves.values()]
    largest = max(*sizes, min(blocks.SIZE, sum(sizes)))
    return self.job.workers * 4 * largest * (3 * len(self.experts) + 3)

  def record(
    self, hashes: Mapping[str, Mapping[str, str]], command: str | None
  ) -> checkpoint.MergeRecord:
    """Returns the record that is written beside the model."""
    return make_record(
      self.job, self.base, hashes, tied=self.tied, command=command
    )

  def describe(self) -> dict[str, Any]:
    """Returns the plan as JSON values."""
    counts = {
      label: sum(x == label for x in self.labels.values()) for label in self.txs
    }
    return {
      'method': self.job.method,
      'experts': len(self.experts),
      'leaves': len(self.base.leaves),
      'parameters': sum(math.prod(x.shape) for x in self.base.leaves.values()),
      'labels': counts,
      'tied': dict(self.tied),
      'passes': {n: p for n, p in self.passes.items() if counts[n]},
      'read_bytes': self.read_bytes,
      'write_bytes': self.write_bytes,
      'memory_bytes': self.memory_bytes,
      'dtype': self.job.dtype or 'as the base',
    }


def _bytes(struct: Any, dtype: str | None = None) -> int:
  floating = jnp.issubdtype(struct.dtype, jnp.floating)
  kind = jnp.dtype(dtype) if dtype and floating else struct.dtype
  return math.prod(struct.shape) * kind.itemsize


def prepare(job: Job) -> Plan:
  """Checks every part of a job; reads no weight but to find tied leaves.

  Args:
    job: what to do.

  Returns:
    The plan.

  Raises:
    ValueError: where a file cannot be read, models do not fit each other, or
      the method, an option or a rule makes no sense.
  """
  base = checkpoint.open_model(job.base)
  experts = {
    name: _open_expert(path, base) for name, path in job.experts.items()
  }
  vocabulary = _match('vocabulary', job.vocabulary, base)
  rows = {path: base.leaves[path].shape[0] for path in vocabulary}
  base, experts = checkpoint.fit_rows(base, experts, vocabulary)
  streaming.check(base, experts)
  matched = _match('rules', job.rules, base)
  kept = {path: KEEP for path, rule in vocabulary.items() if rule == KEEP}
  labels = {**dict.fromkeys(base.leaves, MERGE), **matched, **kept}
  txs = _transformations(job, labels, base)
  tied = streaming.tied(base, list(experts.values()))
  _raise_if(
    [
      f'{path} ({labels[path]}) and {source} ({labels[source]})'
      for path, source in tied.items()
      if labels[path] != labels[source]
    ],
    'tied leaves have different rules:',
  )
  passes = {
    label: 1
    if tx is None or isinstance(tx, str)
    else streaming.passes(tx, len(experts))
    for label, tx in txs.items()
  }
  return Plan(
    job=job,
    base=base,
    experts=experts,
    txs=txs,
    labels=labels,
    tied=tied,
    passes=passes,
    vocab_sizes={n: base.leaves[path].shape[0] for path, n in rows.items()},
  )


def _raise_if(lines: Sequence[str], head: str) -> None:
  if lines:
    raise ValueError('\n  '.join([head, *lines]))


def _open_expert(path: str, base: checkpoint.Model) -> checkpoint.Model:
  if (pathlib.Path(path) / 'adapter_config.json').exists():
    return checkpoint.expand(base, checkpoint.open_lora(path))
  return checkpoint.open_model(path)


def _match(
  kind: str, rules: Sequence[tuple[str, str]], base: checkpoint.Model
) -> dict[str, str]:
  """Returns the label of each path that a rule matches."""
  try:
    found = tree.label_by_path(dict(base.leaves), rules, default='')
  except (re.error, ValueError) as e:
    raise ValueError(f'{kind}: {e}') from e
  return {path: label for path, label in found.items() if label}


def _layout(method: str, base: checkpoint.Model) -> dict[str, int]:
  """Returns the options that say where a weight's outputs are.

  The library's defaults are those of Flax kernels `[in, out]`; a matrix that is
  called weight is torch's `[out, in]`.
  """
  torch = any(
    path.rpartition('/')[2] == 'weight' and len(x.shape) == 2
    for path, x in base.leaves.items()
  )
  flax_to_torch = {'input_axis': (0, 1), 'unit_axis': (-1, 0)}
  options = catalogue.DATA_FREE[method].options
  return {
    key: there
    for key, (here, there) in flax_to_torch.items()
    if torch and key in options and options[key].default == here
  }


def _settled(
  method: str, given: Mapping[str, Any], base: checkpoint.Model
) -> dict[str, Any]:
  """Returns the options of a method, those of its leaves' layout too."""
  known = method in catalogue.DATA_FREE
  return {**(_layout(method, base) if known else {}), **given}


def _transformations(
  job: Job, labels: Mapping[str, str], base: checkpoint.Model
) -> dict[str, Any]:
  """Returns what each label in use stands for."""
  used = {MERGE, *labels.values()}
  lines = [
    f'{n}: an expert cannot be called this'
    for n in {MERGE, KEEP}
    if n in job.experts
  ]
  lines += [
    f'{n}: both an expert and a label of its own'
    for n in job.labels
    if n in job.experts
  ]
  lines += [
    f'{n}: no rule gives this label' for n in job.labels if n not in used
  ]
  lines += [
    f'{n}: neither {KEEP!r} nor an expert, and nothing is set for it'
    for n in used - {MERGE, KEEP, *job.experts, *job.labels}
  ]
  _raise_if(sorted(lines), 'labels:')
  txs: dict[str, Any] = {}
  for label in sorted(used):
    if label == KEEP:
      txs[label] = None
    elif label in job.experts:
      txs[label] = label
    else:
      own = dict(job.labels.get(label, {}))
      method = own.pop('method', job.method)
      shared = job.options if method == job.method else {}
      options = _settled(method, {**shared, **own}, base)
      txs[label] = _build(method, options, len(job.experts))
  return txs


def _build(method: str, options: Mapping[str, Any], num: int):
  tx = catalogue.build(method, options)
  catalogue.DATA_FREE[method].check_number(method, num)
  return tx


def run(
  plan: Plan,
  out: str,
  *,
  orbax: bool = False,
  overwrite: bool = False,
  command: str | None = None,
  on_leaf: Callable[[str, int], None] | None = None,
  on_resume: Callable[[int], None] | None = None,
  hosts: Hosts | None = None,
) -> checkpoint.MergeRecord:
  """Does what was planned; an interrupted run goes on where it was.

  Args:
    plan: from `prepare`.
    out: path of a folder, or of a file that ends in .safetensors.
    orbax: write an Orbax checkpoint in place of safetensors.
    overwrite: whether to replace what is at `out`.
    command: that the record is to name.
    on_leaf: called with a leaf's path and the bytes read for it.
    on_resume: called with the number of leaves that an interrupted run has
      written, where there was one.
    hosts: processes that call this with the same plan, on a disk that all
      share: each hashes some models, and reads and writes its own leaves.

  Returns:
    The record that is written beside the model.

  Raises:
    ValueError: where `out` cannot be written, weights are not finite, or the
      dtype cannot hold them.
  """
  target = pathlib.Path(out)
  first = hosts is None or hosts.index == 0
  if orbax and target.exists() and not overwrite:
    raise ValueError(f'{out} exists: it is not replaced')
  path = target.with_name(f'.{target.name}.safetensors') if orbax else target
  lone = path.suffix == '.safetensors'
  with concurrent.futures.ThreadPoolExecutor(1) as hasher:
    own_hashes = hasher.submit(_hashes, plan, hosts)

    @functools.cache
    def hashes():
      return _of_all(own_hashes.result(), hosts)

    writer = checkpoint.ModelWriter(
      path,
      plan.base.leaves,
      dtype=plan.job.dtype,
      max_shard_bytes=plan.job.max_shard_bytes,
      # A lone file holds its record, whose size must be known beforehand.
      metadata=plan.record(hashes(), command).metadata() if lone else None,
      carry=_carried(plan, lone),
      vocab_sizes=plan.vocab_sizes,
      plan=identity(plan),
      alias=plan.tied,
      overwrite=overwrite or orbax,
      hosts=hosts,
    )
    with writer:
      if on_resume is not None and writer.done:
        on_resume(len(writer.done))
      streaming.merge_leaves(
        plan.txs,
        plan.base,
        plan.experts,
        writer.put,
        labels=plan.labels,
        skip={*writer.done, *plan.tied},
        workers=plan.job.workers,
        on_leaf=on_leaf,
        hosts=hosts,
      )
      record = plan.record(hashes(), command)
      if not lone:
        writer.add_file('merge_record.json', record.to_json())
        writer.add_file('README.md', checkpoint.model_card(record))
  if orbax:
    model = checkpoint.open_model(path)
    checkpoint.save_orbax(target, model, overwrite=overwrite)
    if first:
      path.unlink()
  if lone and first:
    card = checkpoint.model_card(record)
    checkpoint.write(target.with_suffix('.md'), card)
  return record


def _carried(plan: Plan, lone: bool) -> pathlib.Path | None:
  """Returns the folder whose files go with the merged model's."""
  if plan.job.carry is not None:
    return pathlib.Path(plan.job.carry)
  folder = plan.base.folder
  if lone or folder is None or not (folder / 'config.json').exists():
    return None
  return folder


def _inputs(plan: Plan) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each model by its name."""
  return {
    'base': list(plan.base.files),
    **{name: list(m.files) for name, m in plan.experts.items()},
  }


def identity(plan: Plan) -> dict[str, Any]:
  """Returns what runs must share that do one merge together, or go on.

  Args:
    plan: from `prepare`.
  """
  job = dataclasses.asdict(dataclasses.replace(plan.job, workers=1))
  states = {
    name: [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    for name, files in _inputs(plan).items()
  }
  return {'job': job, 'files': states, 'versions': checkpoint.versions()}


def _hashes(plan: Plan, hosts: Hosts | None) -> dict[str, dict[str, str]]:
  """Returns the SHA-256 of every file, by model and file name.

  Of several hosts each looks at some of the models.
  """
  index, count = (0, 1) if hosts is None else (hosts.index, hosts.count)
  models = {'base': plan.base, **plan.experts}
  return {
    name: checkpoint.model_hashes(model)
    for i, (name, model) in enumerate(models.items())
    if i % count == index
  }


def _of_all(
  own: Mapping[str, dict[str, str]], hosts: Hosts | None
) -> dict[str, dict[str, str]]:
  """Puts together the hashes that each host has computed."""
  if hosts is None:
    return dict(own)
  sent = hosts.exchange(json.dumps(own).encode())
  return {name: x for each in sent for name, x in json.loads(each).items()}


def _name(path: str) -> str:
  """Returns what a model is called after its file or folder."""
  found = pathlib.Path(os.path.abspath(path))
  return found.stem if found.suffix == '.safetensors' else found.name


def make_record(
  job: Job,
  base: checkpoint.Model,
  hashes: Mapping[str, Mapping[str, str]],
  *,
  tied: Mapping[str, str] | None = None,
  command: str | None = None,
) -> checkpoint.MergeRecord:
  """Returns the record of a job.

  Args:
    job: that was done.
    base: its opened base.
    hashes: SHA-256 of each file by its name, of the base and each expert.
    tied: leaves that are another's value.
    command: that did it.
  """
  combined = {n: checkpoint.combined_hash(found) for n, found in hashes.items()}
  methods = {
    job.method,
    *(x.get('method', job.method) for x in job.labels.values()),
  }
  cited = [catalogue.DATA_FREE[name].reference for name in sorted(methods)]
  named = {label: dict(found) for label, found in job.labels.items()}
  return checkpoint.MergeRecord(
    method=job.method,
    hyperparameters={
      key: None if p.default is p.empty else p.default
      for key, p in catalogue.DATA_FREE[job.method].options.items()
    }
    | _settled(job.method, job.options, base),
    seed=int(job.options.get('seed', 0)),
    base={_name(job.base): combined.pop('base')},
    experts=combined,
    references=[f'[{title}]({url})' for title, url in cited],
    rules=[
      *([pattern, json.dumps(named.get(x, x))] for pattern, x in job.rules),
      *([pattern, f'vocabulary: {x}'] for pattern, x in job.vocabulary),
    ],
    files=hashes,
    dtype=job.dtype,
    command=command,
    license=checkpoint.read_license(base.folder) if base.folder else {},
    extra={
      'tied': dict(tied or {}),
      'paths': {'base': job.base, **job.experts},
    },
  )
