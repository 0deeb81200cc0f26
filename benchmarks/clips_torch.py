"""CLIPs by transformers: makes and opens them, and computes with them.

  python -m benchmarks.clips_torch JOB

`JOB` is a file of JSON with `folder`, in which all else is: `inputs`, a
safetensors file; `model`, a folder to open; `config`, to make it first; `out`,
the file to write. Imports no JAX, so that its environment need not have it.
"""

import json
from pathlib import Path
import sys
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import transformers

from benchmarks import clip_problem as problem


def make(config: dict[str, Any], folder: Path) -> None:
  """Writes a random CLIP as transformers initialises it, but vectors moved.

  Biases of zero and scales of one would hide where they are left out.
  """
  torch.manual_seed(0)
  model = transformers.CLIPModel(transformers.CLIPConfig(**config))
  with torch.no_grad():
    for x in model.parameters():
      if x.ndim == 1:
        x += 0.05 * torch.randn_like(x)
  model.save_pretrained(folder)


def load(folder: Path) -> torch.nn.Module:
  """Opens a CLIP or an image tower, in float32."""
  config = transformers.AutoConfig.from_pretrained(folder)
  kinds = {
    'clip': transformers.CLIPModel,
    'clip_vision_model': transformers.CLIPVisionModelWithProjection,
  }
  kind = kinds[config.model_type]
  model = kind.from_pretrained(folder, dtype=torch.float32)
  return model.eval()


def features(
  model: torch.nn.Module, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
  """Returns what a CLIP or an image tower computes, as float32."""
  dtype = next(model.parameters()).dtype
  pixels = given['pixels'].permute(0, 3, 1, 2).to(dtype)
  if 'tokens' not in given:
    return {'images': model(pixel_values=pixels).image_embeds.float()}
  tokens = given['tokens'].long()
  out = model(input_ids=tokens, pixel_values=pixels)
  vision = model.vision_model(pixel_values=pixels)
  text = model.text_model(input_ids=tokens)
  return {
    'images': model.visual_projection(vision.pooler_output).float(),
    'texts': model.text_projection(text.pooler_output).float(),
    'logits': out.logits_per_image.float(),
  }


def loss(
  found: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
) -> torch.Tensor:
  """Returns a number that depends on all that was computed."""
  return sum((x * given[f'by/{name}']).mean() for name, x in found.items())


def run(job: dict[str, Any]) -> None:
  """Does what a job says."""
  folder = Path(job['folder'])
  if 'config' in job:
    make(job['config'], folder / job['model'])
  given = load_file(folder / job['inputs'])
  model = load(folder / job['model'])
  found = features(model, given)
  out = {name: x.detach() for name, x in found.items()}
  if job.get('more', True):
    loss(found, given).backward()
    # Copies: what is cast below are the gradients, too.
    out |= {f'grad/{n}': x.grad.clone() for n, x in model.named_parameters()}
    with torch.no_grad():
      half = features(model.to(torch.bfloat16), given)
    out |= {f'bfloat16/{name}': x for name, x in half.items()}
  save_file({k: x.contiguous() for k, x in out.items()}, folder / job['out'])
  versions = {x.__name__: x.__version__ for x in (torch, transformers)}
  (folder / 'versions.json').write_text(json.dumps(versions))


def tokens(job: dict[str, Any]) -> None:
  """Writes what `CLIPTokenizer` makes of texts, from files of both kinds."""
  folder = Path(job['folder'])
  tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
  tokenizer.save_pretrained(folder / 'saved')
  found = tokenizer(
    list(problem.TEXTS), padding='max_length', truncation=True, max_length=77
  )
  (folder / 'tokens.json').write_text(json.dumps(found['input_ids']))


def main(argv: list[str]) -> None:
  """Reads the job."""
  job = json.loads(Path(argv[0]).read_text())
  (tokens if job.get('tokens') else run)(job)


if __name__ == '__main__':
  main(sys.argv[1:])
