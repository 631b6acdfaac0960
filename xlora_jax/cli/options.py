"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Adapters",
    "Base",
    "Quantize",
    "Quiet",
    "held_out_paths",
    "json_object",
    "named_paths",
    "read_settings_file",
]

Base = Annotated[str, typer.Option("--base", help="HF base model: directory or hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="An expert: PEFT LoRA directory or hub id. Repeatable, in the checkpoint's order; replaces its paths.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="Keep the base's kernels in fewer bits: int8, int4 or nf4. Default: in the dtype."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def named_paths(entries: Sequence[str] | None, option: str, value: str = "PATH") -> dict[str, str]:
    """Return a mapping of names to paths, or to other values, from NAME=PATH entries, in their order.

    Raises:
        ValueError: an entry has another form, or a name is given twice.
    """
    paths: dict[str, str] = {}
    for entry in entries or ():
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option}: expected NAME={value}, got {entry!r}")
        if name in paths:
            raise ValueError(f"{option}: the name {name!r} is given twice")
        paths[name] = path
    return paths


def held_out_paths(entries: Sequence[str] | None) -> dict[str, str]:
    """Return held-out data by name; a path without a name is called ``eval``."""
    return named_paths([entry if "=" in entry else f"eval={entry}" for entry in entries or ()], "--eval")


def json_object(text: str, option: str) -> dict[str, Any]:
    """Return the JSON object in the text of an option.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option}: expected a JSON object, got {text[:200]!r} ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option}: expected a JSON object, got {text[:200]!r}")
    return values


_FLOAT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a settings file: YAML, or JSON, which is YAML too.

    Raises:
        ValueError: the file is not a mapping of names to values.
        OSError: the file can't be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Loader that reads numbers as YAML 1.2. PyYAML follows YAML 1.1, in which `1e-3` is text."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML or JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: expected a mapping of names to values, got {str(values)[:100]!r}")
    return values
