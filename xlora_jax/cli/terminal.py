r"""Terminal output. All of it passes through this module, which makes control characters visible.

A name in a file or a generated token can contain escape sequences, which move the cursor, set the window's title, or
hide and fake lines. They are printed as escapes such as ``\x1b``. Written files, such as report.json, stay exact.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, TextIO

import typer
from rich.text import Text

__all__ = ["cell", "say", "show_warnings", "visible"]

# Control characters except tab and newline, halves of surrogate pairs, separators that some terminals treat as line
# ends, and text-direction overrides.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Return the text with control characters as ``\xNN`` or ``\uNNNN``, except tabs and newlines."""
    return _HIDDEN.sub(lambda match: _escaped(ord(match[0])), str(text))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: object, *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """Print text to standard output or standard error; ``style`` goes to :func:`typer.secho`."""
    typer.secho(visible(text), err=err, nl=nl, **style)


def cell(text: object, style: str = "") -> Text:
    """Return the text as a cell or title of a rich table, with markup not interpreted."""
    return Text(visible(text), style=style)


def show_warnings() -> None:
    """Print warnings from now on as notes, without file and line of the code."""

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
