"""Nested mappings of arrays as flat ones, keyed by path: ``{("layers", "norm", "scale"): array}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
from flax import traverse_util

__all__ = ["Path", "arrays", "flatten", "unflatten"]

Path = tuple[str, ...]


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the leaves of nested mappings by path."""
    return cast(dict[Path, Any], traverse_util.flatten_dict(tree))  # type: ignore[no-untyped-call]


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Return nested dicts from leaves by path; the inverse of :func:`flatten`."""
    return cast(dict[str, Any], traverse_util.unflatten_dict(dict(leaves)))  # type: ignore[no-untyped-call]


def arrays(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the arrays of nested mappings by path, with the arrays of a quantized kernel at paths of their own."""
    return {
        (*path, *(str(key.name) for key in keys)): array
        for path, leaf in flatten(tree).items()
        for keys, array in jax.tree_util.tree_leaves_with_path(leaf)
    }
