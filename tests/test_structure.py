"""Who may import whom: the core knows no files of others, and every module stands above what it imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "xlora_jax").rglob("*.py"))
INTEROP = sorted((ROOT / "interop").rglob("*.py"))
FOREIGN = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "tokenizers"}
# The modules that run PyTorch code; nothing else in the core imports them.
OF_TORCH = ("xlora_jax.conversion.torch", "xlora_jax.conversion.torch_lowerings")
# From the ground up; a module imports from floors below its own, or from its own folder.
FLOORS = [
    (
        *("xlora_jax.atomic", "xlora_jax.backend", "xlora_jax.config"),
        *("xlora_jax.memory", "xlora_jax.token_ids", "xlora_jax.trees"),
    ),
    ("xlora_jax.sharding",),
    ("xlora_jax.layers",),
    ("xlora_jax.models",),
    ("xlora_jax.passes",),
    ("xlora_jax.generation", "xlora_jax.routing"),
    ("xlora_jax.model",),
    ("xlora_jax.conversion", "xlora_jax.training"),
    ("xlora_jax.job", "xlora_jax.report"),
    ("xlora_jax.cli",),
]
INTEROP_FLOORS = [
    ("interop.storage",),
    ("interop.hf",),
    ("interop.peft",),
    ("interop.checkpoint",),
    ("interop.experts",),
    ("interop.model",),
    ("interop.editing", "interop.inspection", "interop.merging"),
]
ROOF = ("xlora_jax.job", "xlora_jax.cli")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def floor_of(module: str, floors: list[tuple[str, ...]]) -> int | None:
    for number, names in enumerate(floors):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def is_roof(path: Path) -> bool:
    return name_of(path).startswith(ROOF)


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", [path for path in CORE if not is_roof(path)], ids=name_of)
def test_the_core_knows_no_files_of_others(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports_of(path)}
    if name_of(path) in OF_TORCH:
        roots -= {"torch"}
    else:
        assert not set(imports_of(path)) & set(OF_TORCH)
    assert not roots & (FOREIGN | {"interop"})


@pytest.mark.parametrize("path", [path for path in CORE + INTEROP if "." in name_of(path)], ids=name_of)
def test_every_module_stands_above_what_it_imports(path: Path) -> None:
    name = name_of(path)
    floors = FLOORS if name.startswith("xlora_jax.") else INTEROP_FLOORS
    own = floor_of(name, floors)
    assert own is not None, f"{name} is on no floor: put it on one in FLOORS"
    for module in imports_of(path):
        floor = floor_of(module, floors)
        assert floor is None or floor < own or folder_of(module) == folder_of(name), f"{name} imports {module}"


@pytest.mark.parametrize("path", INTEROP, ids=name_of)
def test_torch_is_imported_where_it_is_used_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in at_import for alias in node.names}
    assert not {name.split(".")[0] for name in names} & {"torch", "peft"}
