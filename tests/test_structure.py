"""Who may import whom: the core knows no files of others, and every module stands above what it imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "xlora_jax").rglob("*.py"))
INTEROP = sorted((ROOT / "interop").rglob("*.py"))
FOREIGN = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "tokenizers"}
# From the ground up; a module imports from floors below its own, or from its own folder.
FLOORS = [
    ("xlora_jax.products",),
    (
        "xlora_jax.config",
        "xlora_jax.drafting",
        "xlora_jax.layers",
        "xlora_jax.mixing",
        "xlora_jax.sampling",
        "xlora_jax.stacking",
        "xlora_jax.text",
        "xlora_jax.trees",
    ),
    ("xlora_jax.losses", "xlora_jax.metrics", "xlora_jax.optimizers", "xlora_jax.records", "xlora_jax.regularizers"),
    ("xlora_jax.chats", "xlora_jax.modules", "xlora_jax.sharding"),
    ("xlora_jax.data",),
    ("xlora_jax.models",),
    ("xlora_jax.forward",),
    ("xlora_jax.decoding", "xlora_jax.scaling_cache", "xlora_jax.training"),
    ("xlora_jax.generation", "xlora_jax.routing"),
    ("xlora_jax.checkpoints", "xlora_jax.model", "xlora_jax.objectives"),
    ("xlora_jax.convert", "xlora_jax.trainer"),
    ("xlora_jax.convert_nnx",),
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def floor_of(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def is_roof(path: Path) -> bool:
    return "cli" in path.relative_to(ROOT).parts


@pytest.mark.parametrize("path", [path for path in CORE if not is_roof(path)], ids=name_of)
def test_the_core_knows_no_files_of_others(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports_of(path)}
    assert not roots & (FOREIGN | {"interop"})


@pytest.mark.parametrize(
    "path", [path for path in CORE if not is_roof(path) and name_of(path) != "xlora_jax"], ids=name_of
)
def test_every_module_stands_above_what_it_imports(path: Path) -> None:
    own = floor_of(name_of(path))
    assert own is not None, f"{name_of(path)} is on no floor: put it on one in FLOORS"
    for module in imports_of(path):
        floor = floor_of(module)
        same_folder = module.startswith("xlora_jax.models") and name_of(path).startswith("xlora_jax.models")
        assert floor is None or floor < own or same_folder, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", INTEROP, ids=name_of)
def test_torch_is_imported_where_it_is_used_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in at_import for alias in node.names}
    assert not {name.split(".")[0] for name in names} & {"torch", "peft"}
