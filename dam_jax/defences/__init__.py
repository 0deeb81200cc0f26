"""Defences: repairs of a merged model, by what each is allowed to see.

A `Defence` maps parameters, a forward pass and data to parameters. Its `reads`
is the type of its data: `NoData`, `Unlabelled` or `Labelled`, and another type
is refused. Most repair one model; those that say `experts` take all uploads.

  >>> import jax.numpy as jnp
  >>> wag().reads.__name__, wag().experts, anp().reads.__name__
  ('NoData', True, 'Labelled')
  >>> experts = {'w': jnp.array([[1.0], [3.0]])}
  >>> wag()(experts, None, NoData())['w'].tolist()
  [2.0]

`repo_awm` and `repo_sau` are what the released code of Defense-Aware Merging
calls AWM and SAU: mergers that learn a mask on unlabelled images, not these
papers' methods.
"""

from dam_jax.defences.interface import Data
from dam_jax.defences.interface import Defence
from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.defences.interface import Unlabelled
from dam_jax.defences.masking import anp
from dam_jax.defences.masking import awm
from dam_jax.defences.pruning import clp
from dam_jax.defences.pruning import fine_pruning
from dam_jax.defences.repo import repo_awm
from dam_jax.defences.repo import repo_sau
from dam_jax.defences.unlearning import i_bau
from dam_jax.defences.unlearning import sau
from dam_jax.defences.vectors import ibvs
from dam_jax.defences.vectors import lfpm
from dam_jax.defences.vectors import tbar
from dam_jax.defences.vectors import wag

__all__ = (
  'Data',
  'Defence',
  'Labelled',
  'NoData',
  'Unlabelled',
  'anp',
  'awm',
  'clp',
  'fine_pruning',
  'i_bau',
  'ibvs',
  'lfpm',
  'repo_awm',
  'repo_sau',
  'sau',
  'tbar',
  'wag',
)
