"""The kind of device that programs are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

__all__ = ["compile_for", "target_backend"]

_target: ContextVar[str | None] = ContextVar("target_backend", default=None)


def target_backend() -> str:
    """Return ``cpu``, ``gpu`` or ``tpu``: the backend that functions traced now will run on."""
    return _target.get() or jax.default_backend()


@contextmanager
def compile_for(backend: str) -> Iterator[None]:
    """Trace functions for ``cpu``, ``gpu`` or ``tpu`` within a ``with`` block, whatever devices the machine has.

    For compiling ahead of time. A function that was traced earlier keeps its program.
    """
    token = _target.set(backend)
    try:
        yield
    finally:
        _target.reset(token)
