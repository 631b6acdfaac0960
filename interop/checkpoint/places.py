"""Search for the experts of a checkpoint on disk."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from interop.checkpoint.layouts import XLORA_CONFIG_FILE
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json, write_json
from interop.storage.hub import is_hub_id

__all__ = ["find_expert", "find_original_expert", "folders_of_experts", "repoint"]

_MAX_PATH = 4096
_MAX_NAME = 200


def find_expert(directory: Path, path: str) -> str | None:
    """Return the place of the expert that a checkpoint in PEFT's layout gives as `path`, or None if it is not found.

    The folder of the checkpoint that matches the end of the path comes first, because the checkpoint may have been
    moved with its experts. Then comes the path itself, if it is a directory; then a hub id.
    """
    # No file system has longer paths or names, or names with a null character.
    if len(path) > _MAX_PATH:
        raise FormatError(f"{directory}: an expert's path has {len(path)} characters; expected at most {_MAX_PATH}.")
    parts = Path(path).parts
    # The root and `..` lead out of the checkpoint, so only the parts after them are searched for.
    start = 1 + max((i for i, part in enumerate(parts) if part in (os.sep, "..")), default=-1)
    try:
        for first in range(start, len(parts)):
            inside = directory.joinpath(*parts[first:])
            # The folders 0, 1, ... that PEFT writes into a checkpoint hold no adapters.
            plausible = not (first == len(parts) - 1 and parts[first].isdigit())
            if plausible and (inside / ADAPTER_CONFIG_FILE).is_file():
                return str(inside)
        if Path(path).is_dir():
            return path
    except (OSError, ValueError) as error:
        raise FormatError(f"{directory}: the expert's path {brief(path)} can't be looked up ({error}).") from error
    return path if is_hub_id(path) else None


def find_original_expert(directory: Path, name: str, path: object) -> str | None:
    """Return the place of an expert in the original layout or in mistral.rs's, or None if it is not found."""
    if name != Path(name).name or name == ".." or len(os.fsencode(name)) > _MAX_NAME:
        raise FormatError(f"{directory}: the expert {name!r} is no folder's name.")
    if (directory / name / ADAPTER_CONFIG_FILE).is_file():
        return str(directory / name)
    if (directory / f"{name}.json").is_file():
        return str(directory / f"{name}.safetensors")
    return find_expert(directory, path) if isinstance(path, str) and path else None


def folders_of_experts(directory: Path) -> list[str]:
    """Return the experts' folders sorted by name, the original loader's order if the settings name no experts."""
    names = sorted(entry.name for entry in directory.iterdir() if (entry / ADAPTER_CONFIG_FILE).is_file())
    if names:
        warnings.warn(
            f"{directory}: {XLORA_CONFIG_FILE} doesn't name the experts; taken in the order of their folders, "
            f"{listed(names)}. If they were trained in another order, pass adapters= in that order.",
            UserWarning,
            stacklevel=4,
        )
    return names


def repoint(directory: str | os.PathLike[str]) -> None:
    """Rewrite the experts' paths of a checkpoint in PEFT's layout after a move, so that PEFT finds them.

    Raises:
        FormatError: the directory is not a checkpoint in PEFT's layout, or an expert is neither in the directory nor at
            its path.
    """
    directory = Path(directory).resolve()
    path = file_in(directory, ADAPTER_CONFIG_FILE)
    content = {} if path is None else read_json(path)
    if path is None or content.get("peft_type") != "XLORA" or not isinstance(content.get("adapters"), dict):
        raise FormatError(f"{directory}: no X-LoRA checkpoint in PEFT's layout.")
    found = {name: find_expert(directory, str(place)) for name, place in content["adapters"].items()}
    lost = [f"{name} ({content['adapters'][name]})" for name, place in found.items() if place is None]
    if lost:
        raise FormatError(f"{path}: these experts are not to be found: {listed(lost)}. Copy them into {directory}.")
    content["adapters"] = {
        name: str(Path(place).resolve()) if Path(place).is_dir() else place for name, place in found.items() if place
    }
    write_json(path, content)
