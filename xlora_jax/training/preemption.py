"""Stop a run at SIGTERM, after the step that is running."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax

__all__ = ["Preemption"]


class Preemption:
    """Whether SIGTERM has come; a context manager, which puts the old handler back."""

    def __init__(self) -> None:
        self._came = False
        self._old: Any = None
        # Python runs handlers in the main thread, and allows none to be set from others.
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
        """Whether to stop after this step; several processes agree on the step."""
        if jax.process_count() == 1:
            return self._came
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
