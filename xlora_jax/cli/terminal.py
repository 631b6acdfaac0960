r"""The one place where text leaves for the terminal: control characters from names, paths and models become visible.

A name in a file or a generated token can hold escape sequences, which move the cursor, set the window's title, or hide
and fake lines. They are printed as ``\x1b`` and the like. Files that are written, such as report.json, stay exact.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, TextIO

import typer
from rich.text import Text

__all__ = ["cell", "say", "show_warnings", "visible"]

# Control characters but for tab and newline, halves of surrogate pairs, separators that some terminals take for line
# ends, and overrides of the direction of text.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Return the text with its control characters as ``\xNN`` or ``\uNNNN``; tabs and newlines stay."""
    return _HIDDEN.sub(lambda match: _escaped(ord(match[0])), str(text))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: object, *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """Print text to standard output or standard error; ``style`` is that of :func:`typer.secho`."""
    typer.secho(visible(text), err=err, nl=nl, **style)


def cell(text: object, style: str = "") -> Text:
    """Return a cell or title of a rich table: the text as it is, without markup."""
    return Text(visible(text), style=style)


def show_warnings() -> None:
    """Print warnings from now on as notes, without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"note: {message}", err=True)

    warnings.showwarning = show
