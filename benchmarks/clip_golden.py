"""Writes tests/models/clip_golden.npz: what transformers computes.

  python -m benchmarks.clip_golden tests/models/clip_golden.npz

Run it where torch and transformers are. Weights are drawn by
`clip_problem.leaf`, so that the file has only features, logits, each gradient's
product with another such draw, and numbers of tokens.
"""

from pathlib import Path
import sys
import tempfile

import numpy as np
import torch
import transformers

from benchmarks import clip_problem as problem
from benchmarks import clips_torch

NUM = 3


def compute(name: str) -> dict[str, np.ndarray]:
  """Returns what a CLIP of `clip_problem.GOLDEN` computes."""
  config = problem.GOLDEN[name]
  model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
  with torch.no_grad():
    for key, x in model.named_parameters():
      x.copy_(torch.from_numpy(problem.leaf(key, tuple(x.shape), 0)))
  given = problem.inputs(config, NUM)
  given = {key: torch.from_numpy(x) for key, x in given.items()}
  found = clips_torch.features(model, given)
  clips_torch.loss(found, given).backward()
  out = {key: x.detach().numpy() for key, x in found.items()}
  gradients = []
  for key, x in sorted(model.named_parameters()):
    draw = problem.leaf(key, tuple(x.shape), 1).astype(np.float64)
    gradients.append(np.sum(draw * x.grad.double().numpy()))
  out['gradients'] = np.array(gradients)  # in the order of their names
  return {f'{name}/{key}': x for key, x in out.items()}


def tokens() -> np.ndarray:
  """Returns what `CLIPTokenizer` makes of the texts."""
  with tempfile.TemporaryDirectory() as folder:
    problem.write_tokenizer(Path(folder))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    found = tokenizer(
      list(problem.TEXTS), padding='max_length', truncation=True, max_length=77
    )
  return np.array(found['input_ids'], np.int16)


def main(argv: list[str]) -> None:
  """Writes the file."""
  arrays = {'tokens': tokens()}
  for name in problem.GOLDEN:
    arrays |= compute(name)
  peers = (torch, transformers)
  versions = ', '.join(f'{x.__name__} {x.__version__}' for x in peers)
  np.savez_compressed(argv[0], versions=versions, **arrays)


if __name__ == '__main__':
  main(sys.argv[1:])
