"""Stop a run on SIGTERM, after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax

__all__ = ["Preemption"]


class Preemption:
    """Record of whether SIGTERM was received; a context manager that restores the old handler."""

    def __init__(self) -> None:
        self._came = False
        self._old: Any = None
        # Python runs handlers in the main thread, and lets no other thread set one.
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if self._main and jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def asked(self, step: int) -> bool:
        """Return whether to stop after this step; all processes agree on the step."""
        if jax.process_count() == 1:
            return self._came
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
