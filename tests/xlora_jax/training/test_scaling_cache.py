"""Entries of the scaling cache on disk: a damaged one is a miss with a warning, never another row and never an end."""

import os
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.training.scaling_cache import ScalingCache

BATCH = {"input_ids": np.arange(12).reshape(2, 6)}
DTYPES = ["float32", "bfloat16"]


def rows(dtype):
    return np.random.default_rng(0).normal(size=(2, 6, 4)).astype(jnp.dtype(dtype))


@pytest.fixture(params=DTYPES)
def filled(request, tmp_path):
    cache = ScalingCache("m", request.param, tmp_path)
    keys = cache.keys(BATCH)
    cache.put(keys, rows(request.param))
    return request.param, tmp_path, keys


def entries(directory):
    return sorted(directory.rglob("*.npy"))


def test_what_was_put_comes_back(filled):
    dtype, directory, keys = filled
    got = ScalingCache("m", dtype, directory).get(keys)
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(got, rows(dtype))
    other = DTYPES[1 - DTYPES.index(dtype)]
    assert ScalingCache("m", other, directory).get(keys) is None


def check_is_a_miss(dtype, directory, keys):
    cache = ScalingCache("m", dtype, directory)
    with pytest.warns(UserWarning, match=r"scaling cache: .*\.npy: a damaged entry .*computed again"):
        assert cache.get(keys) is None
    assert (cache.hits, cache.misses) == (0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(keys) is None  # said once
        cache.put(keys, rows(dtype))
        np.testing.assert_array_equal(cache.get(keys), rows(dtype))
        np.testing.assert_array_equal(ScalingCache("m", dtype, directory).get(keys), rows(dtype))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1],
        lambda content: content[:64],
        lambda content: content[:-1],
        lambda content: content[:128] + bytes(len(content) - 128),
        lambda content: bytes(len(content)),
        lambda content: b"PK\x03\x04" + content[4:],
        lambda content: content.replace(b"(6, 4)", b"(4, 6)"),
        lambda content: content.replace(b"(6, 4)", b"(6, 9999999999999)"),
        lambda content: content.replace(b"<f4", b"|O ").replace(b"<u2", b"|O "),
    ],
)
def test_a_damaged_entry_is_a_miss(filled, damage):
    dtype, directory, keys = filled
    first = entries(directory)[0]
    first.write_bytes(damage(first.read_bytes()))
    check_is_a_miss(dtype, directory, keys)


def test_every_flipped_bit_of_the_payload_is_found(filled):
    dtype, directory, keys = filled
    first = entries(directory)[1]
    content = first.read_bytes()
    for position in range(128, len(content)):
        first.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        with pytest.warns(UserWarning, match="damaged"):
            assert ScalingCache("m", dtype, directory).get(keys) is None
    first.write_bytes(content)
    assert ScalingCache("m", dtype, directory).get(keys) is not None


def test_an_entry_under_anothers_key_is_a_miss(filled):
    dtype, directory, keys = filled
    one, two = entries(directory)
    name = two.name[:32] + one.name[32:]
    two.unlink()
    shutil.copy(one, one.with_name(name))
    check_is_a_miss(dtype, directory, keys)


def test_an_entry_that_can_not_be_read_is_a_miss(filled):
    dtype, directory, keys = filled
    first = entries(directory)[0]
    first.unlink()
    first.mkdir()
    cache = ScalingCache("m", dtype, directory)
    with pytest.warns(UserWarning, match="damaged entry"):
        assert cache.get(keys) is None


def test_a_full_disk_costs_time_only(filled, monkeypatch):
    dtype, directory, keys = filled
    cache = ScalingCache("n", dtype, directory)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.warns(UserWarning, match="entries can't be written"):
        np.testing.assert_array_equal(cache.put(keys, rows(dtype)), rows(dtype))
    assert cache.get(keys) is None
