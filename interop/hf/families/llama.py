"""Decoders with the module names of Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interop.hf.families.fields import Fields, read_activation, read_attention_bias, read_rope, read_ropes, read_windows
from interop.hf.families.table import (
    ATTENTION,
    EMBED,
    HEADS,
    MLP,
    NORM,
    NORMS,
    NORMS_AROUND,
    QK_NORMS,
    Family,
    Module,
    linears,
    routed_experts,
)
from xlora_jax.models import DecoderConfig, RoutedMLP

__all__ = ["FAMILIES", "head_dim_of", "llama_config"]


def llama_config(
    fields: Fields,
    *,
    activation: str = "hidden_act",
    eps: str = "rms_norm_eps",
    partial: bool = False,
    **declared: Any,
) -> DecoderConfig:
    """Read the fields that most families share, under their usual names; ``declared`` gives the others."""
    heads, hidden = fields.take("num_attention_heads"), fields.take("hidden_size")
    layers = fields.take("num_hidden_layers")
    head_dim = fields.take("head_dim") or hidden // heads
    if "rope" not in declared:
        rope, positions = fields.nested("rope_parameters"), fields.take("max_position_embeddings")
        declared["rope"] = read_rope(rope, head_dim, positions, partial=partial)
    return DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.take("num_key_value_heads") or heads,
        head_dim=head_dim,
        activation=read_activation(fields, activation),
        norm_eps=fields.take(eps),
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        **declared,
        **read_windows(fields, layers),
    )


def _read_llama(fields: Fields) -> DecoderConfig:
    return llama_config(fields, **read_attention_bias(fields), mlp_bias=fields.take("mlp_bias", False))


def _read_mistral(fields: Fields) -> DecoderConfig:
    return llama_config(fields)


def _read_qwen2(fields: Fields) -> DecoderConfig:
    return llama_config(fields, qkv_bias=True)


def _read_qwen3(fields: Fields) -> DecoderConfig:
    return llama_config(fields, qk_norm="head", **read_attention_bias(fields))


def _read_phi3(fields: Fields) -> DecoderConfig:
    # transformers has copied them to `rope_parameters` if they have an effect.
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        fields.take(name)
    return llama_config(fields, partial=True, qkv="fused", mlp="fused_gated")


def _read_gemma(fields: Fields) -> DecoderConfig:
    return llama_config(fields, norm="rms_offset", embed_scale=_embed_scale(fields), **read_attention_bias(fields))


def _read_gemma2(fields: Fields) -> DecoderConfig:
    return llama_config(fields, **_gemma2(fields))


def _read_gemma3(fields: Fields) -> DecoderConfig:
    cap = fields.peek("attn_logit_softcapping")
    if cap is not None:
        raise fields.error(
            "attn_logit_softcapping", cap, "None: transformers reads it for Gemma 3 but does not apply it"
        )
    declared = _gemma2(fields)
    return llama_config(fields, qk_norm="head", **declared, **read_ropes(fields, head_dim_of(fields)))


def head_dim_of(fields: Fields) -> int:
    """Return C without marking its fields as read."""
    size: int = fields.peek("head_dim") or fields.peek("hidden_size") // fields.peek("num_attention_heads")
    return size


def _embed_scale(fields: Fields) -> float:
    return float(fields.peek("hidden_size") ** 0.5)


def _gemma2(fields: Fields) -> dict[str, Any]:
    """Return the declarations that Gemma 2 and 3 share."""
    return {
        "activation": "hidden_activation",
        "norm": "rms_offset",
        "norm_placement": "around",
        "embed_scale": _embed_scale(fields),
        "attention_scale": fields.take("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.take("attn_logit_softcapping"),
        "logit_softcap": fields.take("final_logit_softcapping"),
        **read_attention_bias(fields),
    }


def _read_granite(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields,
        input_multiplier=fields.take("embedding_multiplier"),
        attention_scale=fields.take("attention_multiplier"),
        residual_multiplier=fields.take("residual_multiplier"),
        logit_divisor=fields.take("logits_scaling"),
        mlp_bias=fields.take("mlp_bias", False),
        **read_attention_bias(fields),
    )


def _read_olmo2(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields, norm="rms_float32", norm_placement="after", qk_norm="whole", **read_attention_bias(fields)
    )


def _read_olmo3(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields,
        norm="rms_float32",
        norm_placement="after",
        qk_norm="whole",
        **read_ropes(fields, head_dim_of(fields)),
        **read_attention_bias(fields),
    )


def _read_stablelm(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields,
        eps="layer_norm_eps",
        partial=True,
        norm="layer",
        parallel="shared" if fields.take("use_parallel_residual") else None,
        qk_norm="each_head" if fields.take("qk_layernorm") else None,
        qkv_bias=fields.take("use_qkv_bias"),
    )


def _read_smollm3(fields: Fields) -> DecoderConfig:
    fields.take("no_rope_layer_interval")  # transformers has already converted it to `no_rope_layers`
    without = tuple(not rotates for rotates in fields.take("no_rope_layers"))
    return llama_config(fields, no_rope=without, mlp_bias=fields.take("mlp_bias", False), **read_attention_bias(fields))


def _read_starcoder2(fields: Fields) -> DecoderConfig:
    bias = fields.take("use_bias")
    return llama_config(
        fields, eps="norm_epsilon", norm="layer", mlp="plain", qkv_bias=bias, o_bias=bias, mlp_bias=bias
    )


def _read_phi(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields,
        eps="layer_norm_eps",
        partial=True,
        norm="layer",
        mlp="plain",
        parallel="shared",
        qk_norm="head" if fields.take("qk_layernorm") else None,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


def _read_mixtral(fields: Fields) -> DecoderConfig:
    width = fields.peek("intermediate_size")
    return llama_config(
        fields, routed=RoutedMLP(fields.take("num_local_experts"), fields.take("num_experts_per_tok"), width)
    )


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    experts = fields.take("num_local_experts")
    routed = RoutedMLP(
        experts, fields.take("num_experts_per_tok"), fields.take("moe_intermediate_size"), fields.take("norm_topk_prob")
    )
    dense, step = fields.take("mlp_only_layers"), fields.take("decoder_sparse_step")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(fields.peek("num_hidden_layers")))
    return llama_config(fields, qk_norm="head", routed=routed, routed_layers=layers, **read_attention_bias(fields))


def _named_as_llama(
    model_type: str,
    causal_lm: str,
    read: Callable[[Fields], DecoderConfig],
    block: tuple[Module, ...] = (*ATTENTION, *MLP, *NORMS),
    norm: Module = NORM,
) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        read=read,
        before=(EMBED,),
        blocks="model.layers",
        block=block,
        after=(norm, *HEADS),
        ignored=(".rotary_emb.inv_freq",),
    )


_PHI3 = linears(
    self_attn__o_proj="self_attn.o_proj",
    self_attn__qkv_proj="self_attn.qkv_proj",
    mlp__gate_up_proj="mlp.gate_up_proj",
    mlp__down_proj="mlp.down_proj",
)

_STARCODER2_MLP = linears(mlp__c_fc="mlp.up_proj", mlp__c_proj="mlp.down_proj")

_NORMS_OF_HEADS = (
    Module("self_attn.q_layernorm.norms.*", ("self_attn", "q_norm"), "norm"),
    Module("self_attn.k_layernorm.norms.*", ("self_attn", "k_norm"), "norm"),
)

_PHI = (
    *ATTENTION[:3],
    *linears(self_attn__dense="self_attn.o_proj"),
    Module("self_attn.q_layernorm", ("self_attn", "q_norm"), "norm"),
    Module("self_attn.k_layernorm", ("self_attn", "k_norm"), "norm"),
    *linears(mlp__fc1="mlp.up_proj", mlp__fc2="mlp.down_proj"),
    NORMS[0],
)

FAMILIES = (
    _named_as_llama("llama", "LlamaForCausalLM", _read_llama),
    _named_as_llama("mistral", "MistralForCausalLM", _read_mistral),
    _named_as_llama("ministral", "MinistralForCausalLM", _read_mistral),
    _named_as_llama(
        "mixtral",
        "MixtralForCausalLM",
        _read_mixtral,
        (*ATTENTION, *routed_experts("block_sparse_moe", "gate", "w1", "w3", "w2"), *NORMS),
    ),
    _named_as_llama("qwen2", "Qwen2ForCausalLM", _read_qwen2),
    _named_as_llama("qwen3", "Qwen3ForCausalLM", _read_qwen3, (*ATTENTION, *QK_NORMS, *MLP, *NORMS)),
    _named_as_llama(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _read_qwen3_moe,
        (
            *ATTENTION,
            *QK_NORMS,
            *MLP,
            *routed_experts("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
            *NORMS,
        ),
    ),
    _named_as_llama("phi3", "Phi3ForCausalLM", _read_phi3, (*_PHI3, *NORMS)),
    _named_as_llama("phi", "PhiForCausalLM", _read_phi, _PHI, Module("model.final_layernorm", ("norm",), "norm")),
    _named_as_llama("gemma", "GemmaForCausalLM", _read_gemma),
    _named_as_llama("gemma2", "Gemma2ForCausalLM", _read_gemma2, (*ATTENTION, *MLP, *NORMS_AROUND)),
    _named_as_llama(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _read_gemma3,
        (*ATTENTION, *QK_NORMS, *MLP, *NORMS_AROUND),
    ),
    _named_as_llama("granite", "GraniteForCausalLM", _read_granite),
    _named_as_llama("olmo2", "Olmo2ForCausalLM", _read_olmo2, (*ATTENTION, *QK_NORMS, *MLP, *NORMS_AROUND)),
    _named_as_llama("olmo3", "Olmo3ForCausalLM", _read_olmo3, (*ATTENTION, *QK_NORMS, *MLP, *NORMS_AROUND)),
    _named_as_llama("stablelm", "StableLmForCausalLM", _read_stablelm, (*ATTENTION, *_NORMS_OF_HEADS, *MLP, *NORMS)),
    _named_as_llama("smollm3", "SmolLM3ForCausalLM", _read_smollm3),
    _named_as_llama("starcoder2", "Starcoder2ForCausalLM", _read_starcoder2, (*ATTENTION, *_STARCODER2_MLP, *NORMS)),
)
