"""Products of few rows, in the forms that backends read matrices fastest in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.layers import matmul as products


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 512), (1, 1, 512), (512,), (2, 1, 512)])
def test_parts_add_up(monkeypatch, cores, shape):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    draw = np.random.default_rng(0).normal
    x, matrix = draw(size=shape).astype(np.float32), draw(size=(512, 160)).astype(np.float32)
    # A function of its own: JAX remembers what it has traced.
    text = jax.jit(lambda x, matrix: products.matmul(x, matrix)).lower(x, matrix).as_text()
    taken = {1: 1, 2: 2, 3: 2, 8: 8}[cores] if x.size == 512 else 1
    assert (f"tensor<{taken}x{512 // taken}x160xf32>" in text) == (taken > 1)
    np.testing.assert_allclose(products.matmul(x, matrix), x.astype(np.float64) @ matrix, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: (products.matmul(x, matrix) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * (x.astype(np.float64) @ matrix) @ matrix.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_those_of_jax(monkeypatch, dtype):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    x, matrix = jnp.ones((1, 512), dtype), jnp.ones((512, 160), dtype)
    numbers = (((1,), (0,)), ((), ()))
    assert products.matmul(x, matrix).dtype == jnp.float32
    for preferred in (None, jnp.float32):
        ours, theirs = (f(x, matrix, numbers, None, preferred) for f in (products.dot_general, jax.lax.dot_general))
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_an_odd_depth_is_not_divided(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    x, matrix = jnp.ones((1, 513)), jnp.ones((513, 160))
    np.testing.assert_array_equal(products.matmul(x, matrix), jnp.matmul(x, matrix))


@pytest.mark.parametrize("shape", [(1, 512), (1, 1, 512), (512,)])
@pytest.mark.parametrize(("backend", "dtype"), [("gpu", jnp.bfloat16), ("gpu", jnp.float32), ("cpu", jnp.bfloat16)])
def test_a_row_stays_a_matrix_product(monkeypatch, shape, backend, dtype):
    draw = np.random.default_rng(0).normal
    x, matrix = jnp.asarray(draw(size=shape), dtype), jnp.asarray(draw(size=(512, 160)), dtype)
    plain = jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    product = jax.jit(lambda x, matrix: products.matmul(x, matrix))
    assert f"tensor<2x512x{'bf16' if dtype == jnp.bfloat16 else 'f32'}>" in product.lower(x, matrix).as_text()
    np.testing.assert_allclose(product(x, matrix), plain, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: (products.matmul(x, matrix) ** 2).sum())(x)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), 2 * (plain @ matrix.T.astype(jnp.float32)), rtol=2e-2, atol=0.5
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 6, 32, 33])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rows_of_each_head(monkeypatch, backend, rows, dtype):
    draw = np.random.default_rng(0).normal
    x, keys = jnp.asarray(draw(size=(2, 3, rows, 16)), dtype), jnp.asarray(draw(size=(2, 3, 16, 40)), dtype)
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    ours = products.by_head(x, keys)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, np.asarray(x, np.float64) @ np.asarray(keys, np.float64), rtol=1e-5, atol=1e-5)
