"""Checksums of arrays: the same however an array is cut into shards, and another for any changed bit."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.training.checksums import _sum, checksums


def cuts(shape, parts):
    """Slices that cover an array, `parts` along each axis."""
    if not shape:
        return [()]
    edges = np.linspace(0, shape[0], parts + 1).astype(int)
    return [(slice(int(a), int(b)), *rest) for a, b in itertools.pairwise(edges) for rest in cuts(shape[1:], parts)]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 6), (2, 3, 5), (0, 3), (1500, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "float16"])
def test_parts_add_up_to_the_whole(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    want = int(checksums({"a": jnp.asarray(values)})["a"], 16)
    for parts in (1, 2, 3):
        total = sum(int(_sum(values[cut], cut, shape)) for cut in cuts(shape, parts))
        assert total % 2**64 == want


def test_every_bit_and_every_place_counts():
    values = np.zeros(64, np.float32)
    seen = {checksums({"a": jnp.asarray(values)})["a"]}
    for bit in range(0, values.nbytes * 8, 7):
        changed = values.view(np.uint8).copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(checksums({"a": jnp.asarray(changed.view(np.float32))})["a"])
    assert len(seen) == 1 + len(range(0, values.nbytes * 8, 7))
    a, b = jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])
    assert checksums({"a": a}) != checksums({"a": b})
    assert checksums({"a": jnp.zeros(3)}) != checksums({"a": jnp.zeros(4)})
