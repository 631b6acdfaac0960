"""Recognition of other programs' adapters by their keys, files or settings, for error messages with a next step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["format_of_config", "format_of_files", "format_of_keys"]

_MLX = "It is an MLX adapter (mlx_lm): fuse it with mlx_lm.fuse, or train a PEFT adapter; there is no exact conversion"
_RETRAIN = "convert it to PEFT's layout with the tools of the program that wrote it"
# Pattern to search for in a key, and the description of such a file.
_KEYS = (
    (
        r"\.experts\.(?:\d+\.)?\w+\.",
        "It adapts the experts of the base's own mixture (MoE), which are no modules in transformers 5 and can't be "
        "mixed here: train an adapter on the attention's projections",
    ),
    (r"(?:^|\.)lora_(?:unet|te\d?)_|\.lora_(?:down|up)\.", f"It is a diffusion model's LoRA: {_RETRAIN}"),
    (r"\.lora_[ab]\.weight$", f"It has torchtune's keys: {_RETRAIN}"),
    (r"\.lora_[ab]$", _MLX),
    (r"\.hada_w[12]_|\.lokr_w[12]", "It is a LoHa or LoKr adapter, and only LoRA adapters can be experts"),
    (r"\.ia3_l(?:\.|$)", "It is an IA3 adapter, and only LoRA adapters can be experts"),
    (r"(?:^|\.)prompt_embeddings$", "It is prompt or prefix tuning, and only LoRA adapters can be experts"),
    (r"\.linear_(?:in|out|qkv|proj|fc[12])\.", f"It has the keys of Megatron or NeMo: {_RETRAIN}"),
    (
        r"(?:^|\.)(?:encoder|decoder)\.(?:sentence_encoder\.)?layers\.\d+\.",
        f"It has keys as fairseq names them: {_RETRAIN}",
    ),
    (r"\.lora_[AB]$", f"It has loralib's keys, without `.weight`: {_RETRAIN}"),
)


def format_of_keys(keys: Iterable[str]) -> str | None:
    """Describe the program whose adapters have such keys, and the next step; None if unknown."""
    keys = list(keys)
    for pattern, words in _KEYS:
        if any(re.search(pattern, key) for key in keys):
            return words
    return None


def format_of_config(config: Mapping[str, Any]) -> str | None:
    """Describe the program that wrote an `adapter_config.json` without `peft_type`; None if unknown."""
    return _MLX if config.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"} else None


def format_of_files(directory: Path) -> str | None:
    """Describe the contents of a directory without `adapter_config.json`, and the next step; None if unknown."""
    if (directory / "adapters.safetensors").is_file() or (directory / "adapters.npz").is_file():
        return _MLX
    if (directory / "pytorch_lora_weights.safetensors").is_file():
        return f"It is a diffusion model's LoRA (diffusers): {_RETRAIN}"
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return "It holds a whole model: give it as the base, or the directory of the adapter alone"
    return None
