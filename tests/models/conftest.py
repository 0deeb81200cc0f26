"""Tiny CLIPs whose outputs transformers computed, and a tokenizer for them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import clip_problem as problem
from dam_jax import tree
from dam_jax.models import clip
from dam_jax.models import configs
from dam_jax.models import convert
from dam_jax.models import text
from dam_jax.models import tokens
from dam_jax.models import towers


class Golden(NamedTuple):
  """A CLIP of `benchmarks.clip_problem.GOLDEN`.

  Attributes:
    raw: what its config.json holds.
    config: sizes of both towers.
    params: as `clip_problem.leaf` draws them.
    draws: the same with another seed.
    given: pixels, tokens and what outputs are multiplied by.
    want: what transformers computed, by name.
  """

  raw: dict[str, Any]
  config: towers.CLIPConfig
  params: Any
  draws: Any
  given: dict[str, jax.Array]
  want: dict[str, np.ndarray]


def draw(like, name_map, seed=0):
  """Returns leaves as `clip_problem.leaf` draws them, by names in files."""

  def leaf(path, x):
    axes = name_map.axes(path) or range(x.ndim)
    shape = tuple(x.shape[i] for i in np.argsort(axes))
    array = problem.leaf(name_map.to_name(path), shape, seed)
    return jnp.asarray(array.transpose(axes))

  leaves = [leaf(path, x) for path, x in tree.flatten(like).items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


@pytest.fixture(scope='session')
def archive():
  """What transformers computed."""
  with np.load(Path(__file__).with_name('clip_golden.npz')) as arrays:
    return dict(arrays)


@pytest.fixture(scope='session')
def golden(archive):
  """Both CLIPs, by name."""

  def make(name):
    raw = {'model_type': 'clip', **problem.GOLDEN[name]}
    config = towers.CLIPConfig(
      vision=configs.tower(raw, clip.VisionConfig, where='a test'),
      text=configs.tower(raw, text.TextConfig, where='a test'),
    )
    like = towers.abstract_params(config)
    return Golden(
      raw,
      config,
      *(draw(like, convert.clip, seed) for seed in (0, 1)),
      jax.tree.map(jnp.asarray, problem.inputs(raw, 3)),
      {
        key.removeprefix(f'{name}/'): x
        for key, x in archive.items()
        if key.startswith(f'{name}/')
      },
    )

  return {name: make(name) for name in problem.GOLDEN}


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory) -> Path:
  """A folder with vocab.json and merges.txt."""
  folder = tmp_path_factory.mktemp('vocabulary')
  problem.write_tokenizer(folder)
  return folder


@pytest.fixture(scope='session')
def tokenizer(vocabulary) -> tokens.Tokenizer:
  return tokens.Tokenizer(vocabulary, length=16)
