"""Find the experts of a checkpoint on disk."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from interop.checkpoint.layouts import XLORA_CONFIG_FILE
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json, write_json
from interop.storage.hub import is_hub_id

_MAX_PATH = 4096
_MAX_NAME = 200


def find_expert(directory: Path, path: str) -> str | None:
    """Where the expert is that a checkpoint in PEFT's layout gives as `path`.

    That is the folder of the checkpoint that the path ends in (the directory may have moved, its experts with it), else
    the path itself if there is a directory, else a hub id.
    """
    # No file system takes longer paths; a name that is too long, or holds a zero, is no directory's either.
    if len(path) > _MAX_PATH:
        raise FormatError(f"{directory}: an expert's path has {len(path)} characters; expected at most {_MAX_PATH}.")
    parts = Path(path).parts
    # Nothing named `..` or the root is inside the checkpoint: only the parts after the last of them are looked for.
    start = 1 + max((i for i, part in enumerate(parts) if part in (os.sep, "..")), default=-1)
    try:
        for first in range(start, len(parts)):
            inside = directory.joinpath(*parts[first:])
            # PEFT's own folders in a checkpoint are called 0, 1, ... and hold no adapters.
            plausible = not (first == len(parts) - 1 and parts[first].isdigit())
            if plausible and (inside / ADAPTER_CONFIG_FILE).is_file():
                return str(inside)
        if Path(path).is_dir():
            return path
    except (OSError, ValueError) as error:
        raise FormatError(f"{directory}: the expert's path {brief(path)} can't be looked up ({error}).") from error
    return path if is_hub_id(path) else None


def find_original_expert(directory: Path, name: str, path: object) -> str | None:
    """Find an expert of the original layout or of mistral.rs's; None where it is not to be found."""
    if name != Path(name).name or name == ".." or len(os.fsencode(name)) > _MAX_NAME:
        raise FormatError(f"{directory}: the expert {name!r} is no folder's name.")
    if (directory / name / ADAPTER_CONFIG_FILE).is_file():
        return str(directory / name)
    if (directory / f"{name}.json").is_file():
        return str(directory / f"{name}.safetensors")
    return find_expert(directory, path) if isinstance(path, str) and path else None


def folders_of_experts(directory: Path) -> list[str]:
    """The original loader's order where the settings don't name the experts: that of the folders' names."""
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
    """Rewrites the experts' paths of a checkpoint in PEFT's layout after it was moved, so that PEFT finds them.

    Raises:
        FormatError: not a checkpoint in PEFT's layout, or an expert that is neither in the directory nor where its path
            says.
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
