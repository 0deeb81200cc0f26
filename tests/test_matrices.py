"""Leaves as matrices, and singular values that are rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dam_jax import matrices

svd = jax.jit(matrices.svd)


@pytest.mark.parametrize('shape', [(4, 4), (6, 3), (3, 40), (64, 64)])
def test_svd_has_no_directions_but_those_that_are(shape):
  rng = np.random.default_rng(0)
  factors = rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))
  x = (factors[0] @ factors[1]).astype(np.float32)
  u, s, vt = map(np.asarray, svd(x))
  assert (s > 0).sum() == 2
  np.testing.assert_array_equal(u[:, 2:], 0)
  np.testing.assert_array_equal(vt[2:], 0)
  np.testing.assert_allclose(u * s @ vt, x, atol=1e-5)
  np.testing.assert_allclose(u[:, :2].T @ u[:, :2], np.eye(2), atol=1e-5)


def test_svd_of_small_singular_values_keeps_them():
  sizes = np.array([1, 1e-4, 1e-6, 0], np.float32)
  np.testing.assert_allclose(svd(np.diag(sizes))[1], sizes, rtol=1e-5)
  above = svd(np.diag(sizes), floor=np.float32([1e-5]))[1]
  np.testing.assert_allclose(above, [1, 1e-4, 0, 0], rtol=1e-5)


def test_svd_of_nan_is_nan():
  for part in svd(np.full((4, 4), np.nan, np.float32)):
    assert np.isnan(part).any()


def test_orthogonal_is_the_nearest_and_stays():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 4)).astype(np.float32)
  orthogonal = jax.jit(matrices.orthogonal)
  nearest = np.asarray(orthogonal(x))
  np.testing.assert_allclose(nearest.T @ nearest, np.eye(4), atol=1e-5)
  np.testing.assert_allclose(orthogonal(nearest), nearest, atol=1e-5)
  other = np.linalg.qr(rng.normal(size=(6, 4)))[0]
  assert np.linalg.norm(x - nearest) < np.linalg.norm(x - other)


@pytest.mark.parametrize('input_axis', [0, 1])
def test_leaves_come_back_from_matrices(input_axis):
  x = jnp.arange(3 * 2 * 5 * 7.0).reshape(3, 2, 5, 7).astype(jnp.bfloat16)
  y = matrices.to_matrices(x, input_axis)
  assert y.dtype == jnp.float32
  assert y.shape == ((3, 7, 10) if input_axis == 0 else (3, 2, 35))
  for back, want in (
    (matrices.from_matrix(y, x, input_axis), x),
    (matrices.from_matrix(y[1], x, input_axis), x[1]),
  ):
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, want)
