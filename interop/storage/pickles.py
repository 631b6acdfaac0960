"""Check of the sizes that a torch file claims against its bytes, before torch allocates or maps any of them.

torch's weights-only loader keeps a pickle from running code, but it trusts the numbers in the pickle. It maps
compressed members as if they were not compressed, reads past a member's end into the next one, and enlarges a storage
that is too small for its tensor. Here the pickle is read with inert stand-ins for torch's classes, so that it yields
only numbers and names.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ClaimError", "check_claims"]

# The pickle of a checkpoint of 50,000 tensors has about 8 MB, without the data.
_MAX_PICKLE_BYTES = 8 * 2**20
_MAX_MEMBERS = 200_000

# The operations of pickle protocols 2 to 5 that torch.save writes. The text operations of protocol 0 are not allowed.
_OPERATIONS = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "EMPTY_DICT",
    "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    "BINPERSID", "NEWOBJ"
))  # fmt: skip
_STORAGES = {
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "UntypedStorage": 1,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "ShortStorage": 2,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "IntStorage": 4,
    "FloatStorage": 4,
    "QInt32Storage": 4,
    "LongStorage": 8,
    "DoubleStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}
# Element types without a storage class of their own; the tensor names its type instead.
_DTYPES = {
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
_OLD_MAGIC = 0x1950A86A20F9469CFC6C


class ClaimError(ValueError):
    """A torch file with wrong sizes, or a file that is not a torch file; the message gives the reason."""


class _StorageClass(NamedTuple):
    item_bytes: int


class _DType(NamedTuple):
    item_bytes: int


class _Storage(NamedTuple):
    key: str
    item_bytes: int
    items: int

    @property
    def bytes(self) -> int:
        return self.item_bytes * self.items


class _Other(NamedTuple):
    """An object without data, or of a kind that is refused later, with its name."""


@dataclass
class _Claims:
    """All sizes that a pickle claims."""

    storages: dict[str, _Storage] = field(default_factory=dict)

    def add_storage(self, saved: Any) -> _Storage:
        kind, storage_class, key, _, count, *views = saved
        if kind != "storage" or not isinstance(storage_class, _StorageClass) or any(views):
            raise ClaimError(f"{kind!r} is no storage")
        storage = _Storage(str(key), storage_class.item_bytes, _size(count))
        if self.storages.setdefault(storage.key, storage).bytes != storage.bytes:
            raise ClaimError(f"the storage {storage.key} has two sizes")
        return storage

    def add_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, item_bytes: int | None = None) -> None:
        if not isinstance(storage, _Storage):
            raise ClaimError("a tensor without a storage")
        item = storage.item_bytes if item_bytes is None else item_bytes
        shape, strides = [_size(size) for size in shape], [_size(stride) for stride in strides]
        if len(shape) != len(strides):
            raise ClaimError(f"a tensor of shape {shape} with strides {strides}")
        count = math.prod(shape)
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else -1
        if (_size(offset) + last + 1) * item > storage.bytes or count * item > storage.bytes:
            raise ClaimError(
                f"a tensor of shape {shape} with strides {strides} in a storage of {storage.bytes} bytes: its elements "
                f"overlap or lie outside; save a contiguous copy of it"
            )


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ClaimError(f"expected a size, got {value!r:.80}")
    return value


def check_claims(path: Path) -> bool:
    """Check the sizes that a torch file claims against its bytes.

    Returns:
        Whether the file is a zip file, whose members can be mapped into memory, or else of the format before torch 1.6.

    Raises:
        ClaimError: a member is compressed, encrypted, overlapping or repeated; a storage and its member differ in size;
            a tensor overlaps itself or leaves its storage; or the pickle names anything but tensors and containers.
    """
    size = path.stat().st_size
    try:
        is_zip = zipfile.is_zipfile(path)
        (_check_zip if is_zip else _check_old)(path, size)
    except ClaimError:
        raise
    except Exception as error:  # zipfile and pickle raise errors of any kind on a broken file
        raise ClaimError(f"{type(error).__name__}: {error!s:.200}") from error
    return is_zip


def _check_zip(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise ClaimError(f"{len(members)} members; expected at most {_MAX_MEMBERS}")
        _check_members(members, size)
        sizes = {member.filename: member.file_size for member in members}
        pickles = [name for name in sizes if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or sizes[pickles[0]] > _MAX_PICKLE_BYTES:
            raise ClaimError(f"expected one data.pkl of at most {_MAX_PICKLE_BYTES} bytes, got {pickles[:3]}")
        content = archive.read(pickles[0])
    claims = _Claims()
    _load(io.BytesIO(content), claims)
    folder = pickles[0].removesuffix("data.pkl")
    for storage in claims.storages.values():
        held = sizes.get(f"{folder}data/{storage.key}")
        if held != storage.bytes:
            raise ClaimError(f"the storage {storage.key} should have {storage.bytes} bytes, its member has {held}")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    end, names = 0, set()
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ClaimError(f"{member.filename!r} is compressed; torch.save writes plain members")
        if member.flag_bits & 0x1:
            raise ClaimError(f"{member.filename!r} is encrypted")
        if member.filename in names:
            raise ClaimError(f"{member.filename!r} is in it twice")
        names.add(member.filename)
        if member.header_offset < end:
            raise ClaimError(f"{member.filename!r} overlaps the member before it")
        end = member.header_offset + 30 + len(member.filename.encode()) + member.file_size
        if end > size:
            raise ClaimError(f"{member.filename!r} is cut off")


def _check_old(path: Path, size: int) -> None:
    """Check the old format: several pickles, then for each storage 8 bytes with the element count, and the elements."""
    claims = _Claims()
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
        if _load(head, claims) != _OLD_MAGIC:
            raise ClaimError("neither a zip file nor one of torch before 1.6")
        _load(head, claims)  # version
        _load(head, claims)  # sizes and endianness of the machine
        _load(head, claims)
        keys = _load(head, claims)
        if sorted(keys) != sorted(claims.storages):
            raise ClaimError("the list of storages isn't that of the tensors")
        position = head.tell()
        for key in keys:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if count != claims.storages[key].items:
                raise ClaimError(f"the storage {key} should have {claims.storages[key].items} elements, not {count}")
            position += 8 + claims.storages[key].bytes
        if position > size:
            raise ClaimError("the storages are cut off")


def _load(file: io.BytesIO, claims: _Claims) -> Any:
    """Return the next object of a pickle, with stand-ins for tensors and their classes."""
    start = file.tell()
    _check_operations(file)
    file.seek(start)
    return _Unpickler(file, claims).load()


def _check_operations(file: io.BytesIO) -> None:
    """Raise ClaimError for unneeded operations, and for a memo larger than the pickle's length allows."""
    most = len(file.getbuffer())
    for operation, argument, _ in pickletools.genops(file):
        if operation.name not in _OPERATIONS:
            raise ClaimError(f"the pickle has an operation {operation.name}, which torch.save doesn't write")
        if operation.name == "LONG_BINPUT" and (argument or 0) > most:
            raise ClaimError("the pickle numbers more objects than it has")


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds only stand-ins. They are new for each pickle, so no pickle can change another's."""

    def __init__(self, file: io.BytesIO, claims: _Claims) -> None:
        super().__init__(file)
        self._claims = claims
        self._known = {("collections", "OrderedDict"): OrderedDict, **_stand_ins(claims)}

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        if found is not None:
            return found
        raise ClaimError(f"the pickle asks for {module}.{name}, which is no part of a tensor")

    def persistent_load(self, saved: Any) -> _Storage:
        return self._claims.add_storage(saved)


def _stand_ins(claims: _Claims) -> Mapping[tuple[str, str], Any]:
    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Other:
        claims.add_tensor(storage, offset, shape, strides)
        return _Other()

    def tensor_of_dtype(
        storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> _Other:
        if not isinstance(dtype, _DType):
            raise ClaimError("a tensor without a dtype")
        claims.add_tensor(storage, offset, shape, strides, dtype.item_bytes)
        return _Other()

    def parameter(data: Any, *rest: Any) -> Any:
        return data

    def other(*rest: Any) -> _Other:
        return _Other()

    def named() -> Iterator[tuple[tuple[str, str], Callable[..., Any] | tuple[int]]]:
        for name, item_bytes in _STORAGES.items():
            yield ("torch", name), _StorageClass(item_bytes)
            yield ("torch.storage", name), _StorageClass(item_bytes)
        for name, item_bytes in _DTYPES.items():
            yield ("torch", name), _DType(item_bytes)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_qtensor"):
            yield ("torch._utils", name), tensor
        yield ("torch._utils", "_rebuild_tensor_v3"), tensor_of_dtype
        yield ("torch._utils", "_rebuild_parameter"), parameter
        # The reader refuses these by layout or element type, after torch has made them.
        yield ("torch._utils", "_rebuild_sparse_tensor"), other
        for name in ("torch.Size", "torch.per_tensor_affine", "torch.device"):
            module, _, last = name.rpartition(".")
            yield (module, last), other
        yield ("torch.serialization", "_get_layout"), other

    return dict(named())
