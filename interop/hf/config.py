"""Reading of a base model's config.json: checks of fields that transformers does not check, then transformers' config.

transformers fills missing fields with its own defaults and accepts any sizes. Sizes decide how much is built before the
shape of a tensor can disagree. So they are first checked against the largest sizes that any model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.hf.auto import load_hf_config
from interop.hf.families.fields import declared_fields
from interop.hf.families.registry import family_of
from interop.hf.families.table import Family
from interop.hf.quantized.readers import QUANTIZATION_FIELDS, method_of
from interop.storage.errors import FormatError, brief
from interop.storage.files import read_json

__all__ = ["BASE_CONFIG_FILE", "read_config"]

BASE_CONFIG_FILE = "config.json"
_WIDTH, _COUNT = 2**30, 1000
# Largest allowed value of each field.
_SIZES = {
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "vocab_size"), _WIDTH),
    **dict.fromkeys(("hidden_size", "n_embd", "dim"), 2**20),
    **dict.fromkeys(("word_embed_proj_dim", "moe_intermediate_size"), _WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), _WIDTH),
    "head_dim": 2**16,  # rotary frequencies are computed from it, or from the hidden size
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), _COUNT),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), _WIDTH),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), _COUNT),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# If these are missing, transformers uses the sizes of some other model.
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def read_config(path: Path) -> tuple[Family, Mapping[str, Any]]:
    """Read a base model's config.json.

    Returns:
        The model's family, and its config as transformers reads it.

    Raises:
        FormatError: the file is not a JSON object, the family is unknown, or a field is missing or invalid. The message
            names file and field, the expected value and the value found.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    content = read_json(path)
    family = family_of(content.get("model_type"), str(path))
    also_called: Mapping[str, str] = getattr(CONFIG_MAPPING[family.model_type], "attribute_map", {})
    text, declared = content, declared_fields(family.model_type)
    required: tuple[str, ...] = (family.input_size, *_REQUIRED)
    if family.texts:
        # Old files have its fields among the others. Released ones leave out fields at transformers' defaults.
        text = content.get("text_config", content)
        declared = frozenset().union(*map(declared_fields, family.texts))
        required = ("hidden_size", "num_hidden_layers")
        if not isinstance(text, Mapping):
            raise FormatError(f"{path}: field 'text_config': expected an object, got {brief(text)}.")
    for name in required:
        given = name if text.get(name) is not None else also_called.get(name, name)
        if text.get(given) is None:
            raise FormatError(
                f"{path}: field {given!r}: expected a whole number of at least 1, got "
                f"{'null' if given in text else 'nothing: the field is missing'}."
            )
    for name, most in _SIZES.items():
        size = text.get(name)
        if size is not None and name in declared and (type(size) is not int or not 1 <= size <= most):
            raise FormatError(
                f"{path}: field {name!r}: expected a whole number from 1 to {most}, got {brief(size)} "
                f"({type(size).__name__})."
            )
    method_of(content, path)  # refuses those that can't be read
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise FormatError(f"{path}: field 'architectures': expected a list of names, got {brief(names)}.")
    for name in ("dtype", "torch_dtype"):
        if content.get(name) not in (None, *_DTYPES):
            raise FormatError(
                f"{path}: field {name!r}: expected one of {', '.join(_DTYPES)}, got {brief(content[name])}."
            )
    try:
        config: dict[str, Any] = load_hf_config(path.parent).to_dict()
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise FormatError(f"{path}: transformers can't read it: {error}") from error
    # The tensors tell how they are quantized; see `interop.hf.quantized`.
    return family, {name: value for name, value in config.items() if name not in QUANTIZATION_FIELDS}
