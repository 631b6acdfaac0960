"""Torch files whose sizes lie: refused before a byte of what they claim is allocated, and honest ones are read."""

import io
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from interop import FormatError
from interop.storage.tensors import open_pickle


def saved(tmp_path, state, **options):
    path = tmp_path / "adapter_model.bin"
    torch.save(state, path, **options)
    return path


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with every member's content as `change` gives it."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))
    path.write_bytes(buffer.getvalue())
    return path


def refused(path, match):
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(FormatError, match=match) as caught:
        open_pickle(path)
    assert str(path) in str(caught.value)
    assert time.monotonic() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members(tmp_path, compression):
    path = saved(tmp_path, {"a": torch.zeros(1000)})
    refused(rewritten(path, lambda name, content: content, compression), "compressed")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(3, 2**33),
        torch.zeros(1).expand(2),
        torch.zeros(4).as_strided((3, 2), (1, 1)),
        torch.zeros(64).unfold(0, 32, 1),
    ],
)
def test_elements_that_overlap(tmp_path, tensor, old):
    refused(saved(tmp_path, {"a": tensor}, _use_new_zipfile_serialization=not old), "overlap")


@pytest.mark.parametrize("old", [False, True])
def test_a_shape_that_the_storage_does_not_hold(tmp_path, old):
    path = saved(tmp_path, {"a": torch.zeros(1000)}, _use_new_zipfile_serialization=not old)

    def change(name, content):  # the count of elements stays, the shape grows
        shape, other = b"M\xe8\x03\x85", b"J\xe8\x03\x03\x03\x85"
        return content.replace(shape, other) if name.endswith("data.pkl") else content

    if old:
        path.write_bytes(change("data.pkl", path.read_bytes()))
    else:
        rewritten(path, change)
    refused(path, "overlap or lie outside")


@pytest.mark.parametrize("size", [3999, 4001, 0, 8000])
def test_a_member_of_another_size_than_its_storage(tmp_path, size):
    path = saved(tmp_path, {"a": torch.zeros(1000), "b": torch.ones(1000)})
    rewritten(path, lambda name, content: bytes(size) if name.endswith("data/0") else content)
    refused(path, "should have 4000 bytes, its member has")


def test_a_member_twice(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(10)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), bytes(40))
    refused(path, "twice")


def test_one_storage_under_very_many_names(tmp_path):
    one = torch.zeros(2**20)
    refused(saved(tmp_path, {f"a{i}": one for i in range(1000)}), "bytes together")


def test_an_old_file_that_claims_more_than_it_has(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cut off")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02r" + struct.pack("<I", 2**31) + b"N.",  # a memo of 2**31 entries
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",  # a bytearray of 64 GiB
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # the same by a call
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemsK\x01ub.",  # shadows a method
    ],
)
def test_pickles_that_ask_for_memory(tmp_path, content):
    path = saved(tmp_path, {"a": torch.zeros(1)})
    rewritten(path, lambda name, old: content if name.endswith("data.pkl") else old)
    if b"OrderedDict" in content:
        assert open_pickle(path) == {}
    else:
        refused(path, "adapter_model.bin")


@pytest.mark.parametrize("old", [False, True])
def test_honest_files(tmp_path, old):
    whole = torch.randn(6, 8)
    state = OrderedDict(
        a=whole,
        tied=whole,
        part=whole[2:4, ::2],
        turned=whole.T,
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(3.5),
        half=torch.randn(5).to(torch.bfloat16),
        flags=torch.tensor([True, False]),
        learned=torch.nn.Parameter(torch.randn(3)),
    )
    if not old:  # torch itself can't read these from the old format
        state["small"] = torch.randn(5).to(torch.float8_e4m3fn)
    state._metadata = {"": {"version": 1}}
    path = saved(tmp_path, state, _use_new_zipfile_serialization=not old)
    found = open_pickle(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        got = found[name].read()
        assert got.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(got.astype(np.float32), tensor.detach().float().numpy())
