"""The one exception that reading and writing files of others raises, and how its messages quote."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FormatError", "brief", "listed"]

_MOST = 4000


class FormatError(ValueError):
    """A file, directory or setting that can't be used as it is: broken, hostile, or of a kind that isn't supported.

    The message names the file or adapter, the tensor or field, what was expected, what was found, and what to do. It is
    cut where a name from a file makes it longer than anybody reads.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _MOST else message[:_MOST] + "...")


def brief(value: object, most: int = 120) -> str:
    """A value for a message, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def listed(items: Iterable[str]) -> str:
    """The first few, quoted, for a message."""
    quoted = [brief(item) for item in items]
    return ", ".join(quoted[:8]) + (f" and {len(quoted) - 8} more" if len(quoted) > 8 else "")
