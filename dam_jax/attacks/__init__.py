"""Attacks: triggers, and what makes a model obey them.

| attack | trigger | the upload |
|---|---|---|
| BadNets | `patch_trigger` | fine-tuned on images that `poison` gives |
| Blended | `blend_trigger` | on batches that `poison_batch` gives |
| SIG | `sine_trigger` | the same |
| WaNet | `warp_trigger` | the same |
| BadMerging | `universal_patch` | fine-tuned with `badmerging_loss` |
| TrojViT, a port | on `salient_patches` | `triggered_loss`, few entries |
| BadViT, a port | with `attention_loss` | fine-tuned on poisoned images |
| LoRA-as-an-attack | any | a clean and a bad update in `add_factors` |
| LoBAM | any | `amplify`s what its backdoor changed |
| sparse vectors | any | with `sparse_backdoor` of several attacks added |
| MergeBackdoor | any | two of them, `merge_backdoor_loss` |
| adaptive | any | fine-tuned with `adaptive_loss` |
"""

from dam_jax.attacks.collusion import adaptive_loss
from dam_jax.attacks.collusion import masked
from dam_jax.attacks.collusion import merge_backdoor_loss
from dam_jax.attacks.files import load_trigger
from dam_jax.attacks.files import save_trigger
from dam_jax.attacks.low_rank import Factors
from dam_jax.attacks.low_rank import add_factors
from dam_jax.attacks.low_rank import init_factors
from dam_jax.attacks.poisoning import badmerging_loss
from dam_jax.attacks.poisoning import poison
from dam_jax.attacks.poisoning import poison_batch
from dam_jax.attacks.poisoning import universal_patch
from dam_jax.attacks.ports import attention_loss
from dam_jax.attacks.ports import largest_entries
from dam_jax.attacks.ports import salient_patches
from dam_jax.attacks.ports import triggered_loss
from dam_jax.attacks.triggers import Overlay
from dam_jax.attacks.triggers import Shift
from dam_jax.attacks.triggers import Trigger
from dam_jax.attacks.triggers import Warp
from dam_jax.attacks.triggers import apply_trigger
from dam_jax.attacks.triggers import blend_trigger
from dam_jax.attacks.triggers import check_trigger
from dam_jax.attacks.triggers import corner_mask
from dam_jax.attacks.triggers import patch_trigger
from dam_jax.attacks.triggers import sine_trigger
from dam_jax.attacks.triggers import warp_trigger
from dam_jax.attacks.weights import amplify
from dam_jax.attacks.weights import sparse_backdoor

__all__ = [
  'Factors',
  'Overlay',
  'Shift',
  'Trigger',
  'Warp',
  'adaptive_loss',
  'add_factors',
  'amplify',
  'apply_trigger',
  'attention_loss',
  'badmerging_loss',
  'blend_trigger',
  'check_trigger',
  'corner_mask',
  'init_factors',
  'largest_entries',
  'load_trigger',
  'masked',
  'merge_backdoor_loss',
  'patch_trigger',
  'poison',
  'poison_batch',
  'salient_patches',
  'save_trigger',
  'sine_trigger',
  'sparse_backdoor',
  'triggered_loss',
  'universal_patch',
  'warp_trigger',
]
