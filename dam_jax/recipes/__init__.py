"""Named merges that need no data, as transformations of task vectors.

  >>> import jax.numpy as jnp
  >>> import dam_jax as dj
  >>> base = {'w': jnp.array([1., 1.])}
  >>> experts = {'w': jnp.array([[2., 1.], [1., 3.]])}
  >>> dj.merge(dj.task_arithmetic(0.5), base, experts).params['w'].tolist()
  [1.5, 2.0]

Hyper-parameters that are numbers may be traced, so `jax.vmap` sweeps them.
`dam_jax.learned` has the merges that learn on images.
"""

from dam_jax.recipes.interpolation import average
from dam_jax.recipes.interpolation import karcher
from dam_jax.recipes.interpolation import model_stock
from dam_jax.recipes.interpolation import nuslerp
from dam_jax.recipes.interpolation import slerp
from dam_jax.recipes.interpolation import task_arithmetic
from dam_jax.recipes.interpolation import weighted_average
from dam_jax.recipes.sparsification import breadcrumbs
from dam_jax.recipes.sparsification import consensus
from dam_jax.recipes.sparsification import dare
from dam_jax.recipes.sparsification import della
from dam_jax.recipes.sparsification import emr
from dam_jax.recipes.sparsification import magmax
from dam_jax.recipes.sparsification import pcb
from dam_jax.recipes.sparsification import sce
from dam_jax.recipes.sparsification import ties

__all__ = [
  'average',
  'breadcrumbs',
  'consensus',
  'dare',
  'della',
  'emr',
  'karcher',
  'magmax',
  'model_stock',
  'nuslerp',
  'pcb',
  'sce',
  'slerp',
  'task_arithmetic',
  'ties',
  'weighted_average',
]
