"""The names at the top of the two packages."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import interop
import xlora_jax


@pytest.mark.parametrize("package", [xlora_jax, interop])
def test_every_public_name_is_there_and_hides_no_module(package) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse(Path(xlora_jax.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert homes == xlora_jax._MODULE_OF


def test_importing_loads_no_heavy_library() -> None:
    code = "import sys, xlora_jax; print(sorted({'jax', 'flax', 'optax', 'orbax', 'grain'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_api_reference_has_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api" / "xlora_jax.md").read_text(encoding="utf-8")
    listed = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")]
    assert sorted(listed) == sorted(f"{module}.{name}" for name, module in xlora_jax._MODULE_OF.items())
