"""HF base checkpoints in Flax: config.json to a module, its safetensors to parameters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.errors import FormatError
from interop.families import LEAVES, Family, abstract_params, decoder_config, family_of
from interop.files import file_in, read_json
from interop.hub import resolve
from interop.tensors import LazyTensor, open_tensors, require_finite
from xlora_jax import BaseModel
from xlora_jax.models import Decoder
from xlora_jax.trees import Path as TreePath
from xlora_jax.trees import flatten, unflatten

__all__ = ["BaseOrigin", "load_base"]


@dataclass(frozen=True)
class BaseOrigin:
    """Where a base model came from.

    Attributes:
        name_or_path: as the user gave it.
        directory: where its files are.
        family: its family.
        config: its config as transformers reads it.
    """

    name_or_path: str
    directory: Path
    family: Family
    config: Mapping[str, Any]


def load_base(
    base: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    scan_layers: bool = True,
    **hub_options: Any,
) -> BaseModel:
    """Load an HF causal language model.

    Args:
        base: directory or hub id, with config.json and safetensors (single or sharded) or a ``.bin``.
        dtype: of parameters and computation: float32, bfloat16 or float16. None takes the one in config.json, or
            float32.
        scan_layers: stack the blocks (fast to compile, any depth), or stand them side by side (fast to decode).
        **hub_options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``.

    Returns:
        The model; ``base_model(input_ids=..., attention_mask=...).logits``.

    Raises:
        FormatError: a file is broken, a tensor is missing, unexpected or of the wrong shape, or a config field has a
            value that is not implemented.
    """
    directory = resolve(base, **hub_options)
    config_file = file_in(directory, "config.json")
    if config_file is None:
        raise FormatError(f"{directory}: no config.json; expected the directory of an HF base model.")
    family = family_of(read_json(config_file).get("model_type"), str(config_file))

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).to_dict()
    if dtype is None:
        dtype = config.get("dtype") or "float32"
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    module = Decoder(
        decoder_config(family, config, str(config_file)), dtype=dtype, param_dtype=dtype, scan_layers=scan_layers
    )
    params = read_params(module, family, open_tensors(directory), dtype, str(directory))
    return BaseModel(module, params, BaseOrigin(str(base), directory, family, config))


def read_params(
    module: Decoder, family: Family, tensors: Mapping[str, LazyTensor], dtype: np.dtype[Any], where: str
) -> dict[str, Any]:
    """Read the parameters of ``module``, one leaf at a time: in memory beside them stands at most one stacked leaf."""
    if not any(name.startswith(family.prefix) for name in tensors):
        # Saved from the class without an output head, as the hub's gpt2 is: its names start one part later.
        tensors = {name if name.startswith("lm_head.") else family.prefix + name: t for name, t in tensors.items()}
    wanted = _sources(module, family)
    _check(wanted, tensors, family, module, where)
    params: dict[TreePath, jax.Array] = {}
    for path, (shape, sources) in wanted.items():
        buffer = np.empty(shape, dtype)
        for source in sources:
            tensor = tensors[source.tensor]
            value = require_finite(tensor.read(), tensor.name, tensor.file)
            buffer[source.member] = value.T if source.transposed else value
        params[path] = jnp.asarray(buffer)
    return unflatten(params)


@dataclass(frozen=True)
class _Source:
    """The torch tensor that fills a leaf, or one member of a stacked leaf."""

    tensor: str
    member: tuple[int, ...]
    transposed: bool


def _sources(module: Decoder, family: Family) -> dict[TreePath, tuple[tuple[int, ...], list[_Source]]]:
    """For each leaf of the parameters its shape, and the tensors that it comes from."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    wanted: dict[TreePath, tuple[tuple[int, ...], list[_Source]]] = {}
    for placed in family.modules(module):
        for leaf, (suffix, transposed) in LEAVES[placed.kind].items():
            path = (*placed.path, leaf)
            if path in shapes:
                source = _Source(f"{family.in_file(placed.hf)}.{suffix}", placed.member, transposed)
                wanted.setdefault(path, (shapes[path], []))[1].append(source)
    unfilled = shapes.keys() - wanted.keys()
    assert not unfilled, f"no row of the family's table fills {unfilled}"
    return wanted


def _check(
    wanted: Mapping[TreePath, tuple[tuple[int, ...], list[_Source]]],
    tensors: Mapping[str, LazyTensor],
    family: Family,
    module: Decoder,
    where: str,
) -> None:
    """Hold the file's tensors against what the module needs, all of them before any is read."""
    names = {source.tensor for _, sources in wanted.values() for source in sources}
    missing = sorted(names - tensors.keys())
    unexpected = sorted(name for name in tensors.keys() - names if not name.endswith(family.ignored or ("\0",)))
    head = f"{family.in_file('lm_head')}.weight"
    if module.config.tie_word_embeddings and head in unexpected:
        # Some files store the tied table twice. Only the embedding is used, as transformers does.
        unexpected.remove(head)
    if missing or unexpected:
        raise FormatError(
            f"{where}: the tensors are not those of a {family.causal_lm} with this config. "
            f"Missing: {_list(missing)}. Unexpected: {_list(unexpected)}. Expected a checkpoint saved with "
            f"{family.causal_lm}.save_pretrained."
        )
    for shape, sources in wanted.values():
        for source in sources:
            expected = shape[len(source.member) :]
            expected = expected[::-1] if source.transposed else expected
            tensor = tensors[source.tensor]
            if tensor.shape != expected:
                raise FormatError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected shape {list(expected)} from config.json, got "
                    f"{list(tensor.shape)}."
                )
            if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
                raise FormatError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected a floating-point dtype of at least 16 bits, got "
                    f"{tensor.dtype}; quantised checkpoints are not supported, convert it to bfloat16."
                )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "none"
