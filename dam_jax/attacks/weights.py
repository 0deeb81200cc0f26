"""Attacks that compute an upload from fine-tuned models, without training."""

from collections.abc import Sequence
import functools
import operator

import jax
import jax.numpy as jnp

from dam_jax import tree
from dam_jax.typing import Params


def amplify(benign: Params, malicious: Params, factor: float = 3.0) -> Params:
  """Makes LoBAM's upload, `theta_ben + lambda (theta_mal - theta_ben)`.

  Both are fine-tuned on the same task with low-rank updates; what they differ
  by is the backdoor, which is amplified and so survives the merge.

  Args:
    benign: parameters fine-tuned on clean images.
    malicious: the same on poisoned ones.
    factor: `lambda`, 2 to 3.5 in the paper.

  Returns:
    The upload, in the benign model's dtypes; leaves that are not floating point
    are the benign model's.

  Raises:
    ValueError: where the two differ in names, shapes or dtypes.

  Examples:
    >>> amplify({'w': jnp.ones(1)}, {'w': jnp.full(1, 2.)})['w'].tolist()
    [4.0]

  References:
    Yin et al., `LoBAM: LoRA-Based Backdoor Attack on Model Merging
    <https://arxiv.org/abs/2411.16746>`_, 2024
  """
  tree.check_compatible(benign, {'malicious': malicious})
  (backdoor,) = _differences([benign], [malicious])
  scaled = jax.tree.map(lambda x: factor * x, backdoor)
  return tree.apply_delta(benign, scaled)


def sparse_backdoor(
  clean: Sequence[Params], backdoored: Sequence[Params]
) -> Params:
  """Returns the sum of backdoor vectors where all have the same sign.

  `v_a = theta_a - theta_clean` of each attack `a`; an entry counts where the
  signs of all attacks agree, so that what is left is what attacks share.

  Args:
    clean: `A` models fine-tuned on clean images.
    backdoored: `A` models fine-tuned from the same bases on poisoned ones.

  Returns:
    What to add to an upload, in float32 at least; zero where a leaf is not
    floating point.

  Raises:
    ValueError: where there is none, or not a clean model for each.

  Examples:
    >>> zero, one = {'w': jnp.zeros(2)}, {'w': jnp.array([1., 1.])}
    >>> other = {'w': jnp.array([2., -1.])}
    >>> sparse_backdoor([zero, zero], [one, other])['w'].tolist()
    [3.0, 0.0]

  References:
    Pawlak et al., `Backdoor Vectors: a Task Arithmetic View on Backdoor Attacks
    and Defenses <https://arxiv.org/abs/2510.08016>`_, 2025
  """
  if not clean or len(clean) != len(backdoored):
    raise ValueError(
      f'want a clean model for each backdoored one, got {len(clean)} for '
      f'{len(backdoored)}'
    )
  models = {f'clean {i}': x for i, x in enumerate(clean)}
  models |= {f'backdoored {i}': x for i, x in enumerate(backdoored)}
  tree.check_compatible(clean[0], models)

  def leaf_fn(*vectors):
    signs = [jnp.sign(v) for v in vectors]
    agree = functools.reduce(
      operator.and_, (s == signs[0] for s in signs), signs[0] != 0
    )
    return jnp.where(agree, sum(vectors), 0)

  return jax.tree.map(leaf_fn, *_differences(clean, backdoored))


def _differences(clean, backdoored):
  """Returns what each backdoored model adds to its clean one."""
  return [
    jax.tree.map(lambda x: x[0], tree.task_vectors(c, tree.stack([b])))
    for c, b in zip(clean, backdoored, strict=True)
  ]
