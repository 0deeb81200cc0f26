"""Whole CLIPs from the Hugging Face Hub or a folder, and back.

Weights are safetensors or an Orbax checkpoint; pickles are refused.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from dam_jax import checkpoint
from dam_jax import tree
from dam_jax.models import convert
from dam_jax.models import tokens
from dam_jax.models import towers
from dam_jax.typing import Params

# Of other libraries a repository may hold the same weights once more.
_WEIGHTS = 'model*.safetensors'
_FILES = ('*.json', '*.txt', _WEIGHTS, 'LICENSE*', 'README.md')
_COMMIT = re.compile(r'[0-9a-f]{40}')
# Seconds after which the Hub counts as out of reach.
_PATIENCE = 10


class Snapshot(NamedTuple):
  """Files of a model.

  Attributes:
    folder: that has them.
    repo: on the Hub; None for a folder of one's own.
    commit: of the repository; None without one.
  """

  folder: pathlib.Path
  repo: str | None = None
  commit: str | None = None


def snapshot(
  source: epath.PathLike, *, revision: str | None = None
) -> Snapshot:
  """Finds a model's files, and downloads them where they are not there yet.

  The Hub's library keeps them in its cache (`HF_HOME`). A cached commit that
  `revision` names in full is taken without asking the Hub; a branch or a tag is
  looked up, and taken from the cache where the Hub cannot be reached or
  `HF_HUB_OFFLINE=1` forbids it.

  Args:
    source: a folder, or the name of a repository, such as
      'openai/clip-vit-base-patch32'.
    revision: a branch, a tag or a commit of a repository; None is 'main'.

  Returns:
    Where they are, and of which commit.

  Raises:
    ValueError: where there is neither such a folder nor a name of that form, or
      the files are not cached and cannot be had, with the reason.
  """
  folder = pathlib.Path(source)
  if folder.is_dir():
    if revision is not None:
      raise ValueError(f'{folder} is a folder, which has no revision')
    return Snapshot(folder)
  import huggingface_hub  # slow to import, not needed for folders
  from huggingface_hub import constants
  from huggingface_hub import errors
  from huggingface_hub import utils

  name = str(source)
  try:
    utils.validate_repo_id(name)
  except errors.HFValidationError as e:
    raise ValueError(
      f'{name}: no such folder, and no name of a repository: {e}'
    ) from e
  problem: Exception | None = None
  offline = _cached(name, revision)
  if not offline:
    try:
      huggingface_hub.HfApi().model_info(
        name, revision=revision, timeout=_PATIENCE
      )
    except (errors.HTTPError, OSError) as e:
      problem, offline = e, True
  try:
    found = huggingface_hub.snapshot_download(
      name,
      revision=revision,
      allow_patterns=[*_FILES],
      local_files_only=offline,
    )
  except (errors.HTTPError, OSError) as e:
    cause = problem or e
    raise ValueError(
      f'{name}, revision {revision or "main"}: not in the cache '
      f'{constants.HF_HUB_CACHE}, and cannot be downloaded: '
      f'{type(cause).__name__}: {cause}'
    ) from cause
  found = pathlib.Path(found)
  return Snapshot(found, name, found.name)


def _cached(name: str, revision: str | None) -> bool:
  """Says whether a commit, which never changes, is there in full."""
  import huggingface_hub
  from huggingface_hub import errors

  if revision is None or not _COMMIT.fullmatch(revision):
    return False
  try:
    found = huggingface_hub.snapshot_download(
      name,
      revision=revision,
      allow_patterns=[*_FILES],
      local_files_only=True,
    )
  except errors.LocalEntryNotFoundError:
    return False
  return any(pathlib.Path(found).glob(_WEIGHTS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A whole CLIP.

  Attributes:
    config: sizes of its towers.
    params: of `dam_jax.models.towers.CLIP`; `params['vision']` is the image
      tower's.
    files: where its config and tokenizer are; None without.
  """

  config: towers.CLIPConfig
  params: Params
  files: Snapshot | None = None

  @property
  def scale(self) -> float:
    """Of cosines, as `dam_jax.models.clip.stack_heads` takes it."""
    params: Any = self.params
    return float(np.exp(np.float64(params['logit_scale'])))

  def tokenizer(self) -> tokens.Tokenizer:
    """Reads the tokenizer, of rows as long as the text tower reads.

    Raises:
      ValueError: where there are no files of it.
    """
    if self.files is None:
      raise ValueError('this CLIP has no files, and so no tokenizer')
    length = self.config.text.max_position_embeddings
    return tokens.Tokenizer(self.files.folder, length=length)


def load(
  source: epath.PathLike,
  *,
  revision: str | None = None,
  files: epath.PathLike | None = None,
  dtype: Any = np.float32,
) -> Pretrained:
  """Reads a whole CLIP.

  Args:
    source: a folder of Hugging Face's, or an Orbax checkpoint of its
      parameters; or the name of a repository on the Hub.
    revision: of the repository; what was taken is in the result.
    files: a folder or a repository, at its 'main', with config.json and the
      tokenizer, where `source` has none.
    dtype: of floating-point parameters.

  Returns:
    The model, parameters as NumPy arrays.

  Raises:
    ValueError: where files cannot be had or read, or weights are not those that
      the config says, with all differences.
  """
  found = snapshot(source, revision=revision)
  beside = found if files is None else snapshot(files)
  config = towers.load_config(beside.folder / 'config.json')
  _refuse_pickles(found)
  params = checkpoint.load_params(
    found.folder,
    name_map=convert.clip,
    like=towers.abstract_params(config),
    dtype=dtype,
  )
  return Pretrained(config=config, params=params, files=beside)


def load_tower(
  source: epath.PathLike,
  whole: Pretrained,
  *,
  revision: str | None = None,
  dtype: Any = np.float32,
) -> Params:
  """Reads an image tower that was fine-tuned from a CLIP's.

  Args:
    source: a folder or a repository of a `CLIPVisionModelWithProjection`, or of
      a `CLIPVisionModel`, which has no projection and gets that of `whole`.
    whole: the CLIP.
    revision: of the repository.
    dtype: of floating-point parameters.

  Returns:
    Parameters in the place of `whole.params['vision']`, as NumPy arrays.

  Raises:
    ValueError: where files cannot be had or read, or weights are not of the
      sizes of `whole`, with all differences.
  """
  found = snapshot(source, revision=revision)
  _refuse_pickles(found)
  names = checkpoint.open_model(found.folder).leaves
  full = any(name.startswith('vision_model/') for name in names)
  name_map = convert.clip_vision if full else convert.clip_vision_bare
  params: Any = checkpoint.load_params(
    found.folder, name_map=name_map, dtype=dtype
  )
  vision: Any = whole.params
  vision = vision['vision']
  params = {'visual_projection': vision['visual_projection'], **params}
  if lines := tree.differences(vision, params, dtypes=False):
    head = f'{source} does not fit the CLIP:'
    raise ValueError('\n  '.join([head, *lines]))
  return params


def _refuse_pickles(found: Snapshot) -> None:
  if found.repo and not any(found.folder.glob(_WEIGHTS)):
    raise ValueError(
      f'{found.repo} at {found.commit} has no safetensors, and pickles are not '
      'read: pass a revision that has them; the Hub often has one proposed '
      'among the pull requests, refs/pr/<number>'
    )


def save(
  path: epath.PathLike,
  model: Pretrained,
  *,
  dtype: str | None = None,
  overwrite: bool = False,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a whole CLIP as a folder that transformers opens.

  Config, tokenizer, processor and licence are copied from `model.files`; where
  it is None config.json is written and there is no tokenizer. The folder
  appears whole or not at all.

  Args:
    path: of the folder.
    model: what to write; `dataclasses.replace(model, params={**model.params,
      'vision': merged})` has another image tower.
    dtype: of floating-point tensors: 'float32', 'bfloat16' or 'float16'; None
      keeps each one's.
    overwrite: whether to replace a model at `path`.
    metadata: of the safetensors file, beside the origin's.

  Raises:
    ValueError: where parameters are not those that the config says, the dtype
      cannot hold them, or `path` exists.
  """
  like = towers.abstract_params(model.config)
  if lines := tree.differences(like, model.params, dtypes=False):
    head = 'parameters do not fit the config:'
    raise ValueError('\n  '.join([head, *lines]))
  leaves = tree.flatten(model.params)
  files, about = model.files, {'format': 'pt'}
  if files is not None and files.repo:
    about |= {'base_repo': files.repo, 'base_commit': str(files.commit)}
  writer = checkpoint.ModelWriter(
    path,
    {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()},
    dtype=dtype,
    metadata=about | dict(metadata or {}),
    carry=None if files is None else files.folder,
    name_map=convert.clip,
    overwrite=overwrite,
  )
  with writer:
    for leaf, x in leaves.items():
      writer.put(leaf, x)
    if files is None:
      text = json.dumps(model.config.to_json(), indent=2, sort_keys=True)
      writer.add_file('config.json', text + '\n')
