"""Operations and bytes of a step of a learned merge, counted by hand.

A lower bound of what an implementation must do. Operations are those of matrix
products, a multiplication and an addition each; of the last block only what
the class token needs. Bytes: each product reads its operands and writes its
result once, attention is one kernel; and each pass over parameters reads and
writes every model, mask and moment of Adam once.
"""

from typing import Any, NamedTuple

from benchmarks import step_problem as problem


class Phase(NamedTuple):
  """What a part of a step does.

  Attributes:
    forward: forward passes over one draw of images of all tasks.
    inputs: forward passes with the gradient of the images.
    weights: forward passes with the gradient of the parameters.
    merges: how often the merged model is made.
    pulls: how often its gradient becomes that of coefficients or masks.
    adam: how many models' size of logits Adam moves.
  """

  forward: int = 0
  inputs: int = 0
  weights: int = 0
  merges: int = 0
  pulls: int = 0
  adam: int = 0


class _Image(NamedTuple):
  """Forward operations and entries of one image, by kind of product."""

  embed: tuple[int, int]
  dense: tuple[int, int]
  head: tuple[int, int]
  attention: tuple[int, int]


def _product(rows: int, inputs: int, outputs: int) -> tuple[int, int]:
  return 2 * rows * inputs * outputs, rows * (inputs + outputs)


def _added(*parts: tuple[int, int]) -> tuple[int, int]:
  return sum(x for x, _ in parts), sum(x for _, x in parts)


def _image(model: str) -> _Image:
  sizes, tokens = problem.SIZES[model], problem.tokens(model)
  width, hidden = sizes['hidden_size'], sizes['intermediate_size']
  dense, attention = [], []
  for i in range(sizes['num_hidden_layers']):
    queries = 1 if i == sizes['num_hidden_layers'] - 1 else tokens
    dense += [_product(tokens, width, width)] * 2
    dense += [_product(queries, width, width)] * 2
    dense += [
      _product(queries, width, hidden),
      _product(queries, hidden, width),
    ]
    attention.append(
      (4 * queries * tokens * width, 2 * (queries + tokens) * width)
    )
  features = sizes['projection_dim']
  dense.append(_product(1, width, features))
  return _Image(
    embed=_product(tokens - 1, 3 * sizes['patch_size'] ** 2, width),
    dense=_added(*dense),
    head=_product(1, features, problem.CLASSES),
    attention=_added(*attention),
  )


def _times(factor: int, part: tuple[int, int]) -> tuple[int, int]:
  return factor * part[0], factor * part[1]


def passes(model: str, phase: Phase) -> tuple[int, int]:
  """Returns operations and entries moved for one image in each draw."""
  x = _image(model)
  forward = _added(*x)
  through = _added(x.head, _times(2, x.attention))
  inputs = _added(forward, through, x.dense, x.embed)
  # No gradient of the images is wanted there, nor one of the frozen heads.
  weights = _added(forward, through, _times(2, x.dense), x.embed)
  return _added(
    _times(phase.forward, forward),
    _times(phase.inputs, inputs),
    _times(phase.weights, weights),
  )


def models(phase: Phase, num: int, masks: int) -> int:
  """Returns how many models of parameters a phase reads and writes.

  Args:
    phase: what it does.
    num: of experts.
    masks: models' size of logits that a merge reads.
  """
  read = num + 1 + masks
  return (
    phase.merges * (read + 1)
    + phase.forward
    + 2 * phase.inputs
    + 3 * phase.weights
    + phase.pulls * (read + 1)
    + phase.adam * 5
  )


def count(
  model: str, phase: Phase, *, num: int, batch: int, masks: int, itemsize: int
) -> dict[str, Any]:
  """Counts a phase.

  Args:
    model: of the tower.
    phase: what it does.
    num: of experts and tasks.
    batch: images a task and draw.
    masks: models' size of logits.
    itemsize: bytes of an activation; parameters and their state have four.

  Returns:
    'flops' and 'bytes'.
  """
  flops, entries = passes(model, phase)
  moved = 4 * models(phase, num, masks) * problem.total(model)
  return {
    'flops': num * batch * flops,
    'bytes': num * batch * entries * itemsize + moved,
  }
