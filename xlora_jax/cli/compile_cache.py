"""Compiled programs kept on disk, so that a command starts faster the next time it runs on the same model."""

from __future__ import annotations

import os
from pathlib import Path

import jax

__all__ = ["keep_compiled_programs"]

_MAX_BYTES = 2 * 2**30


def keep_compiled_programs() -> None:
    """Turn JAX's persistent compilation cache on, unless the user has chosen a place for it or turned it off.

    The place is ``xlora-jax/compiled`` in the user's cache directory (``XDG_CACHE_HOME``, by default ``~/.cache``). It
    holds at most 2 GiB; programs not used for the longest time go first. ``JAX_COMPILATION_CACHE_DIR`` is another
    place, and ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off.
    """
    chosen, enabled = (
        getattr(jax.config, f"jax_{name}") for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if chosen is not None or not enabled:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "xlora-jax" / "compiled"))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
