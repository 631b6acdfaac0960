"""How much memory there is, to refuse a request that no machine of this size can meet before it is begun."""

from __future__ import annotations

import os

import jax

__all__ = ["check_fits", "in_gib"]


def check_fits(needed: int, subject: str, advice: str) -> None:
    """Check that so many bytes could fit into an empty machine.

    Args:
        needed: bytes.
        subject: noun phrase of the thing that needs them.
        advice: imperative: how to need less.

    Raises:
        ValueError: they are more than all devices have together (on a CPU, than the machine has).
    """
    there = _total()
    if there is not None and needed > there:
        raise ValueError(f"{subject} would take {in_gib(needed)}, and there are {in_gib(there)} in all: {advice}")


def in_gib(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 2**30:.1f} GiB" if count < 2**60 else f"{count >> 30} GiB"


def _total() -> int | None:
    devices = jax.devices()
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return int(limit) * len(devices)
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count())
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
