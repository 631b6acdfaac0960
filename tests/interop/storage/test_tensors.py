"""Tensor files: real ones read bit by bit, broken and hostile ones refused by file and tensor."""

import json
import os
import pickle
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interop.storage import tensors
from interop.storage.errors import FormatError
from interop.storage.tensors import LazyTensor, open_safetensors, open_tensors, require_finite, write_safetensors
from tests.helpers.pickles import RunsCode

NUMPY_DTYPES = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype("f4"),
        "a.weight": rng.normal(size=(4, 2)).astype("f4"),
        "half": rng.normal(size=(7,)).astype("f2"),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(1.5, "f8"),
        "empty": np.zeros((0, 3), "f4"),
    }


def assert_same(read, expected):
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].shape == array.shape
        assert read[name].dtype == array.dtype
        got = read[name].read()
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


class TestSafetensors:
    def test_reads_what_the_library_writes(self, tmp_path):
        safetensors.numpy.save_file(some_tensors(), tmp_path / "x.safetensors", {"format": "pt"})
        assert_same(open_safetensors(tmp_path / "x.safetensors"), some_tensors())

    @pytest.mark.parametrize("dtype", NUMPY_DTYPES)
    def test_every_dtype(self, tmp_path, dtype):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        write_safetensors(tmp_path / "x.safetensors", {"x": array})
        assert_same(open_safetensors(tmp_path / "x.safetensors"), {"x": array})
        if dtype != "c8":  # newer than some versions of the library
            np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"], array)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_dtypes_that_numpy_lacks(self, tmp_path, dtype):
        from safetensors.torch import load_file, save_file

        tensor = torch.tensor([[1.0, -2.5, 0.125], [3.5, 64.0, -0.5]]).to(dtype)
        save_file({"x": tensor}, tmp_path / "x.safetensors")
        read = open_safetensors(tmp_path / "x.safetensors")["x"]
        np.testing.assert_array_equal(read.read().astype("f4"), tensor.float().numpy())
        write_safetensors(tmp_path / "y.safetensors", {"x": read})
        assert load_file(tmp_path / "y.safetensors")["x"].view(torch.uint8).equal(tensor.view(torch.uint8))

    def test_writes_the_librarys_bytes(self, tmp_path):
        for name in ("z.weight", "a.weight"), ("µ",):
            arrays = {key: np.full((2, 3), i, "f4") for i, key in enumerate(name)}
            safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
            write_safetensors(tmp_path / "ours.safetensors", arrays)
            assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()

    def test_mixed_dtypes_load_in_the_library(self, tmp_path):
        write_safetensors(tmp_path / "x.safetensors", some_tensors(), {"made": "here"})
        read = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        for name, array in some_tensors().items():
            assert read[name].tobytes() == array.tobytes()
        with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
            assert file.metadata() == {"made": "here"}

    def test_views_are_written_in_their_own_order(self, tmp_path):
        array = np.arange(12.0, dtype="f4").reshape(3, 4)
        write_safetensors(tmp_path / "x.safetensors", {"t": array.T, "s": array[:, ::2]})
        assert_same(open_safetensors(tmp_path / "x.safetensors"), {"t": array.T.copy(), "s": array[:, ::2].copy()})

    def test_lazy_tensors_are_read_one_at_a_time(self, tmp_path):
        events = []

        def lazy(name):
            return LazyTensor(name, tmp_path, np.dtype("f4"), (2,), lambda: events.append(name) or np.ones(2, "f4"))

        write_safetensors(tmp_path / "x.safetensors", {name: lazy(name) for name in "cab"})
        assert events == ["a", "b", "c"]

    def test_a_dtype_that_safetensors_lacks(self, tmp_path):
        with pytest.raises(FormatError, match="'x' has dtype complex128"):
            write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(2, "c16")})

    def test_no_value_is_read_before_it_is_asked_for(self, tmp_path):
        write_safetensors(tmp_path / "x.safetensors", {"x": np.ones(5, "f4")})
        opened = open_safetensors(tmp_path / "x.safetensors")
        os.truncate(tmp_path / "x.safetensors", os.path.getsize(tmp_path / "x.safetensors") - 4)
        with pytest.raises(FormatError, match=r"x\.safetensors: the file got shorter while 'x' was read"):
            opened["x"].read()


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE_HEADERS = {
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "should start with '{'"),
    "empty": (b"", b"", "should start with '{'"),
    "deeply nested": (b'{"a":' * 100_000, b"", "not valid JSON"),
    "a key twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "the key 'a' stands twice"),
    "a number beyond reason": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "entry is no object": ({"a": 3}, b"", "'a': expected an object of dtype, shape and data_offsets"),
    "entry lacks a field": ({"a": {"dtype": "F32", "shape": []}}, b"", "'a': expected an object of dtype"),
    "entry has a field more": ({"a": entry(extra=1)}, b"x" * 8, "'a': expected an object of dtype"),
    "unknown dtype": ({"a": entry("F31")}, b"x" * 8, "'a': dtype 'F31'"),
    "dtype is no string": ({"a": entry(["F32"])}, b"x" * 8, "'a': dtype"),
    "wrong dtype": ({"a": entry("F64")}, b"x" * 8, r"'a': shape \[2\] of F64 takes 16 bytes, but the file gives it 8"),
    "wrong shape": ({"a": entry(shape=(3,))}, b"x" * 8, r"'a': shape \[3\] of F32 takes 12 bytes"),
    "negative size": ({"a": entry(shape=(-1, -2))}, b"x" * 8, r"'a': shape \[-1, -2\]"),
    "size is a float": ({"a": entry(shape=(2.0,))}, b"x" * 8, r"'a': shape \[2.0\]"),
    "size is a bool": ({"a": entry(shape=(True, 2))}, b"x" * 8, r"'a': shape \[True, 2\]"),
    "size is a string": ({"a": entry(shape=("2",))}, b"x" * 8, "'a': shape"),
    "shape of many sizes": ({"a": entry(shape=[1] * 100_000)}, b"x" * 8, "'a': shape"),
    "product that overflows": ({"a": entry(shape=(2**40, 2**40))}, b"x" * 8, "'a': shape"),
    "size that overflows": ({"a": entry(shape=(2**70,))}, b"x" * 8, "'a': shape"),
    "offsets beyond the file": ({"a": entry(offsets=(0, 800))}, b"x" * 8, r"'a': data_offsets \[0, 800\]"),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, b"x" * 8, r"'a': data_offsets \[8, 0\]"),
    "offsets negative": ({"a": entry(offsets=(-8, 0))}, b"x" * 8, r"'a': data_offsets \[-8, 0\]"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, b"x" * 8, "'a': data_offsets"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12, "the bytes of 'b' overlap those of 'a'"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, b"x" * 8, "the bytes of 'b' overlap those of 'a'"),
    "a gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"x" * 20, "4 bytes that belong to no tensor between 'a'"),
    "a gap at the start": ({"a": entry(offsets=(4, 12))}, b"x" * 12, "4 bytes that belong to no tensor"),
    "bytes left over": ({"a": entry()}, b"x" * 11, "3 bytes that belong to no tensor after 'a'"),
    "truncated data": ({"a": entry()}, b"x" * 5, r"'a': data_offsets \[0, 8\]; expected .* within the 5 bytes"),
    "metadata is no object": ({"__metadata__": [1]}, b"", "`__metadata__` should be an object of strings"),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, b"", "`__metadata__` should be an object of strings"),
}


class TestHostileSafetensors:
    @pytest.mark.parametrize("case", HOSTILE_HEADERS)
    def test_header(self, tmp_path, case):
        header, data, words = HOSTILE_HEADERS[case]
        path = write_raw(tmp_path / "x.safetensors", header, data)
        started = time.process_time()
        with pytest.raises(FormatError, match=words) as caught:
            open_safetensors(path)
        assert time.process_time() - started < 1
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("kept", [0, 7, 8, 20, -1])
    def test_truncated(self, tmp_path, kept):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, some_tensors())
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(FormatError, match=r"x\.safetensors: .*(truncated|data_offsets)"):
            open_safetensors(path)

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 1000])
    def test_header_longer_than_the_file(self, tmp_path, length):
        path = tmp_path / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(FormatError, match=f"its header has {length} bytes, expected at most 2"):
            open_safetensors(path)

    def test_header_larger_than_any_real_one(self, tmp_path):
        path = tmp_path / "x.safetensors"
        with path.open("wb") as file:
            file.write((10**9).to_bytes(8, "little"))
            file.truncate(2 * 10**9)  # sparse
        with pytest.raises(FormatError, match="expected at most 33554432"):
            open_safetensors(path)

    @settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_flipped_bytes_never_crash(self, tmp_path, data):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, some_tensors())
        content = bytearray(path.read_bytes())
        header_length = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header_length - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            opened = open_safetensors(path)
        except FormatError:
            return
        for tensor in opened.values():  # a changed name, digit or metadata can be as good as the original
            assert tensor.read().shape == tensor.shape

    def test_flipping_each_bit_of_a_header_is_what_the_library_says_or_stricter(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, {"a": np.ones((2, 3), "f4"), "b": np.ones(3, "f2")})
        original = path.read_bytes()
        accepted = 0
        for position in range(8 + int.from_bytes(original[:8], "little")):
            for bit in range(8):
                changed = bytearray(original)
                changed[position] ^= 1 << bit
                path.write_bytes(changed)
                try:
                    ours = {name: tensor.read() for name, tensor in open_safetensors(path).items()}
                except FormatError:
                    continue
                theirs = safetensors.numpy.load_file(path)
                assert ours.keys() == theirs.keys()
                assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
                accepted += 1
        assert accepted > 0


class TestShards:
    def save(self, directory, weight_map=None, shards=None):
        shards = shards or {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]}
        arrays = {name: np.full((2, 2), ord(name), "f4") for names in shards.values() for name in names}
        for shard, names in shards.items():
            write_safetensors(directory / shard, {name: arrays[name] for name in names})
        if weight_map is None:
            weight_map = {name: shard for shard, names in shards.items() for name in names}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return arrays

    def test_read(self, tmp_path):
        arrays = self.save(tmp_path)
        assert_same(open_tensors(tmp_path), arrays)

    def test_as_transformers_writes_them(self, base):
        directory = base("llama", max_shard_size="100KB")
        assert len(list(directory.glob("model-*.safetensors"))) > 1
        from tests.helpers import reference

        state = reference.torch_base(directory).state_dict()
        read = open_tensors(directory)
        for name, tensor in read.items():
            np.testing.assert_array_equal(tensor.read(), state[name].numpy())
        assert {name for name in state if name in read} == set(read)

    def test_a_single_file_wins(self, tmp_path):
        self.save(tmp_path)
        write_safetensors(tmp_path / "model.safetensors", {"x": np.ones(1, "f4")})
        assert list(open_tensors(tmp_path)) == ["x"]

    def test_what_the_index_forgets_is_not_dropped(self, tmp_path):
        arrays = self.save(tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
        assert_same(open_tensors(tmp_path), arrays)

    def test_missing_shard(self, tmp_path):
        self.save(tmp_path)
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(FormatError, match=r"the shard model-2\.safetensors is missing"):
            open_tensors(tmp_path)

    def test_missing_tensor(self, tmp_path):
        self.save(tmp_path, {"a": "model-1.safetensors", "z": "model-2.safetensors"})
        with pytest.raises(FormatError, match=r"'z' should be in model-2\.safetensors"):
            open_tensors(tmp_path)

    def test_tensor_in_two_shards(self, tmp_path):
        shards = {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c", "b"]}
        self.save(tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors"}, shards)
        with pytest.raises(FormatError, match=r"'b' isn't listed, and stands in .* and another shard"):
            open_tensors(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "a\\b"]
    )
    def test_index_that_points_outside(self, tmp_path, shard):
        inside = tmp_path / "model"
        inside.mkdir()
        write_safetensors(tmp_path / "secret.safetensors", {"a": np.ones(1, "f4")})
        self.save(inside, {"a": shard})
        with pytest.raises(FormatError, match="points outside the directory"):
            open_tensors(inside)

    @pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 3}, {"a": None}])
    def test_broken_index(self, tmp_path, weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=r"index\.json: "):
            open_tensors(tmp_path)


class TestFileIn:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"looked for model\.safetensors, pytorch_model\.bin"):
            open_tensors(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"looked for adapter_model\.safetensors, adapter_model\.bin"):
            open_tensors(tmp_path, "adapter_model")

    def test_link_out_of_the_directory(self, tmp_path):
        inside = tmp_path / "model"
        inside.mkdir()
        write_safetensors(tmp_path / "secret.safetensors", {"a": np.ones(1, "f4")})
        (inside / "model.safetensors").symlink_to("../secret.safetensors")
        with pytest.raises(FormatError, match=r"a link that leaves the directory, to .*secret"):
            open_tensors(inside)

    def test_link_within_the_directory(self, tmp_path):
        write_safetensors(tmp_path / "real.safetensors", {"a": np.ones(1, "f4")})
        (tmp_path / "model.safetensors").symlink_to("real.safetensors")
        assert list(open_tensors(tmp_path)) == ["a"]

    def test_the_directory_itself_may_be_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        write_safetensors(tmp_path / "real" / "model.safetensors", {"a": np.ones(1, "f4")})
        (tmp_path / "link").symlink_to("real")
        assert list(open_tensors(tmp_path / "link")) == ["a"]

    @pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
    def test_broken_links(self, tmp_path, target):
        (tmp_path / "model.safetensors").symlink_to(target)
        with pytest.raises(FormatError, match="a broken link"):
            open_tensors(tmp_path)

    def test_not_a_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "model.safetensors")  # reading it would block for ever
        with pytest.raises(FormatError, match="expected a regular file"):
            open_tensors(tmp_path)


class TestPickles:
    def test_read(self, tmp_path):
        state = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.arange(3)}
        torch.save(state, tmp_path / "pytorch_model.bin")
        read = open_tensors(tmp_path)
        assert list(read) == ["a", "b", "c"]
        np.testing.assert_array_equal(read["a"].read(), state["a"].numpy())
        assert read["b"].read().dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read["b"].read().astype("f4"), state["b"].float().numpy())
        np.testing.assert_array_equal(read["c"].read(), [0, 1, 2])

    def test_views_and_the_old_container(self, tmp_path):
        whole = torch.randn(4, 6)
        state = {"t": whole.T, "s": whole[1:, ::2]}
        torch.save(state, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
        read = open_tensors(tmp_path, "adapter_model")
        np.testing.assert_array_equal(read["t"].read(), whole.T.numpy())
        np.testing.assert_array_equal(read["s"].read(), whole[1:, ::2].numpy())

    def test_safetensors_win(self, tmp_path):
        torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
        write_safetensors(tmp_path / "adapter_model.safetensors", {"b": np.ones(1, "f4")})
        assert list(open_tensors(tmp_path, "adapter_model")) == ["b"]

    @pytest.mark.parametrize("how", ["plain pickle", "old container", "zip"])
    def test_one_that_would_run_code(self, tmp_path, how):
        path, trace = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
        if how == "plain pickle":
            path.write_bytes(pickle.dumps(RunsCode(str(trace))))
        else:
            torch.save({"a": RunsCode(str(trace))}, path, _use_new_zipfile_serialization=how == "zip")
        with pytest.raises(FormatError, match=r"pytorch_model\.bin: refused by torch's weights-only loader"):
            open_tensors(tmp_path)
        assert not trace.exists()

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not a zip", b"\x80\x02."])
    def test_broken(self, tmp_path, content):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(FormatError, match="refused by torch's weights-only loader"):
            open_tensors(tmp_path)

    @settings(max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_flipped_bytes_never_crash(self, tmp_path, data):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.ones(2, 3), "b": torch.ones(1)}, path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            opened = open_tensors(tmp_path)
        except FormatError:
            return
        for tensor in opened.values():
            assert tensor.read().shape == tensor.shape

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([torch.ones(1)], "expected a mapping of names to tensors, got list"),
            ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' should name a tensor, got dict"),
            ({3: torch.ones(1)}, "3 should name a tensor"),
            ({"a": torch.ones(2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_coo: not supported"),
            ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' is a tensor of torch.complex128"),
        ],
    )
    def test_other_contents(self, tmp_path, content, words):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(FormatError, match=words):
            open_tensors(tmp_path)

    def test_without_torch(self, tmp_path, monkeypatch):
        torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(FormatError, match="torch is not installed; pip install 'xlora-jax"):
            open_tensors(tmp_path)

    def test_safetensors_need_no_torch(self, tmp_path):
        write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(1, "f4")})
        code = (
            "import sys; sys.modules['torch'] = None\n"
            "from pathlib import Path\n"
            "from interop.storage.tensors import open_tensors\n"
            f"print(open_tensors(Path({str(tmp_path)!r}))['a'].read())"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout == "[1.]\n"


class TestFinite:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16])
    def test_reported_with_the_tensors_name(self, tmp_path, bad, dtype):
        array = np.ones((2, 3), dtype)
        array[1, 2] = bad
        with pytest.raises(FormatError, match=r"x\.safetensors: 'layer\.weight' holds 1 NaN or infinite values of 6"):
            require_finite(array, "layer.weight", tmp_path / "x.safetensors")

    def test_passes_through(self, tmp_path):
        array = np.ones(3, "f4")
        assert require_finite(array, "a", tmp_path) is array
        assert require_finite(np.arange(3), "a", tmp_path).tolist() == [0, 1, 2]


def test_from_torch_is_a_copy():
    tensor = torch.ones(3, requires_grad=True)
    array = tensors.from_torch(tensor)
    array[0] = 5
    assert tensor[0] == 1
