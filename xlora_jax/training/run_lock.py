"""Lock on a run's directory. If two processes train into one directory, the second is refused."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RunLockedError", "run_lock"]

_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLockedError(OSError):
    """Another process is training into the directory. The message names its pid and host."""


@contextmanager
def run_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a run's directory. The operating system releases it when the process ends, even by a crash.

    Args:
        directory: path of the run, created if missing. The file ``.lock`` stays there after the run; by itself it locks
            nothing.

    Raises:
        RunLockedError: another process, or another run in this process, holds the lock.
        OSError: the directory can't be written to.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    path = Path(directory) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunLockedError(
                f"{directory}: another process is training into this directory: {_holder(descriptor)}. Wait for it, "
                f"end it, or give another output directory."
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error}); see to it that no other process trains into "
                f"{directory}.",
                UserWarning,
                stacklevel=3,
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"pid {int(holder['pid'])} on host {str(holder['host'])[:100]}"
    except (ValueError, TypeError, LookupError, RecursionError):  # the holder has not written its name yet
        return "its pid is not known"
