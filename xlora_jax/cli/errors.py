"""Error handling of every command: an error becomes one line on standard error and an exit code."""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

import typer

from xlora_jax.cli.terminal import say

__all__ = ["EXIT_CODES", "in_one_line"]

_TRACEBACK = "XLORA_JAX_TRACEBACK"
_INTERRUPTED = 130  # 128 + SIGINT, as in shells

EXIT_CODES = (
    "Exit codes: 0, done (also a training that SIGTERM stopped: it is saved, and the same command goes on); 1, an "
    "error, in one line on standard error (of inspect also: something would be refused); 2, wrong usage; 130, "
    "interrupted. "
    f"With {_TRACEBACK}=1 an error shows its traceback too."
)
# The messages of these errors are written for users. For other errors the type is shown too.
_EXPLAINED = (ValueError, OSError, TypeError, ImportError, NotImplementedError, ArithmeticError, MemoryError)


def in_one_line(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for the function of a command, which reports errors in one line.

    An error ends the command with exit code 1 and a line ``xlora-jax COMMAND: error: ...``; an interrupt ends it with
    130.

    Args:
        command: name of the command.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            shown = bool(os.environ.get(_TRACEBACK))
            if not shown:
                # orbax logs a traceback for every thread that an error passes through.
                logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
            try:
                function(*arguments, **options)
            except (typer.BadParameter, typer.Exit, typer.Abort):
                raise
            except KeyboardInterrupt:
                say(f"xlora-jax {command}: interrupted", err=True)
                raise typer.Exit(_INTERRUPTED) from None
            except Exception as error:
                if shown:
                    say("".join(traceback.format_exception(error)), err=True)
                say(f"xlora-jax {command}: error: {_line(error)}", err=True)
                raise typer.Exit(1) from None

        return run

    return decorate


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, _EXPLAINED) and text:
        return text
    return " ".join(filter(None, (f"{type(error).__name__}:", text, f"({_TRACEBACK}=1 shows where)")))
