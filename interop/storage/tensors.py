"""Named tensors in files: safetensors (single and sharded) and torch pickles, read strictly, lazily and safely.

No file is trusted. The header of a safetensors file is checked in full before any tensor is read, a pickle is read by
torch's weights-only loader, and the index of a sharded checkpoint can't point outside its directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, parse_json, read_json
from interop.storage.pickles import check_claims
from xlora_jax.atomic import replacing_file

__all__ = [
    "LazyTensor",
    "from_torch",
    "open_file",
    "open_pickle",
    "open_safetensors",
    "open_tensors",
    "read_finite",
    "require_finite",
    "to_torch",
    "write_safetensors",
]

# safetensors' names of the element types, https://github.com/huggingface/safetensors#format
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_WEIGHT_DTYPES = tuple(_DTYPES[name] for name in ("F32", "BF16", "F16", "F64"))

_MAX_HEADER_BYTES = 32 * 2**20
_MAX_DIMENSIONS = 32  # numpy's limit, up to version 2


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. Its dtype and shape are known; its values are read on demand and not kept.

    Attributes:
        name: key of the tensor in the file.
        file: path of the file, for messages.
        dtype: stored dtype.
        shape: stored shape.
        load: function that reads the values.
    """

    name: str
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    def read(self) -> NDArray[Any]:
        """Return the values, in their own memory."""
        return self.load()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the values, for `numpy.asarray`."""
        return self.load().astype(self.dtype if dtype is None else dtype, copy=False)


def open_tensors(directory: Path, stem: str = "model") -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint or adapter in a directory, in stored order, without reading their values.

    The first existing file is read, in the order of transformers: `{stem}.safetensors`, its sharded form
    `{stem}.safetensors.index.json`, then torch's pickles (`{stem}.bin` and its index; `pytorch_model` for the stem
    `model`).

    Raises:
        FileNotFoundError: none of these files exists.
        FormatError: a file is broken or hostile; see `open_safetensors`, `open_pickle`, `file_in`.
    """
    pickled = "pytorch_model" if stem == "model" else stem
    names = (f"{stem}.safetensors", f"{pickled}.bin")
    for name in names:
        single = file_in(directory, name)
        if single is not None:
            return open_file(single)
        index = file_in(directory, f"{name}.index.json")
        if index is not None:
            return _open_sharded(directory, index)
    raise FileNotFoundError(f"{directory}: no weights; looked for {', '.join(names)} and their .index.json.")


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one file: safetensors if its extension is `.safetensors`, else a torch pickle."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path)


def _open_sharded(directory: Path, index_path: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: expected an object `weight_map` of tensor to file, got {brief(weight_map)}.")
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise FormatError(f"{index_path}: {name!r} should name a file, got {brief(shard)}.")
        if shard not in shards:
            path = file_in(directory, shard)
            if path is None:
                raise FormatError(f"{index_path}: the shard {shard} is missing; download it into {directory}.")
            shards[shard] = open_file(path)
        if name not in shards[shard]:
            raise FormatError(f"{index_path}: {name!r} should be in {shard}, but that file doesn't hold it.")
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if tensors.setdefault(name, tensor).file != tensor.file and name not in weight_map:
                raise FormatError(f"{index_path}: {name!r} isn't listed, and stands in {shard} and another shard.")
    return tensors


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file in stored order, after a check of its whole header.

    Raises:
        FormatError: the file is truncated, its header is broken or repeats a key, a dtype is unknown, a shape disagrees
            with its bytes, or ranges overlap, leave gaps or leave the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"{path}: truncated; expected 8 bytes of header length, got {len(prefix)}.")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise FormatError(
                f"{path}: truncated or no safetensors file; it says that its header has {length} bytes, expected at "
                f"most {min(size - 8, _MAX_HEADER_BYTES)} (the file has {size})."
            )
        header = file.read(length)
    if not header.startswith(b"{"):
        raise FormatError(f"{path}: no safetensors file; its header should start with '{{', got {header[:1]!r}.")
    entries = parse_json(header, f"{path} (header)")
    _check_metadata(entries.pop("__metadata__", {}), path)
    start, data_size = 8 + length, size - 8 - length
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, LazyTensor] = {}
    for name, entry in entries.items():
        dtype, shape, begin, end = _checked_entry(entry, data_size, f"{path}: {name!r}")
        ranges.append((begin, end, name))
        tensors[name] = LazyTensor(
            name, path, dtype, shape, _safetensors_loader(path, name, dtype, shape, start + begin)
        )
    _check_ranges(sorted(ranges), data_size, path)
    return {name: tensors[name] for _, _, name in sorted(ranges)}


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: `__metadata__` should be an object of strings, got {brief(metadata)}.")


def _checked_entry(entry: object, data_size: int, where: str) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected an object of dtype, shape and data_offsets, got {brief(entry)}.")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{where}: dtype {brief(entry['dtype'])}; known are {', '.join(_DTYPES)}.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{where}: shape {brief(shape)}; expected up to {_MAX_DIMENSIONS} sizes, none negative.")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise FormatError(
            f"{where}: data_offsets {brief(offsets)}; expected [begin, end] within the {data_size} bytes of data."
        )
    needed, got = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != got:
        raise FormatError(
            f"{where}: shape {brief(shape)} of {entry['dtype']} takes {needed} bytes, but the file gives it {got}."
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(ranges: list[tuple[int, int, str]], data_size: int, path: Path) -> None:
    position, before = 0, "the start of the data"
    for begin, end, name in ranges:
        if begin < position:
            raise FormatError(f"{path}: the bytes of {name!r} overlap those of {before}.")
        if begin > position:
            raise FormatError(
                f"{path}: {begin - position} bytes that belong to no tensor between {before} and {name!r}."
            )
        position, before = end, repr(name)
    if position != data_size:
        raise FormatError(f"{path}: {data_size - position} bytes that belong to no tensor after {before}.")


def _safetensors_loader(
    path: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int
) -> Callable[[], NDArray[Any]]:
    def load() -> NDArray[Any]:
        count = math.prod(shape) * dtype.itemsize
        data = np.fromfile(path, np.uint8, count, offset=offset)
        if data.size != count:
            raise FormatError(f"{path}: the file got shorter while {name!r} was read.")
        return data.view(dtype).reshape(shape)

    return load


# Tied weights share a storage, but each is read as its own array: embedding, output head, a decoder's copy.
_MAX_SHARING = 4
_FREE_BYTES = 64 * 2**20


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a `.bin` or `.pt` file, read by torch's weights-only loader, which runs no code.

    Raises:
        FormatError: torch is not installed, or the file is broken, needs to run code, or is not a mapping of names to
            dense tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise FormatError(
            f"{path}: a torch pickle, and torch is not installed; pip install 'xlora-jax[torch]', or convert the file "
            f"to safetensors elsewhere."
        ) from error
    try:
        # Only the zip format can be mapped into memory; torch before 1.6 wrote another format.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=check_claims(path))
    except Exception as error:  # the loader raises errors of any kind on a broken or hostile pickle
        raise FormatError(
            f"{path}: refused by torch's weights-only loader or the check of sizes before it, as broken or because it "
            f"wants to run code; ask for a safetensors file ({brief(str(error), 400)})."
        ) from error
    if not isinstance(state, dict):
        raise FormatError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}.")
    tensors = {}
    total = 0
    for name, tensor in dict.items(state):  # a file can give a dict attributes, such as another `items`
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{path}: {brief(name)} should name a tensor, got {type(tensor).__name__}.")
        dtype = _DTYPES.get(_TORCH_DTYPES.get(str(tensor.dtype), ""))
        if dtype is None or tensor.layout != torch.strided or tensor.is_quantized:
            raise FormatError(f"{path}: {name!r} is a tensor of {tensor.dtype}, {tensor.layout}: not supported.")
        tensors[name] = LazyTensor(name, path, dtype, tuple(tensor.shape), _torch_loader(tensor, dtype))
        total += tensor.numel() * dtype.itemsize
    most = max(_MAX_SHARING * path.stat().st_size, _FREE_BYTES)
    if total > most:
        raise FormatError(
            f"{path}: its tensors share storages so often that they have {total} bytes together; expected at most "
            f"{most}. Save it without the copies."
        )
    return tensors


_TORCH_DTYPES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.float32": "F32",
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.complex64": "C64",
}


def _torch_loader(tensor: Any, dtype: np.dtype[Any]) -> Callable[[], NDArray[Any]]:
    return lambda: from_torch(tensor, dtype)


def from_torch(tensor: Any, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return a NumPy copy of a dense torch tensor, bit for bit (bfloat16 is `ml_dtypes`')."""
    import torch

    if dtype is None:
        dtype = _DTYPES[_TORCH_DTYPES[str(tensor.dtype)]]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: NDArray[np.uint8] = flat.view(torch.uint8).numpy().copy()
    return data.view(dtype).reshape(tuple(tensor.shape))


def to_torch(array: NDArray[Any]) -> Any:
    """Return a torch tensor with a copy of the array's bits; the inverse of `from_torch`."""
    import torch

    names = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
    dtype = getattr(torch, names[_DTYPE_NAMES[array.dtype]].removeprefix("torch."))
    flat = np.array(array, order="C").reshape(-1)
    return torch.from_numpy(flat.view(np.uint8)).view(dtype).reshape(array.shape)


def require_finite(array: NDArray[Any], name: str, file: Path) -> NDArray[Any]:
    """Return the array; raise FormatError, with the tensor's name and a count, if it holds NaN or infinity."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise FormatError(
            f"{file}: {name!r} holds {bad} NaN or infinite values of {array.size}; train or save it again."
        )
    return array


def read_finite(tensor: LazyTensor) -> NDArray[Any]:
    """Return the values of a weight; raise FormatError for a non-floating dtype, and for NaN and infinity."""
    if tensor.dtype not in _WEIGHT_DTYPES:
        known = listed(map(str, _WEIGHT_DTYPES))
        raise FormatError(f"{tensor.file}: {tensor.name!r} has dtype {tensor.dtype}; expected one of {known}.")
    return require_finite(tensor.read(), tensor.name, tensor.file)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, NDArray[Any] | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, in the order of the safetensors library, with one tensor in memory at a time.

    Tensors are sorted by element size, largest first, so that every tensor is aligned, and then by name.

    Args:
        path: file to create or replace; to replace a directory as a whole, see `interop.storage.atomic`.
        tensors: name to array, or to a lazy tensor that is read just before it is written.
        metadata: strings by name; None means `{"format": "pt"}`, which transformers requires.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise FormatError(f"{path}: {name!r} has dtype {tensor.dtype}, which safetensors can't hold.")
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = tensors[name]
            array = tensor.read() if isinstance(tensor, LazyTensor) else tensor
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
