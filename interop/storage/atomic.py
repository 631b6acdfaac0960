"""Replacing of a directory as a whole: a reader, or a kill, at any moment finds the old directory or the new one.

Files are written into a hidden sibling, `.<name>.<random>.partial`, and flushed to disk. Then the sibling takes the
directory's place in one system call. If the target does not exist or is empty, that call is `rename`. Otherwise the two
directories are exchanged (on Linux: `renameat2` with RENAME_EXCHANGE), and the old one, now hidden, is removed.

If the system or the file system can't exchange, two renames are used. A kill between them leaves both directories
complete, under hidden names, and none at the target. Any kill leaves the hidden sibling behind; it can be deleted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from xlora_jax.atomic import flush_entry

__all__ = ["check_replaceable", "replacing"]

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def replacing(directory: str | os.PathLike[str], *, owned: Sequence[str]) -> Iterator[Path]:
    """Yield an empty directory, which becomes `directory` when the block ends, and is deleted if the block raises.

    Args:
        directory: directory to create or replace. Its parents are created.
        owned: glob patterns of the entries that an earlier save may have written. An existing directory with any other
            entry is not replaced.

    Raises:
        FileExistsError: `directory` is a file, or holds entries that match none of `owned`.
    """
    target = Path(directory).expanduser().resolve()
    check_replaceable(target, owned=owned)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        check_replaceable(target, owned=owned)
        _put_in_place(partial, target)
        flush_entry(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the unfinished directory, or the old one after an exchange


def check_replaceable(target: Path, *, owned: Sequence[str]) -> None:
    """Check that :func:`replacing` can create or replace a directory. Nothing is written.

    Raises:
        FileExistsError: `target` is a file, or holds entries that match none of `owned`.
        OSError: the directory that it is to be in is none, or can't be written to.
    """
    parent = next(folder for folder in target.parents if folder.exists() or folder.is_symlink())
    if not parent.is_dir():
        raise NotADirectoryError(f"{target}: {parent} is not a directory; choose another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: {parent} can't be written to; choose another place, or change its mode.")
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: a file stands there; choose another directory.")
    foreign = sorted(entry.name for entry in target.iterdir() if not any(fnmatchcase(entry.name, p) for p in owned))
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise FileExistsError(
            f"{target}: the directory is to be replaced as a whole, but holds what this save doesn't write: {shown}. "
            f"Choose a new directory, or move these away."
        )


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if _exchange(partial, target):
        return
    aside = partial.with_suffix(".old")
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories; return False if the system or the file system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            flush_entry(Path(folder, name))
        flush_entry(Path(folder))
