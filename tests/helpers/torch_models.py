"""Small models of transformers that are not ported to Flax, their adapters, and X-LoRA from its formula in PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.helpers.reference import adapter_matrices, tensors
from xlora_jax import XLoraModel

V, D = 96, 32
_NEW = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4}
_GEMMA = {**_NEW, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "sliding_window": 4}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 4}

# Class, config class, options of the config, modules that the experts adapt.
MODELS: dict[str, tuple[str, str, dict[str, Any], list[list[str]]]] = {
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": V, "dim": D, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        [["q_lin", "lin1"], ["v_lin"]],
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _NEW, [["query_key_value", "dense"], ["dense_h_to_4h"]]),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": 4},
        [["query_key_value", "word_embeddings"], ["dense_4h_to_h"]],
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        [["q_proj", "c_fc"], ["out_proj"]],
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "final_logit_softcapping": 5.0},
        [["q_proj", "embed_tokens"], ["down_proj", "lm_head"]],
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": V - 1,
            "boi_token_index": V - 2,
            "eoi_token_index": V - 3,
        },
        [[r"model\.language_model\..*q_proj"], [r"model\.language_model\..*up_proj"]],
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**_NEW, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        [["q_proj", "o_proj"], ["v_proj"]],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": V, "d_model": D, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64},
        [[r"decoder\..*SelfAttention\.q"], [r"decoder\..*\.wi", r"decoder\..*EncDecAttention\.q"]],
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        [["q_proj", "fc_in"], ["fc_out"]],
    ),
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_torch_model(name: str, directory: Path, kind: str | None = None, **options: Any) -> Any:
    """Save a random model as a Hugging Face directory, and return it."""
    class_name, config_name, own, _ = MODELS[name]
    config = getattr(transformers, config_name)(**{**_TOKENS, **own, **options})
    torch.manual_seed(0)
    model = getattr(transformers, kind or class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    config.use_cache = False
    return model


def make_adapters(
    name: str, base_dir: Path, directory: Path, targets_of: Sequence[list[str]] = (), **options: Any
) -> list[Path]:
    """Save an adapter for each list of targets, by default the model's, and return their directories."""
    made = []
    for number, targets in enumerate(targets_of or MODELS[name][3]):
        model = reloaded(base_dir)
        pattern = targets[0] if len(targets) == 1 else f"({'|'.join(targets)})"
        is_pattern = any("." in target for target in targets)
        config = LoraConfig(
            r=2 + number,
            lora_alpha=5,
            target_modules=pattern if is_pattern else targets,
            init_lora_weights=False,
            **options,
        )
        torch.manual_seed(10 + number)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            adapted = get_peft_model(model, config)
        adapted.save_pretrained(str(directory / str(number)), save_embedding_layers=False)
        made.append(directory / str(number))
    return made


def reloaded(base_dir: Path) -> Any:
    """Load a model's directory in transformers, without cache."""
    config = transformers.AutoConfig.from_pretrained(base_dir)
    config.use_cache = False
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(base_dir, config=config).eval()


def torch_xlora(
    model: XLoraModel, base_dir: Path, adapters: Sequence[Path], inputs: Mapping[str, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Run X-LoRA by its formula: `scale * B A (gate * x)` added at every adapted module, layerwise gates, depth 1.

    Returns:
        Logits, scalings [B, T, L, N], and the tensors that can have a gradient: classifier and experts, by name.
    """
    base = reloaded(base_dir).requires_grad_(False)
    given = tensors(inputs)
    out = base(**given, output_hidden_states=True)
    hidden = (getattr(out, "hidden_states", None) or out.decoder_hidden_states)[-1]
    dense = model.params["classifier"]["dense_0"]
    leaves = {name: torch.tensor(np.asarray(dense[name])).requires_grad_() for name in ("kernel", "bias")}
    count = len(model.expert_names)
    scores = (hidden @ leaves["kernel"] + leaves["bias"]).reshape(*hidden.shape[:2], -1, count)
    scalings = torch.softmax(scores / model.config.softmax_temperature, -1)
    number = {name: i for i, name in enumerate(model.layer_names)}
    for expert, adapter in enumerate(adapters):
        for name, (a, b, scale) in adapter_matrices(adapter).items():
            a, b = (x.clone().requires_grad_() for x in (a, b))
            leaves |= {f"{expert} {name} a": a, f"{expert} {name} b": b}

            def add(module, args, output, name=name, expert=expert, a=a, b=b, scale=scale):
                (x,) = args
                gate = scalings[:, :, number[name], expert, None]
                if isinstance(module, torch.nn.Embedding):
                    return output + scale * getattr(module, "embed_scale", 1) * (gate * a.T[x]) @ b.T
                return output + scale * (gate * x) @ a.T @ b.T

            base.get_submodule(name).register_forward_hook(add)
    return base(**given).logits, scalings, leaves


def torch_inputs(name: str, padding: str | None = None) -> dict[str, np.ndarray]:
    """Return inputs of a model: two texts of nine tokens, one of them with padding."""
    random = np.random.default_rng(0)
    ids = random.integers(3, V - 8, (2, 9))
    mask = np.ones_like(ids)
    if padding is not None:
        mask[0, slice(0, 4) if padding == "left" else slice(5, 9)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = random.integers(3, V, (2, 6))
    return inputs
