"""Makes a tiny CLIP and prepared data sets on the spot, without a network.

What `experiments.prepare` reads in place of the Hub's CLIP and published sets
is then of the same form: a folder with config, tokenizer and safetensors of
both towers, and array_record files. The text tower is untrained, its tokenizer
knows single characters; the image tower is pretrained to meet what the text
tower makes of class names, on a part of the built-in images that later sets
lack.
"""

from collections.abc import Sequence
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dam_jax import checkpoint
from dam_jax.data import builders
from dam_jax.data import builtin
from dam_jax.data import sets
from dam_jax.models import clip
from dam_jax.models import hub
from dam_jax.models import text
from dam_jax.models import towers
from dam_jax.models import zero_shot
from experiments import training

SCALE = 100.0
"""Of the cosines, as OpenAI's CLIPs have it."""


def make(
  folder: pathlib.Path,
  names: Sequence[str],
  *,
  console: Console,
  width: int = 64,
  layers: int = 2,
  patch_size: int = 7,
  steps: int = 220,
  learning_rate: float = 2e-3,
  batch: int = 32,
  seed: int = 0,
) -> None:
  """Makes the folder's `clip` and the sets `arrays/<name>` in its `data`.

  Both are taken as they are where they are there.

  Args:
    folder: to write to.
    names: of `dam_jax.data.builtin.NAMES`.
    console: to say on what is being done.
    width: of both towers; MLPs are three times as wide.
    layers: blocks of each tower.
    patch_size: of the image tower, in pixels.
    steps: of its pretraining, on all sets at once.
    learning_rate: at its peak.
    batch: images a set and step.
    seed: of everything random.

  Raises:
    ValueError: where a name is unknown or a size makes no sense.
  """
  sources = {name: builtin.load(name, seed=seed) for name in names}
  for name, source in sources.items():
    _prepare(folder, name, source)
  if (folder / 'clip').exists():
    return
  config = _config(width, layers, patch_size)
  init_key, key = jax.random.split(jax.random.key(seed))
  pixels = jnp.zeros((1, *config.vision.image_shape))
  tokens = jnp.zeros((1, config.text.max_position_embeddings), jnp.int32)
  init = jax.jit(towers.CLIP(config).init)
  params = dict(init(init_key, pixels, tokens)['params'])
  params['logit_scale'] = np.float32(np.log(SCALE))
  with tempfile.TemporaryDirectory() as files:
    _write_files(pathlib.Path(files), config)
    model = hub.Pretrained(
      config=config,
      params=params,
      files=hub.Snapshot(pathlib.Path(files)),
    )
    heads = [
      zero_shot.zero_shot_head(
        text.TextTower(config.text),
        params['text'],
        tokenizer=model.tokenizer(),
        names=source.task.label_names,
        templates=sets.get(f'{sets.ARRAYS}/{name}').templates,
      )
      for name, source in sources.items()
    ]
    with console.status('pretraining a tiny CLIP'):
      params['vision'] = training.pretrain(
        training.Shop(
          clip.VisionTower(config.vision), clip.stack_heads(heads, scale=SCALE)
        ),
        key,
        [source.pretrain for source in sources.values()],
        batch=batch,
        steps=steps,
        learning_rate=learning_rate,
      )
    hub.save(folder / 'clip', model)


def _prepare(folder: pathlib.Path, name: str, source: builtin.Source) -> None:
  """Writes a built-in task's images as a prepared set, by way of an npz file.

  Its dev images are among those to train on: preparing holds some out.
  """
  file = folder / f'{name}.npz'
  if not file.exists():
    splits = {
      'train': (source.train, source.task.dev),
      'test': (source.task.test,),
    }
    arrays: dict[str, Any] = {
      f'{split}_{field}': np.concatenate([getattr(x, field) for x in parts])
      for split, parts in splits.items()
      for field in ('images', 'labels')
    }
    arrays['label_names'] = np.array(source.task.label_names)
    with checkpoint.replacing(file) as temporary, temporary.open('wb') as out:
      np.savez_compressed(out, **arrays)
  builders.prepare_npz(file, folder / 'data')


def _config(width: int, layers: int, patch_size: int) -> towers.CLIPConfig:
  sizes = {
    'hidden_size': width,
    'intermediate_size': 3 * width,
    'num_hidden_layers': layers,
    'num_attention_heads': 4,
    'projection_dim': width,
  }
  return towers.CLIPConfig(
    vision=clip.VisionConfig(
      **sizes, image_size=builtin.SIZE, patch_size=patch_size
    ),
    text=text.TextConfig(
      **sizes,
      vocab_size=len(_words()),
      max_position_embeddings=77,
      eos_token_id=len(_words()) - 1,
    ),
  )


def _words() -> list[str]:
  letters = [chr(i) for i in range(ord('!'), ord('~') + 1)]
  ends = [f'{x}</w>' for x in letters]
  return [*letters, *ends, '<|startoftext|>', '<|endoftext|>']


def _write_files(folder: pathlib.Path, config: towers.CLIPConfig) -> None:
  """Writes config and tokenizer as they lie beside a CLIP's weights."""
  numbers = {word: i for i, word in enumerate(_words())}
  for name, content in (
    ('config.json', json.dumps(config.to_json(), indent=2, sort_keys=True)),
    ('vocab.json', json.dumps(numbers)),
    ('merges.txt', '#version: 0.2\n'),
  ):
    (folder / name).write_text(content)
