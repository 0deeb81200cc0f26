"""Defences: repairs of a merged model, by what each is allowed to see."""

from dam_jax.defences.interface import Data
from dam_jax.defences.interface import Defence
from dam_jax.defences.interface import Labelled
from dam_jax.defences.interface import NoData
from dam_jax.defences.interface import Unlabelled
from dam_jax.defences.repo import repo_awm
from dam_jax.defences.repo import repo_sau

__all__ = (
  'Data',
  'Defence',
  'Labelled',
  'NoData',
  'Unlabelled',
  'repo_awm',
  'repo_sau',
)
