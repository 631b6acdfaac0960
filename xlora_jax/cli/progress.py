"""Progress of long work, on standard error if that is a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from xlora_jax.cli.terminal import visible

__all__ = ["tracked", "working"]

T = TypeVar("T")


@contextmanager
def working(message: str, *, quiet: bool) -> Iterator[None]:
    """Show a spinner with a message during the block; ``quiet`` hides the spinner and all notes."""
    if quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(visible(message), spinner="dots"):
        yield


def tracked(items: Iterable[T], message: str, *, total: int, quiet: bool) -> Iterable[T]:
    """Iterate over the items with a progress bar."""
    console = Console(stderr=True)
    return track(items, visible(message), total, console=console, disable=quiet or not console.is_terminal)
