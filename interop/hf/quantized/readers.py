"""The weights of a base model, as they are or quantized by another program."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interop.hf.quantized.bitsandbytes import decode as decode_bitsandbytes
from interop.hf.quantized.gguf import open_gguf
from interop.hf.quantized.packed import decode_awq, decode_compressed, decode_gptq
from interop.storage.errors import FormatError, brief
from interop.storage.files import file_in, read_json
from interop.storage.tensors import LazyTensor, open_tensors

__all__ = ["QUANTIZATION_FIELDS", "method_of", "open_weights"]

_Reader = Callable[[Mapping[str, LazyTensor], Mapping[str, Any], str], dict[str, LazyTensor]]
# By quant_method of the field quantization_config of config.json.
_READERS: dict[str, _Reader] = {
    "bitsandbytes": decode_bitsandbytes,
    "compressed-tensors": decode_compressed,
    "awq": decode_awq,
    "gptq": decode_gptq,
}
# The second is an old name.
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")

_QUANTIZED = re.compile(r"[-_.](?:unsloth-)?(?:bnb|awq|gptq|hqq|int|fp|\d-?bit|w\d+a\d+)[\w.-]*$", re.IGNORECASE)


def _unquantized(content: Mapping[str, Any], path: Path) -> str:
    """Return the name of the original of a quantized model, for an error message; empty if no name tells it."""
    in_hub_cache = path.parent.parent.parent.name.removeprefix("models--").replace("--", "/")
    for name in (content.get("_name_or_path"), in_hub_cache, path.parent.name):
        if isinstance(name, str) and (plain := _QUANTIZED.sub("", name)) not in ("", name):
            return f" ({plain!r} by its name)"
    return ""


def method_of(content: Mapping[str, Any], path: Path) -> str | None:
    """Return the method that quantized a model, from its config.json at ``path``; None if none did.

    Raises:
        FormatError: the method is not supported.
    """
    settings = _settings(content)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in _READERS:
        raise FormatError(
            f"{path}: field 'quantization_config': bases quantized by {', '.join(_READERS)} can be read, and GGUF "
            f"files; got {brief(method if isinstance(method, str) else settings)}. Take one of these, or the model "
            f"that this one was made from{_unquantized(content, path)}."
        )
    return str(method)


def open_weights(directory: Path) -> tuple[dict[str, LazyTensor], str | None]:
    """Return the tensors of a base model under the names of its plain form, and the method that quantized them.

    Quantized weights are instances of :class:`~interop.hf.quantized.grid.QuantizedTensor`.

    Raises:
        FormatError: a file is broken or of a form that is not supported.
        FileNotFoundError: there are no weights.
    """
    config_file = file_in(directory, "config.json")
    if config_file is None:
        raise FileNotFoundError(f"{directory}: no config.json; expected the directory of an HF base model.")
    content = read_json(config_file)
    if not any(directory.glob("*.safetensors*")) and not any(directory.glob("*.bin*")):
        files = sorted(directory.glob("*.gguf"))
        if len(files) > 1:
            raise FormatError(
                f"{directory}: expected one .gguf file, got {', '.join(file.name for file in files)}. Leave the one to "
                f"use; for a model in several parts, merge them with llama-gguf-split --merge."
            )
        if files and (file := file_in(directory, files[0].name)) is not None:
            return open_gguf(file, content), "GGUF"
    tensors = open_tensors(directory)
    method = method_of(content, config_file)
    if method is None:
        return tensors, None
    decoded = _READERS[method](tensors, _settings(content), str(config_file))
    if decoded == tensors:
        raise FormatError(
            f"{config_file}: field 'quantization_config' says {method}, but no tensor beside it is quantized so. Put "
            f"the quantized weights there, or remove the field if the weights are to be used as they are."
        )
    return decoded, method


def _settings(content: Mapping[str, Any]) -> Any:
    return next((content[name] for name in QUANTIZATION_FIELDS if content.get(name)), None)
