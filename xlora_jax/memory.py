"""Checks of the available memory, so that a request too large for the machine is refused before it starts."""

from __future__ import annotations

import os

import jax

__all__ = ["check_fits", "in_gib"]


def check_fits(needed: int, subject: str, advice: str) -> None:
    """Check that a number of bytes would fit into the memory of an idle machine.

    Args:
        needed: number of bytes.
        subject: noun phrase for the thing that needs them.
        advice: imperative sentence on how to need less.

    Raises:
        ValueError: ``needed`` exceeds the memory of all devices together (on a CPU, of the machine).
    """
    there = _total()
    if there is not None and needed > there:
        raise ValueError(f"{subject} would take {in_gib(needed)}, and there are {in_gib(there)} in all: {advice}")


def in_gib(count: int) -> str:
    """Return a number of bytes as text in GiB."""
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
