"""Selection of the tests that need only the core's dependencies: `pytest --core` leaves out the others.

A test file is left out if importing it imports a package other than `CORE`, directly or through our own modules. In the
files that stay, a test is left out if an import in its body does so, or if it uses a fixture whose function does.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"xlora_jax", "interop", "tests", "examples", "benchmarks"}
# Packages of `dependencies` and of the extras `train` and `core-test`.
CORE = {
    "jax",
    "jaxlib",
    "ml_dtypes",
    "flax",
    "optax",
    "numpy",
    "orbax",
    "grain",
    "rich",
    "tensorboardX",
    "pytest",
    "hypothesis",
}


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run with `body`, including those in `if` and `try`, but not those in functions."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _executed(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _executed(handler.body)


def _needs_foreign(body: list[ast.stmt]) -> bool:
    for node in _executed(body):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if any(_is_foreign(name.split(".")[0]) or _module_needs_foreign(name) for name in names):
            return True
    return False


def _is_foreign(package: str) -> bool:
    return package not in CORE | OURS and package not in sys.stdlib_module_names


@cache
def _module_needs_foreign(name: str) -> bool:
    """Return whether importing the module `name` needs a foreign package; False for modules of other packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        stem = ROOT.joinpath(*parts[:end])
        if any(file_needs_foreign(path) for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.exists()):
            return True
    return False


_under_way: set[Path] = set()


@cache
def file_needs_foreign(path: Path) -> bool:
    """Return whether importing this file needs a foreign package."""
    if path in _under_way:  # a circular import: the call that began it decides
        return False
    _under_way.add(path)
    try:
        return _needs_foreign(ast.parse(path.read_text(encoding="utf-8")).body)
    finally:
        _under_way.remove(path)


@cache
def _functions(path: Path) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def item_needs_foreign(item: pytest.Function) -> bool:
    """Return whether the body of this test, or of a fixture that it uses, imports a foreign package."""
    functions = [item.function]
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        functions += [definition.func for definition in definitions]
    for function in functions:
        path = Path(function.__code__.co_filename)
        if path.is_relative_to(ROOT / "tests") and _needs_foreign(_functions(path).get(function.__name__, [])):
            return True
    return False
