"""Merges as their papers have them, in NumPy: what tests compare with.

Of task vectors `[out, in]`, a list, and without a look at the package.
"""

import numpy as np


def polar(x):
  u, _, vt = np.linalg.svd(x, full_matrices=False)
  return u @ vt


def tsv_m(taus):
  """Algorithm 1 of Gargiulo et al., of matrices of full rank."""
  each = min(taus[0].shape) // len(taus)
  parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
  left = polar(np.hstack([u[:, :each] for u, _, _ in parts]))
  right = polar(np.hstack([vt[:each].T for _, _, vt in parts]))
  values = np.concatenate([s[:each] for _, s, _ in parts])
  return left @ np.diag(values) @ right.T


def iso_c(taus):
  """Algorithm 1 of Marczak et al."""
  u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
  return s.mean() * u @ vt


def iso_cts(taus, common=0.8):
  """Algorithm 2 of Marczak et al., the rounding of their code."""
  num, rank = len(taus), min(taus[0].shape)
  each = round((rank - int(rank * common)) / num)
  shared = rank - each * num
  u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
  left, values, right = [u[:, :shared]], [s[:shared]], [vt[:shared].T]
  for tau in taus:
    rest = tau - left[0] @ left[0].T @ tau
    u, s, vt = np.linalg.svd(rest, full_matrices=False)
    left.append(u[:, :each])
    values.append(s[:each])
    right.append(vt[:each].T)
  mean = np.concatenate(values).mean()
  return mean * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def wudi(taus, rate, iterations):
  """Algorithm 1 of Cheng et al., torch's Adam written out."""
  delta, first, second = sum(taus), 0, 0
  for i in range(1, iterations + 1):
    grad = sum(
      2 * (delta - tau) @ tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus
    )
    first = 0.9 * first + 0.1 * grad
    second = 0.999 * second + 0.001 * grad**2
    root = np.sqrt(second / (1 - 0.999**i)) + 1e-8
    delta = delta - rate * first / (1 - 0.9**i) / root
  return delta


def wudi_exact(taus, omega=0.0):
  """Equation 23 of Cheng et al., the pseudo-inverse for the inverse."""
  eye = omega * np.eye(taus[0].shape[1])
  squares = [np.linalg.norm(tau) ** 2 for tau in taus]
  grams = [
    (tau.T @ tau + eye) / square
    for tau, square in zip(taus, squares, strict=True)
  ]
  right = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
  return right @ np.linalg.pinv(sum(grams))


def ties(vectors, density):
  """Yadav et al., of `[K, P]` without entries that tie."""
  sizes = np.abs(vectors)
  rank = vectors.shape[1] - int(density * vectors.shape[1])
  kept = np.where(
    sizes >= np.sort(sizes, axis=1)[:, rank - 1 :][:, :1], vectors, 0
  )
  agree = kept * np.sign(kept.sum(0)) > 0
  return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


def knots(leaves, *, density=0.2, scaled=False, rank=None):
  """Section 4 of Stoica et al., all leaves' `V` trimmed together."""
  bases, parts = [], []
  for taus in leaves:
    u, s, vt = np.linalg.svd(np.hstack(list(taus)), full_matrices=False)
    u, s, vt = u[:, :rank], np.diag(s[:rank]), vt[:rank]
    bases.append(u if scaled else u @ s)
    parts.append(np.stack(np.hsplit(s @ vt if scaled else vt, len(taus))))
  flat = np.hstack([part.reshape(len(part), -1) for part in parts])
  ends = np.cumsum([part[0].size for part in parts])[:-1]
  merged = np.split(ties(flat, density), ends)
  return [
    basis @ m.reshape(part[0].shape)
    for basis, m, part in zip(bases, merged, parts, strict=True)
  ]
