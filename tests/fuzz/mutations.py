"""Damage to files, as hypothesis draws it: bytes anywhere, and values in JSON, safetensors headers and zip members."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

__all__ = ["apply", "mutations"]

PLACES = st.floats(0, 1, exclude_max=True)
VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**33, 2**63, 2**64, 10**400, -(2**70), 1e308, 1e-300, 0.5),
            *(float("nan"), float("inf"), "", "a", "\0", "\ud800", "\x1b[31m", "../../x", "/etc/passwd", "x" * 5000),
            *([], {}, [0], [[0]], {"a": 0}, "[bold]", "float32", "\u202e", "deep list", "deep object"),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)
OPERATIONS = st.one_of(
    st.tuples(st.just("flip"), PLACES, PLACES, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACES, PLACES, st.none()),
    st.tuples(st.just("insert"), PLACES, PLACES, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("repeat"), PLACES, PLACES, st.integers(1, 3000)),
    st.tuples(st.just("zero"), PLACES, PLACES, st.integers(1, 200)),
    st.tuples(st.just("raw"), PLACES, PLACES, st.binary(max_size=200)),
    st.tuples(st.just("delete"), PLACES, PLACES, st.none()),
    st.tuples(st.just("swap"), PLACES, PLACES, st.none()),
    *[st.tuples(st.just("value"), PLACES, PLACES, VALUES)] * 4,
    st.tuples(st.just("drop key"), PLACES, PLACES, st.none()),
    st.tuples(st.just("rename key"), PLACES, PLACES, st.text(max_size=5)),
    st.tuples(st.just("double key"), PLACES, PLACES, st.none()),
    st.tuples(st.just("compress"), PLACES, PLACES, st.none()),
)
mutations = st.lists(OPERATIONS, min_size=1, max_size=3)


def apply(operations: list[tuple[str, float, float, Any]], directory: Path) -> None:
    """Damage the files of a directory."""
    for kind, which, place, argument in operations:
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        if not files:
            return
        file = files[int(which * len(files))]
        if kind == "delete":
            file.unlink()
        elif kind == "swap":
            shutil.copyfile(files[int(place * len(files))], file.with_name("swap"))
            file.with_name("swap").replace(file)
        elif kind in ("value", "drop key", "rename key", "double key"):
            _inside(file, place, lambda text, spot, k=kind, a=argument: _in_json(text, spot, k, a))
        elif kind == "compress":
            _inside(file, place, lambda content, _: content, zipfile.ZIP_DEFLATED)
        else:
            _damage(file, place, kind, argument)


def _damage(file: Path, place: float, kind: str, argument: Any) -> None:
    """Change bytes anywhere in a file, or within what it wraps."""
    spot = place * 2 % 1
    if place < 0.5:
        file.write_bytes(_in_bytes(file.read_bytes(), spot, kind, argument))
    else:
        _inside(file, spot, lambda content, inner: _in_bytes(content, inner, kind, argument))


def _in_bytes(content: bytes, place: float, kind: str, argument: Any) -> bytes:
    at = int(place * len(content))
    if kind == "raw":
        return bytes(argument)
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + argument + content[at:]
    if kind == "repeat":
        return content[:at] + content[at : at + 8] * argument + content[at:]
    if kind == "zero":
        return content[:at] + bytes(len(content[at : at + argument])) + content[at + argument :]
    return content[:at] + bytes([content[at] ^ 1 << argument]) + content[at + 1 :] if content else content


def _inside(
    file: Path, place: float, change: Callable[[bytes, float], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Change a member of a zip, the header of a safetensors file, or the whole of another."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        try:
            file.write_bytes(_in_zip(content, place, change, compression))
        except Exception:  # one that is damaged already
            file.write_bytes(content[:-1])
    elif file.suffix == ".safetensors" and len(content) > 8:
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:end], place)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    else:
        file.write_bytes(change(content, place))


def _in_zip(content: bytes, place: float, change: Callable[[bytes, float], bytes], compression: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    chosen = int(place * len(members))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for number, (name, data) in enumerate(members):
            archive.writestr(name, change(data, place * len(members) % 1) if number == chosen else data)
    return buffer.getvalue()


def _in_json(text: bytes, place: float, kind: str, argument: Any) -> bytes:
    try:
        root = json.loads(text)
        nodes = list(_nodes(root))
    except (ValueError, RecursionError):
        return text[: int(place * len(text))]
    if not nodes:
        return json.dumps(argument).encode("utf-8", "surrogatepass")
    parent, key = nodes[int(place * len(nodes))]
    if kind == "value":
        parent[key] = argument
    elif kind == "drop key" or not isinstance(parent, dict):
        del parent[key]
    elif kind == "rename key":
        parent[argument] = parent.pop(key)
    else:
        parent["double of"] = key
    written = json.dumps(root)
    written = written.replace('"double of": ' + json.dumps(key), f"{json.dumps(key)}: 1")
    written = written.replace('"deep list"', "[" * 100_000 + "]" * 100_000)
    return written.replace('"deep object"', '{"a":' * 100_000 + "1" + "}" * 100_000).encode()


def _nodes(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _nodes(inner)
