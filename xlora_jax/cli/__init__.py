"""The command line, ``xlora-jax``: the roof of the project, which may import both ``xlora_jax`` and ``interop``."""

from xlora_jax.cli.main import main

__all__ = ["main"]
