"""Files: models, LoRAs, records of merges and states of runs.

Nothing is ever unpickled, and what is written goes to a temporary name first
and is then moved into place.

Whole models of safetensors are read into pytrees by `load_params` and
`load_experts`, and written by `save_params`. Models that are too large for
that are opened by `open_model`, read leaf by leaf, and written likewise by
`ModelWriter`.
"""

from dam_jax.checkpoint.card import model_card
from dam_jax.checkpoint.card import read_license
from dam_jax.checkpoint.headers import PATHS
from dam_jax.checkpoint.headers import NameMap
from dam_jax.checkpoint.lora import Factors
from dam_jax.checkpoint.lora import Full
from dam_jax.checkpoint.lora import Lora
from dam_jax.checkpoint.lora import concat
from dam_jax.checkpoint.lora import expand
from dam_jax.checkpoint.lora import truncate
from dam_jax.checkpoint.models import Model
from dam_jax.checkpoint.models import open_model
from dam_jax.checkpoint.models import save_orbax
from dam_jax.checkpoint.peft import open_lora
from dam_jax.checkpoint.peft import save_lora
from dam_jax.checkpoint.record import MergeRecord
from dam_jax.checkpoint.record import combined_hash
from dam_jax.checkpoint.record import file_hash
from dam_jax.checkpoint.record import file_hashes
from dam_jax.checkpoint.record import model_hashes
from dam_jax.checkpoint.record import versions
from dam_jax.checkpoint.rows import fit_rows
from dam_jax.checkpoint.saves import Keep
from dam_jax.checkpoint.saves import Save
from dam_jax.checkpoint.saves import Saves
from dam_jax.checkpoint.state import restore_state
from dam_jax.checkpoint.state import save_state
from dam_jax.checkpoint.tensors import load_abstract
from dam_jax.checkpoint.tensors import load_experts
from dam_jax.checkpoint.tensors import load_metadata
from dam_jax.checkpoint.tensors import load_params
from dam_jax.checkpoint.tensors import replacing
from dam_jax.checkpoint.tensors import save_params
from dam_jax.checkpoint.tensors import write
from dam_jax.checkpoint.writer import ModelWriter

__all__ = [
  'PATHS',
  'Factors',
  'Full',
  'Keep',
  'Lora',
  'MergeRecord',
  'Model',
  'ModelWriter',
  'NameMap',
  'Save',
  'Saves',
  'combined_hash',
  'concat',
  'expand',
  'file_hash',
  'file_hashes',
  'fit_rows',
  'load_abstract',
  'load_experts',
  'load_metadata',
  'load_params',
  'model_card',
  'model_hashes',
  'open_lora',
  'open_model',
  'read_license',
  'replacing',
  'restore_state',
  'save_lora',
  'save_orbax',
  'save_params',
  'save_state',
  'truncate',
  'versions',
  'write',
]
