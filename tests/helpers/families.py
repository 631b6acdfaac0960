"""A small random model of every family, with non-default config fields, and the modules that its experts adapt.

The differences between families are data here; `tests/interop/hf/families/` compares them with transformers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.helpers.reference import VOCAB, Expert, adapter_matrices, randomize, tensors

LAYERS = 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_UNSET = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "use_cache": False}
_SHAPE = {
    **_UNSET,
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LLAMA = {**_SHAPE, "rms_norm_eps": 3e-3}


@dataclasses.dataclass(frozen=True)
class Model:
    """One family's small model.

    Attributes:
        options: config fields.
        attention: names of the attention's projections, as adapters have them.
        mlp: names of the MLP's projections; empty if PEFT cannot target them.
        embedding: name of the embedding, if PEFT's X-LoRA can load experts on it.
        in_peft: whether PEFT's X-LoRA loads experts of this family; otherwise the reference is the formula alone.
        lora: further fields of the adapters' config.
        within: regular expression of the modules that adapters are looked for in, where others have the same names.
    """

    options: Mapping[str, Any]
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    embedding: str | None = "embed_tokens"
    in_peft: bool = True
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    within: str = ""

    def experts(self) -> tuple[Expert, ...]:
        """Return three experts of unequal rank, scale, targets and layers."""
        first = (*self.attention, *((self.embedding,) if self.embedding and self.in_peft else ()))
        if self.within:

            def targets(*names: str, blocks: str = "") -> str:
                return rf"{self.within}{blocks}\.(?:{'|'.join(names)})"

            return (
                Expert(2, 4, targets(*first), more=self.lora),
                Expert(5, 5, targets(*self.mlp, blocks=r"layers\.[02].*"), more=self.lora),
                Expert(3, 4, targets(self.attention[0], self.mlp[-1]), more={"use_rslora": True, **self.lora}),
            )
        return (
            Expert(2, 4, first, more=self.lora),
            Expert(5, 5, self.mlp or self.attention[:1], layers=(0, 2), more=self.lora),
            Expert(3, 4, (self.attention[0], *self.mlp[-1:]), more={"use_rslora": True, **self.lora}),
        )


def _rope(theta: float = 300.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 300.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [1.2, 4.0],
    },
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_BIAS = {"attention_bias": True}
_TWO_ROPES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    }
}

MODELS: dict[str, Model] = {
    "llama": Model({**_LLAMA, **_rope(), **_BIAS, "head_dim": 12, "mlp_bias": True}),
    "mistral": Model({**_LLAMA, **_rope(), "head_dim": 12, "sliding_window": 5}),
    "ministral": Model({**_LLAMA, **_rope(), "head_dim": 12, "sliding_window": 4, "layer_types": _SLIDING}),
    "mixtral": Model(
        {**_LLAMA, **_rope(), "head_dim": 12, "sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 3},
        mlp=(),
    ),
    "qwen2": Model({**_LLAMA, **_rope(), "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": Model(
        {**_LLAMA, **_rope(), **_BIAS, "head_dim": 12, "use_sliding_window": True, "sliding_window": 4}
        | {"layer_types": _SLIDING}
    ),
    "qwen3_moe": Model(
        {**_LLAMA, **_rope(), **_BIAS, "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 28, "mlp_only_layers": [1], "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 7},
        # PEFT takes `gate_proj` here for parameters of the routed experts, which its X-LoRA cannot mix.
        mlp=(),
    ),
    "phi3": Model(
        {**_LLAMA, **LONGROPE, "sliding_window": 6}, attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")
    ),
    "phi": Model(
        {**_SHAPE, **_rope(partial_rotary_factor=0.5), "layer_norm_eps": 3e-3, "qk_layernorm": True},
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
    ),
    "gemma": Model({**_LLAMA, **_rope(), **_BIAS, "head_dim": 12, "tie_word_embeddings": False}),
    "gemma2": Model(
        {**_LLAMA, **_rope(), **_BIAS, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4}
        # A lower cap would make logits saturate and tie.
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0, "tie_word_embeddings": False}
    ),
    "gemma3_text": Model(
        {**_LLAMA, **_BIAS, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4, "layer_types": _SLIDING}
        | {"final_logit_softcapping": 3.0, "tie_word_embeddings": False, **_TWO_ROPES}
    ),
    "granite": Model(
        {**_LLAMA, **_rope(), **_BIAS, "mlp_bias": True, "embedding_multiplier": 3.0, "attention_multiplier": 0.4}
        | {"residual_multiplier": 0.6, "logits_scaling": 2.5}
    ),
    "olmo2": Model({**_LLAMA, **_rope(), **_BIAS}),
    "olmo3": Model({**_LLAMA, **_BIAS, **_TWO_ROPES, "sliding_window": 4, "layer_types": _SLIDING}),
    "stablelm": Model(
        {**_SHAPE, **_rope(partial_rotary_factor=0.5), "layer_norm_eps": 3e-3, "qk_layernorm": True}
        | {"use_qkv_bias": True}
    ),
    "smollm3": Model(
        {**_LLAMA, **_rope(), **_BIAS, "mlp_bias": True, "no_rope_layers": [1, 0, 1]}
        | {"tie_word_embeddings": False}
        | {"use_sliding_window": True, "sliding_window": 4}
    ),
    "starcoder2": Model({**_SHAPE, **_rope(), "norm_epsilon": 3e-3, "sliding_window": 6}, mlp=("c_fc", "c_proj")),
    "gpt_neox": Model(
        {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
        | {**_rope(partial_rotary_factor=0.5), "layer_norm_eps": 3e-3},
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        embedding="embed_in",
        in_peft=False,
    ),
    "gpt2": Model(
        {**_UNSET, "vocab_size": VOCAB, "n_embd": 48, "n_inner": 80, "n_layer": LAYERS, "n_head": 6}
        | {"n_positions": 128, "layer_norm_epsilon": 3e-3, "scale_attn_by_inverse_layer_idx": True},
        attention=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        embedding="wte",
        in_peft=False,
        lora={"fan_in_fan_out": True},
    ),
    "opt": Model(
        {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "intermediate_size")} | {"ffn_dim": 80},
        attention=("k_proj", "v_proj", "q_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        in_peft=False,
    ),
}

_VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}
_VISION_OF_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4}
_VISION_OF_QWEN |= {"out_hidden_size": 48}
_IMAGES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_WITHIN = r"model\.language_model\..*"

# Multimodal models: fields of the text side as of the family that it is alone.
MODELS |= {
    "gemma3": Model(
        {
            "text_config": {**MODELS["gemma3_text"].options, "final_logit_softcapping": None},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
            "tie_word_embeddings": False,
        },
        within=_WITHIN,
    ),
    "mistral3": Model(
        {
            "text_config": {**MODELS["mistral"].options, "model_type": "mistral"},
            "vision_config": {"model_type": "pixtral", **_VISION},
            "image_token_index": 10,
        },
        within=_WITHIN,
    ),
    "qwen2_5_vl": Model(
        {
            "text_config": {**MODELS["qwen2"].options, **_rope(mrope_section=[1, 1, 2])},
            "vision_config": {**_VISION_OF_QWEN, "fullatt_block_indexes": [0]},
            **_IMAGES,
        },
        within=_WITHIN,
    ),
    "qwen3_vl": Model(
        {
            "text_config": {
                **_LLAMA,
                **_BIAS,
                "head_dim": 12,
                **_rope(mrope_section=[2, 2, 2], mrope_interleaved=True),
            },
            "vision_config": {**_VISION_OF_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IMAGES,
        },
        within=_WITHIN,
    ),
}


def make_model(out_dir: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save the family's random model, with `changes` to its config, as a Hugging Face directory."""
    options = copy.deepcopy(dict(MODELS[family].options))
    auto = AutoModelForCausalLM
    if "text_config" in options:
        auto = AutoModelForImageTextToText
        tied = {name: changes.pop(name) for name in ("tie_word_embeddings",) if name in changes}
        options |= {"text_config": {**options["text_config"], **changes}, **tied}
        changes = {}
    config = CONFIG_MAPPING[family](**{**options, **changes})
    model = auto.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(out_dir)
    return Path(out_dir)


# ---------------------------------------------------------------------------------------------------------------------
# X-LoRA from its formulas, on a model of transformers


@dataclasses.dataclass(frozen=True)
class Formula:
    """The two passes of X-LoRA with a classifier of depth 1, layerwise.

    Attributes:
        base: model of transformers.
        adapters: directories of LoRA adapters, without experts on embeddings.
        weight: weight of the classifier, [L * N, D].
        bias: bias of the classifier, [L * N].
        temperature: temperature of the softmax.
        top_k: number of gates to keep.
        pass_value: gate of the scaling pass.
    """

    base: Any
    adapters: Sequence[Path]
    weight: torch.Tensor
    bias: torch.Tensor
    temperature: float
    top_k: int
    pass_value: float

    @property
    def layers(self) -> list[str]:
        """Return the adapted layers in the order of torch's modules."""
        adapted = {name for adapter in self.adapters for name in adapter_matrices(adapter)}
        return [name for name, _ in self.base.named_modules() if name in adapted]

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [B, T, V] and scalings [B, T, L, N]."""
        given = tensors(inputs)
        with torch.no_grad():
            constant = self._kept(torch.full((1, 1, len(self.layers), len(self.adapters)), self.pass_value))
            with self._mixing(constant):
                hidden = self.base(**given, output_hidden_states=True).hidden_states[-1]
            scores = torch.nn.functional.linear(hidden, self.weight, self.bias)
            scores = scores.reshape(*hidden.shape[:2], len(self.layers), len(self.adapters))
            scalings = torch.softmax(scores / self.temperature, dim=-1)
            with self._mixing(self._kept(scalings)):
                return self.base(**given).logits.numpy(), scalings.numpy()

    def _kept(self, scalings: torch.Tensor) -> torch.Tensor:
        values, places = torch.topk(scalings, self.top_k, dim=-1)
        return torch.zeros_like(scalings).scatter(-1, places, values)

    @contextmanager
    def _mixing(self, gates: torch.Tensor) -> Iterator[None]:
        handles = []
        for expert, adapter in enumerate(self.adapters):
            for name, (a, b, scale) in adapter_matrices(adapter).items():
                gate = gates[:, :, self.layers.index(name), expert, None]

                def add(module, args, output, gate=gate, a=a, b=b, scale=scale):
                    (x,) = args
                    return output + (scale * (gate * x.reshape(*gate.shape[:1], -1, x.shape[-1])) @ a.T @ b.T).reshape(
                        output.shape
                    )

                handles.append(self.base.get_submodule(name).register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def greedy(self, new: int, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Return the greedy continuation, recomputed from the start for every token: int64 [B, T + new]."""
        for _ in range(new):
            positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)
            logits, _ = self(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
            input_ids = np.concatenate([input_ids, logits[:, -1:].argmax(-1)], axis=1)
            attention_mask = np.concatenate([attention_mask, np.ones_like(attention_mask[:, :1])], axis=1)
        return input_ids
