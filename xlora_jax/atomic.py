"""Files that are replaced as a whole: a reader finds the old content or the new content, never half of one.

A new file is created beside the target, under a random hidden name, exclusively and without following links. Then it is
renamed. So no data goes through a planted link, neither at the temporary name nor at the final one.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = [
    "check_writable",
    "flush_entry",
    "open_to_append",
    "read_json_object",
    "replace_json",
    "replace_text",
    "replacing_file",
]

_MAX_JSON_BYTES = 2**20
# Windows has no O_NOFOLLOW; there O_EXCL alone keeps an existing link from being opened.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def replacing_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a new binary file that replaces ``path`` when the block ends, and is deleted if the block raises.

    Args:
        path: file to create or replace. A link there is replaced, not followed.
        durable: whether to flush the file and its directory to disk, so that a power cut leaves the old content or the
            new content.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.partial")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable:
        flush_entry(target.parent)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as UTF-8, in the way of :func:`replacing_file`.

    Raises:
        ValueError: the text holds half of a surrogate pair, which no UTF-8 file can.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(error.start - 40, 0) : error.start + 40]
        raise ValueError(
            f"{path}: expected text, got half of a surrogate pair in {around!a}: rename what has it in its name"
        ) from error
    with replacing_file(path) as file:
        file.write(content)


def replace_json(path: str | os.PathLike[str], value: Mapping[str, Any], **options: Any) -> None:
    """Write a JSON object, indented; ``options`` are those of :func:`json.dumps`."""
    replace_text(path, json.dumps(value, indent=2, **options) + "\n")


def read_json_object(path: str | os.PathLike[str], max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object that this library wrote.

    Args:
        path: file to read.
        max_bytes: a larger file is refused.

    Raises:
        ValueError: the file is cut off, holds something else, or is far too large; the message names it.
    """
    target = Path(path)
    if target.stat().st_size > max_bytes:
        raise ValueError(f"{target}: expected at most {max_bytes} bytes of JSON, got {target.stat().st_size}")
    try:
        value = json.loads(target.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{target}: expected a JSON object; the file is damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{target}: expected a JSON object, got {type(value).__name__}")
    return value


def open_to_append(path: str | os.PathLike[str]) -> IO[str]:
    """Open a text file for appending, or create it.

    Raises:
        OSError: ``path`` is a link, or can't be opened.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o666)
    return os.fdopen(descriptor, "a", encoding="utf-8")


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Create a directory if need be, and check that files can be written to it.

    Raises:
        OSError: it can't be created or written to.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    probe = target / f".writable-{uuid.uuid4().hex}"
    with replacing_file(probe, durable=False) as file:
        file.write(b"?")
    probe.unlink()


def flush_entry(path: str | os.PathLike[str]) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
