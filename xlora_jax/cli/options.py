"""Options that several commands share, and the values that they take."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Adapters", "Base", "Quiet", "json_object", "named_paths", "read_settings_file"]

Base = Annotated[str, typer.Option("--base", help="HF base model: directory or hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="An expert: PEFT LoRA directory or hub id. Repeatable, in the checkpoint's order; replaces its paths.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def named_paths(entries: Sequence[str] | None, option: str) -> dict[str, str]:
    """Return the paths of NAME=PATH entries by name, in the order of ``entries``.

    Raises:
        ValueError: an entry of another form, or a name given twice.
    """
    paths: dict[str, str] = {}
    for entry in entries or ():
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option}: expected NAME=PATH, got {entry!r}")
        if name in paths:
            raise ValueError(f"{option}: the name {name!r} is given twice")
        paths[name] = path
    return paths


def json_object(text: str, option: str) -> dict[str, Any]:
    """Return the JSON object that an option holds.

    Raises:
        ValueError: text that is no JSON object.
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
    """Read a file of settings: YAML, or JSON, which is YAML too.

    Raises:
        ValueError: not a mapping of names to values.
        OSError: the file can't be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: version 1.1, which PyYAML follows, takes `1e-3` for text."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML or JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: expected a mapping of names to values, got {str(values)[:100]!r}")
    return values
