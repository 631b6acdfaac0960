"""Reading of files from an untrusted directory: links must not lead out of it, and JSON must be an object."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from interop.storage.errors import FormatError, brief
from xlora_jax.atomic import replace_json

__all__ = ["file_in", "parse_json", "read_json", "write_json"]

# Larger than any real file (an index of 100,000 tensors has 10 MB), and small enough to parse in about a second.
_MAX_JSON_BYTES = 32 * 2**20


def file_in(directory: Path, name: str) -> Path | None:
    """Return the path of the regular file `name` in `directory`, or None if there is no such entry.

    Symlinks are followed if they end in the directory. A snapshot in the hub's cache consists of links to the `blobs`
    of the same repository, so these are followed too.

    Raises:
        FormatError: the name contains a path, or the entry is a link that is broken or leaves the directory, or is not
            a regular file.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FormatError(f"{directory}: {name!r} points outside the directory; expected a plain file name.")
    path = directory / name
    try:
        if not path.is_symlink() and not path.exists():
            return None
    except (OSError, ValueError) as error:
        raise FormatError(f"{directory}: {brief(name)} is no name of a file ({error}).") from error
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FormatError(f"{path}: a broken link ({error}); download or copy the file again.") from error
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise FormatError(
            f"{path}: a link that leaves the directory, to {real}; copy the file itself into the directory."
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise FormatError(f"{path}: expected a regular file.")
    return path


def _roots(directory: Path) -> Iterator[Path]:
    root = directory.resolve()
    yield root
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            yield parent.parent / "blobs"


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FormatError: the file is too large, is not JSON or not an object, repeats a key, or contains NaN or infinity.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise FormatError(f"{path}: {size} bytes of JSON; expected at most {max_bytes}.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `text`; `where` names it in errors. Raise FormatError as `read_json` does."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, in the order of its keys."""
    replace_json(path, value, ensure_ascii=False, allow_nan=False)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
