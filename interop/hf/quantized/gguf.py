"""Weights in a GGUF file of llama.cpp, beside the config.json and the tokenizer's files of the original model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A row of a matrix is a sequence of blocks. Each block
holds the codes of 32 or 256 consecutive inputs with their scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from interop.hf.quantized.grid import Codes, Grid, quantized_tensor
from interop.storage.errors import FormatError, brief
from interop.storage.tensors import LazyTensor

__all__ = ["open_gguf"]

# By model_type: the architecture in GGUF, and whether the rows of q and k are permuted there.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Fields of config.json, and the metadata that must agree with them.
_METADATA = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# Factors of rotary frequencies, which config.json describes.
_UNREAD = ("rope_freqs.weight",)


def open_gguf(path: Path, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors of a GGUF file under the names, and in the layout, of Hugging Face files.

    Args:
        path: the file.
        config: content of the config.json beside it.

    Raises:
        FormatError: the ``gguf`` package is missing, the file is broken or of another model than config.json, or its
            architecture is not supported.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FormatError(f"{path}: the package that reads it is missing: pip install 'xlora-jax[gguf]'.") from error
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise FormatError(
            f"{path}: of GGUF files, those of {', '.join(_ARCHITECTURES)} are supported, and config.json says "
            f"{brief(model_type)}. Take the model in safetensors."
        )
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if "tokenizer." not in name}
    except Exception as error:  # the reader checks little, and raises errors of any kind on a broken file
        raise FormatError(f"{path}: no readable GGUF file ({brief(str(error), 300)}). Download it again.") from error
    architecture, permuted = _ARCHITECTURES[model_type]
    _check_metadata(path, metadata, architecture, config)
    heads = {"attn_q": config.get("num_attention_heads")}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    found: dict[str, LazyTensor] = {}
    for stored in reader.tensors:
        if stored.name in _UNREAD:
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored.name)
        if match is None or match[2] not in _NAMES:
            raise FormatError(
                f"{path}: tensor {stored.name!r}: expected the tensors of {model_type}: "
                f"{', '.join(_NAMES)}. Take the model in safetensors."
            )
        block = "" if match[1] is None else f"model.layers.{int(match[1])}."
        name = f"{block}{_NAMES[match[2]]}.{match[3]}"
        rows = None
        if permuted and match[2] in heads:
            rows = _unpermuted(int(stored.shape[-1]), heads[match[2]], stored.name, path)
        found[name] = _tensor(name, path, stored, rows)
    return found


def _check_metadata(path: Path, metadata: Mapping[str, Any], architecture: str, config: Mapping[str, Any]) -> None:
    got = metadata.get("general.architecture")
    if got != architecture:
        raise FormatError(
            f"{path}: general.architecture: expected {architecture!r} for the config.json beside it, got {brief(got)}. "
            f"Put the config.json of the model that was converted there."
        )
    rope = config.get("rope_parameters")
    fields = {**(rope if isinstance(rope, dict) else {}), **config}
    for name, key in _METADATA.items():
        ours, theirs = fields.get(name), metadata.get(f"{architecture}.{key}")
        if not isinstance(ours, int | float) or not isinstance(theirs, int | float):
            continue
        if not math.isclose(ours, theirs, rel_tol=1e-5):
            raise FormatError(
                f"{path}: {architecture}.{key} is {theirs}, but {name} in the config.json beside it is {ours}. Put the "
                f"config.json of the model that was converted there."
            )


def _unpermuted(width: int, heads: Any, name: str, path: Path) -> NDArray[np.intp]:
    """Return the order of rows that undoes the interleaving of the two halves of each head."""
    if type(heads) is not int or heads < 1 or width % (2 * heads):
        raise FormatError(
            f"{path}: tensor {name!r}: expected an even number of rows for each of {brief(heads)} heads, got {width} "
            f"rows."
        )
    return np.arange(width).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _tensor(name: str, path: Path, stored: Any, rows: NDArray[np.intp] | None) -> LazyTensor:
    """Return one tensor; ``rows`` is the order of its rows, None for the stored order."""
    from gguf import quants

    shape = tuple(int(size) for size in reversed(stored.shape.tolist()))
    kind = stored.tensor_type.name

    def ordered(array: NDArray[Any]) -> NDArray[Any]:
        return np.array(array) if rows is None else array[rows]

    if kind in ("F32", "F16", "BF16"):
        dtype = np.dtype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])
        return LazyTensor(name, path, dtype, shape, lambda: ordered(stored.data.view(dtype).reshape(shape)))
    if kind in _CODES and len(shape) == 2:
        group, offsets, read = _CODES[kind]
        grid = Grid("int8" if kind in ("Q8_0", "Q6_K") else "int4", group, offsets)
        return quantized_tensor(name, path, shape, grid, lambda: read(ordered(stored.data)))
    try:
        quants.dequantize(np.zeros((1, stored.data.shape[-1]), np.uint8), stored.tensor_type)
    except NotImplementedError as error:
        raise FormatError(
            f"{path}: tensor {stored.name!r} is quantized as {kind}, which the gguf package can't read; convert it "
            f"with llama-quantize to {', '.join(_CODES)}."
        ) from error

    def values() -> NDArray[Any]:
        found: NDArray[Any] = quants.dequantize(ordered(stored.data), stored.tensor_type)
        return found

    return LazyTensor(name, path, np.dtype(np.float32), shape, values)


def _parts(rows: NDArray[np.uint8], *sizes: int) -> list[NDArray[np.uint8]]:
    """Cut the blocks of ``rows [F, bytes]`` into parts of these sizes, each ``[F, blocks, size]``."""
    blocks = rows.reshape(len(rows), -1, sum(sizes))
    return [np.ascontiguousarray(part) for part in np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)]


def _halves(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    return data.view(np.float16).astype(np.float32)


def _nibbles(data: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Unpack runs of ``count`` bytes into their low nibbles and then their high ones: ``[F, D]``."""
    runs = data.reshape(len(data), -1, 1, count)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(data), -1)


def _flat(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    return groups.reshape(len(groups), -1)


def _q4_0(rows: NDArray[np.uint8]) -> Codes:
    scale, codes = _parts(rows, 2, 16)
    return Codes(_nibbles(codes, 16), _flat(_halves(scale)))


def _q4_1(rows: NDArray[np.uint8]) -> Codes:
    scale, least, codes = _parts(rows, 2, 2, 16)
    return Codes(_nibbles(codes, 16), _flat(_halves(scale)), _flat(_halves(least)))


def _q8_0(rows: NDArray[np.uint8]) -> Codes:
    scale, codes = _parts(rows, 2, 32)
    return Codes(codes.view(np.int8).reshape(len(rows), -1), _flat(_halves(scale)))


def _q4_k(rows: NDArray[np.uint8]) -> Codes:
    """Read blocks of 256: eight groups, whose scales and minima have 6 bits each, packed into 12 bytes."""
    scale, least, packed, codes = _parts(rows, 2, 2, 12, 128)
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return Codes(_nibbles(codes, 32), _flat(_halves(scale) * scales), _flat(-(_halves(least) * minima)))


def _q6_k(rows: NDArray[np.uint8]) -> Codes:
    """Read blocks of 256: sixteen groups with scales in 8 bits; the codes' lower 4 and upper 2 bits are apart."""
    low, high, scales, scale = _parts(rows, 128, 64, 16, 2)
    lower = _nibbles(low, 64)
    runs = high.reshape(len(rows), -1, 1, 32)
    upper = np.concatenate([runs >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(rows), -1)
    codes = (lower | upper << 4).astype(np.int8) - np.int8(32)
    return Codes(codes, _flat(_halves(scale) * scales.view(np.int8)))


# By type in GGUF: number of inputs per scale, whether there are offsets, and the function from rows of bytes to codes.
_CODES: dict[str, tuple[int, bool, Callable[[NDArray[np.uint8]], Codes]]] = {
    "Q4_0": (32, False, _q4_0),
    "Q4_1": (32, True, _q4_1),
    "Q8_0": (32, False, _q8_0),
    "Q4_K": (32, True, _q4_k),
    "Q6_K": (16, False, _q6_k),
}
