"""The command line ``xlora-jax``: the top layer of the project, which may import ``xlora_jax`` and ``interop``."""

from xlora_jax.cli.main import main

__all__ = ["main"]
