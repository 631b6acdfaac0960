"""Resolution of directories and hub ids to local directories."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from interop.storage.errors import FormatError, brief

__all__ = ["is_hub_id", "resolve", "weights_file"]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id, `name` or `org/name`."""
    return _HUB_ID.fullmatch(text) is not None


def weights_file(path: str | os.PathLike[str]) -> Path | None:
    """Return the path if it is a `.safetensors` file, as in mistral.rs's layout; else None."""
    try:
        weights = Path(path).expanduser()
        return weights if weights.suffix == ".safetensors" and weights.is_file() else None
    except (OSError, RuntimeError):  # the path can't be looked up; `resolve` reports the reason
        return None


def resolve(
    dir_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = ("*.json", "*.safetensors"),
) -> Path:
    """Return the local directory of `dir_or_id`, after a download from the hub if needed.

    An existing directory is returned as it is; anything else is a hub id. Cached files are not downloaded again. With
    `local_files_only` or `HF_HUB_OFFLINE=1` nothing is downloaded.

    Args:
        dir_or_id: directory, or hub id such as `org/name`.
        revision: branch, tag or commit on the hub; None means the default branch. No effect for a directory.
        subfolder: folder inside the directory or repository.
        token: access token for private or gated repositories; None takes the token of `hf auth login`.
        cache_dir: directory for downloads; None means the hub's default.
        local_files_only: whether to use cached files only.
        files: glob patterns of the files to download. If no safetensors match, the `.bin` and `.pt` forms are
            downloaded.

    Returns:
        The directory, with `subfolder` appended.

    Raises:
        FileNotFoundError: there is no such directory, and the repository can't be reached and is not cached.
        NotADirectoryError: the path is a file.
        FormatError: the subfolder leaves the directory.
    """
    if subfolder is not None:
        parts = PurePosixPath(subfolder).parts
        if not parts or subfolder.startswith("/") or ".." in parts or "\\" in subfolder:
            raise FormatError(f"subfolder {subfolder!r}: expected a relative path within {dir_or_id}.")
    try:
        path = Path(dir_or_id).expanduser()
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, an unknown user, a link to itself
        raise FileNotFoundError(f"{brief(os.fspath(dir_or_id))}: no such directory ({error}).") from error
    if is_file:
        raise NotADirectoryError(f"{path}: a file; pass the directory that it is in.")
    if is_directory:
        root = path
    else:
        text = os.fspath(dir_or_id)
        if not isinstance(dir_or_id, str) or not is_hub_id(text):
            raise FileNotFoundError(f"{text}: no such directory (and not of the form of a hub id, org/name).")
        root = _download(text, revision, subfolder, token, cache_dir, local_files_only, files)
    directory = root if subfolder is None else root / subfolder
    if not directory.is_dir():
        raise FileNotFoundError(f"{dir_or_id}: no folder {subfolder!r} in it.")
    return directory


def _download(
    repo_id: str,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    files: Sequence[str],
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def get(patterns: Sequence[str]) -> Path:
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[pattern if subfolder is None else f"{subfolder}/{pattern}" for pattern in patterns],
        )
        return Path(snapshot)

    try:
        root = get(files)
        if not any(root.rglob("*.safetensors")):
            stems = [pattern.removesuffix(".safetensors") for pattern in files if pattern.endswith(".safetensors")]
            root = get([stem + extension for stem in stems for extension in (".bin", ".pt")] + list(files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"{repo_id}: no such directory, and the hub's repository of that name{at} is neither cached nor to be had. "
            f"Check the spelling; for a private or gated one pass token=... or run `hf auth login`; offline, download "
            f"it first where there is a network (`hf download {repo_id}`). The hub says: {error}"
        ) from error
    return root
