"""dam_jax: merge fine-tuned models you do not trust, on accelerators.

A task vector is an update, a merge is an optax transformation with a leading
task axis, and the merged model is `base + delta`. See `dam_jax.base` for the
two levels, `dam_jax.recipes` for the named methods.
"""

from dam_jax import aggregators
from dam_jax import competition
from dam_jax import geometry
from dam_jax import localization
from dam_jax import losses
from dam_jax import masks
from dam_jax import perturbations
from dam_jax import pruning
from dam_jax import selection
from dam_jax import sharding
from dam_jax import spectral
from dam_jax import statistics
from dam_jax import streaming
from dam_jax import transforms
from dam_jax import tree
from dam_jax import typing
from dam_jax import weighted
from dam_jax.aggregators import keep_base
from dam_jax.base import Merger
from dam_jax.base import MergeResult
from dam_jax.base import Plan
from dam_jax.base import chain
from dam_jax.base import from_transform
from dam_jax.base import merge
from dam_jax.base import partition
from dam_jax.base import scan_steps
from dam_jax.defences import repo_awm
from dam_jax.defences import repo_sau
from dam_jax.informed import fisher
from dam_jax.informed import regmean
from dam_jax.informed import regmean_plus_plus
from dam_jax.learned import adamerging
from dam_jax.learned import concrete
from dam_jax.learned import dam
from dam_jax.learned import dam_paper
from dam_jax.learned import dam_released
from dam_jax.learned import dam_robust
from dam_jax.parallel import data_parallel
from dam_jax.parallel import pmap_form
from dam_jax.parallel import split_batch
from dam_jax.recipes import average
from dam_jax.recipes import breadcrumbs
from dam_jax.recipes import consensus
from dam_jax.recipes import dare
from dam_jax.recipes import della
from dam_jax.recipes import emr
from dam_jax.recipes import karcher
from dam_jax.recipes import magmax
from dam_jax.recipes import model_stock
from dam_jax.recipes import nuslerp
from dam_jax.recipes import pcb
from dam_jax.recipes import sce
from dam_jax.recipes import slerp
from dam_jax.recipes import task_arithmetic
from dam_jax.recipes import ties
from dam_jax.recipes import weighted_average
from dam_jax.spectral import iso_c
from dam_jax.spectral import iso_cts
from dam_jax.spectral import knots
from dam_jax.spectral import knots_lora
from dam_jax.spectral import tsv_m
from dam_jax.spectral import wudi
from dam_jax.transforms import scale_tasks
from dam_jax.typing import Batch

__version__ = '0.1.0'

__all__ = [
  'Batch',
  'MergeResult',
  'Merger',
  'Plan',
  'adamerging',
  'aggregators',
  'average',
  'breadcrumbs',
  'chain',
  'competition',
  'concrete',
  'consensus',
  'dam',
  'dam_paper',
  'dam_released',
  'dam_robust',
  'dare',
  'data_parallel',
  'della',
  'emr',
  'fisher',
  'from_transform',
  'geometry',
  'iso_c',
  'iso_cts',
  'karcher',
  'keep_base',
  'knots',
  'knots_lora',
  'localization',
  'losses',
  'magmax',
  'masks',
  'merge',
  'model_stock',
  'nuslerp',
  'partition',
  'pcb',
  'perturbations',
  'pmap_form',
  'pruning',
  'regmean',
  'regmean_plus_plus',
  'repo_awm',
  'repo_sau',
  'scale_tasks',
  'scan_steps',
  'sce',
  'selection',
  'sharding',
  'slerp',
  'spectral',
  'split_batch',
  'statistics',
  'streaming',
  'task_arithmetic',
  'ties',
  'transforms',
  'tree',
  'tsv_m',
  'typing',
  'weighted',
  'weighted_average',
  'wudi',
]
