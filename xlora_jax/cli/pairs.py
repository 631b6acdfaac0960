"""Options of the form NAME=PATH that can be given several times."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["named"]


def named(entries: Sequence[str], option: str) -> dict[str, str]:
    """Give the paths by name, in the order of ``entries``.

    Raises:
        ValueError: an entry of another form, or a name given twice.
    """
    paths: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option}: expected NAME=PATH, got {entry!r}")
        if name in paths:
            raise ValueError(f"{option}: the name {name!r} is given twice")
        paths[name] = path
    return paths
