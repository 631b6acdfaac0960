"""The exception for files that can't be used, and helpers that quote values in its messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FormatError", "brief", "listed"]

_MOST = 4000


class FormatError(ValueError):
    """A file, directory or setting that can't be used: broken, hostile or not supported.

    The message names the file or adapter, the tensor or field, the expected value, the value found, and the next step.
    An overlong message, caused by a long name in a file, is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _MOST else message[:_MOST] + "...")


def brief(value: object, most: int = 120) -> str:
    """Return a value as text for a message, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def listed(items: Iterable[str]) -> str:
    """Return the first few items, quoted, for a message."""
    quoted = [brief(item) for item in items]
    return ", ".join(quoted[:8]) + (f" and {len(quoted) - 8} more" if len(quoted) > 8 else "")
