"""Compiled programs are kept where the documentation says, found again, and left alone where the user says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, jax.numpy as jnp
from xlora_jax.cli.compile_cache import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **more: events.append(name))
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 4)))
print(events.count("/jax/compilation_cache/cache_hits") > 0)
"""


def run(home: Path, **environment: str) -> str:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "-c", CODE]
    given = {**keep, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout.strip()


def test_the_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    assert run(tmp_path) == "False"
    assert list((tmp_path / "xlora-jax" / "compiled").iterdir())
    assert run(tmp_path) == "True"


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_the_users_choice_comes_first(tmp_path: Path, variable: str) -> None:
    values = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other"), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    run(tmp_path, **{variable: values[variable]})
    assert not (tmp_path / "xlora-jax").exists()
