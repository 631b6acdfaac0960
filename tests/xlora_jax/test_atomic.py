"""Files that are replaced as a whole, and links that somebody planted where they are written."""

import ast
import os
from pathlib import Path

import pytest

from xlora_jax.atomic import open_to_append, replace_json, replace_text, replacing_file

ROOT = Path(__file__).parents[2]


def test_the_new_content_takes_the_place_and_nothing_is_left_beside(tmp_path):
    replace_text(tmp_path / "a.json", "old")
    replace_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def fill_and_fail(path):
    with replacing_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_a_failure_leaves_the_old_content(tmp_path):
    replace_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "a").symlink_to(victim)
    replace_text(tmp_path / "a", "new")
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_text() == "new"


def test_a_link_is_not_appended_to(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "a").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "a")
    assert victim.read_text() == "untouched"


def test_a_long_name(tmp_path):
    replace_text(tmp_path / ("n" * 255), "new")
    assert (tmp_path / ("n" * 255)).read_text() == "new"


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    replace_text(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Calls that create or change a file by its name. Anything else than the module for it would be a second way.
WRITING = {"write_text", "write_bytes", "savez", "savez_compressed", "tofile", "mkstemp", "NamedTemporaryFile"}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("xlora_jax/**/*.py"), *ROOT.glob("interop/**/*.py")]), ids=str)
def test_files_are_written_in_one_place(path):
    if path.name == "atomic.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        where = f"{path.relative_to(ROOT)}, line {node.lineno}"
        assert name not in WRITING - {"savez_compressed"}, f"{where}: {name}; use xlora_jax.atomic"
        if name == "open":
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            assert not any(set(mode) & set("wax+") for mode in modes), f"{where}: open to write; use xlora_jax.atomic"
