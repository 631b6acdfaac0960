"""Checksums of arrays: the same however an array is cut into shards, and another for any changed bit."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.training.checksums import checksums, partial_checksums

_SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from xlora_jax.sharding import make_mesh
from xlora_jax.training.checksums import checksums
assert jax.device_count() == 8
mesh = make_mesh(1, 4, 2)
for dtype in ("float32", "bfloat16", "int32", "bool"):
    values = (np.random.default_rng(0).normal(size=(8, 12)) * 9).astype(jax.numpy.dtype(dtype))
    want = checksums({"a": jax.numpy.asarray(values)})
    for spec in (P(), P("fsdp", None), P("tensor", "fsdp"), P(None, "tensor"), P(("fsdp", "tensor"),)):
        assert checksums({"a": jax.device_put(values, NamedSharding(mesh, spec))}) == want, (dtype, spec)
"""


def test_shards_make_no_difference():
    root = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(root),
    }
    subprocess.run([sys.executable, "-c", _SHARDED], check=True, env=environment, cwd=root)


def test_changes_do_not_cancel_out():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    seen = {checksums({"a": jnp.asarray(values)})["a"]}
    for first in range(99):  # two flipped signs
        changed = values.copy()
        changed[first : first + 2] *= -1
        seen.add(checksums({"a": jnp.asarray(changed)})["a"])
    assert len(seen) == 100


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 6), (2, 3, 5), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint32", "uint8", "float16"])
def test_any_shape_and_dtype_has_one(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    (one,) = checksums({"a": jnp.asarray(values)}).values()
    assert len(one) == 16
    assert {"b": one} == checksums({"b": jnp.asarray(values)})


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
    grid = jnp.arange(6.0).reshape(2, 3)
    assert checksums({"a": grid}) != checksums({"a": grid[::-1]}) != checksums({"a": grid[:, ::-1]})


def test_parts_have_their_own_and_storage_makes_no_difference():
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(jnp.bfloat16)
    whole = partial_checksums({"a": (jnp.asarray(values), (0, -1))})["a"]
    assert whole.shape == (3, 5)
    assert len(set(whole.ravel().tolist())) == 15
    for i in range(3):
        part = partial_checksums({"a": (jnp.asarray(values[i], jnp.float32), (-1,))})["a"]
        np.testing.assert_array_equal(part, whole[i])
    # An array that was not on a device.
    np.testing.assert_array_equal(partial_checksums({"a": (values, (0, -1))})["a"], whole)
