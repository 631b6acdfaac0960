"""Decoders with module names of their own: GPT-2, GPT-NeoX, OPT."""

from __future__ import annotations

from interop.hf.families.fields import Fields, read_activation, read_attention_bias
from interop.hf.families.llama import llama_config
from interop.hf.families.table import HEADS_OF_GPT, LM_HEAD, NORMS, SCORE, Family, Module, linears
from xlora_jax.models import DecoderConfig

__all__ = ["FAMILIES"]


def _read_gpt_neox(fields: Fields) -> DecoderConfig:
    return llama_config(
        fields,
        eps="layer_norm_eps",
        partial=True,
        norm="layer",
        qkv="interleaved",
        mlp="plain",
        mlp_bias=True,
        parallel="own" if fields.take("use_parallel_residual") else None,
        **read_attention_bias(fields),
    )


def _read_gpt2(fields: Fields) -> DecoderConfig:
    hidden, heads = fields.take("n_embd"), fields.take("n_head")
    # Upcasting has no effect, because our softmax always runs in float32. The other fields are for other heads.
    for name in ("reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation"):
        fields.take(name)
    for name in ("summary_proj_to_labels", "summary_first_dropout", "n_ctx", "task_specific_params"):
        fields.take(name)
    return DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("n_inner") or 4 * hidden,
        num_layers=fields.take("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        rope=None,
        learned_positions=fields.take("n_positions"),
        qkv="fused",
        attention_scale=None if fields.take("scale_attn_weights") else 1.0,
        attention_scale_by_depth=fields.take("scale_attn_by_inverse_layer_idx"),
        mlp="plain",
        activation=read_activation(fields, "activation_function"),
        norm="layer",
        norm_eps=fields.take("layer_norm_epsilon"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=fields.take("tie_word_embeddings"),
    )


def _read_opt(fields: Fields) -> DecoderConfig:
    hidden, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    embed, bias, before = (fields.take(n) for n in ("word_embed_proj_dim", "enable_bias", "do_layer_norm_before"))
    return DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("ffn_dim"),
        num_layers=fields.take("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        rope=None,
        learned_positions=fields.take("max_position_embeddings") + 2,
        position_offset=2,
        positions_from_mask=True,
        mlp="plain",
        activation=read_activation(fields, "activation_function"),
        norm="layer" if fields.take("layer_norm_elementwise_affine") else "layer_plain",
        norm_eps=1e-5,
        norm_placement="before" if before else "sum",
        final_norm=not fields.take("_remove_final_layer_norm") and before,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        embed_size=None if embed == hidden else embed,
    )


_GPT_NEOX = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    read=_read_gpt_neox,
    before=(Module("gpt_neox.embed_in", ("embed_tokens",), "embedding"),),
    blocks="gpt_neox.layers",
    block=(
        *NORMS,
        *linears(
            attention__query_key_value="self_attn.qkv_proj",
            attention__dense="self_attn.o_proj",
            mlp__dense_h_to_4h="mlp.up_proj",
            mlp__dense_4h_to_h="mlp.down_proj",
        ),
    ),
    after=(Module("gpt_neox.final_layer_norm", ("norm",), "norm"), *HEADS_OF_GPT),
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    renamed=(("lm_head", "embed_out"),),
)

_GPT2 = Family(
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    read=_read_gpt2,
    before=(
        Module("transformer.wte", ("embed_tokens",), "embedding"),
        Module("transformer.wpe", ("embed_positions",), "positions"),
    ),
    blocks="transformer.h",
    block=(
        Module("ln_1", ("pre_attention_norm",), "norm"),
        *linears("linear_in_out", attn__c_attn="self_attn.qkv_proj", attn__c_proj="self_attn.o_proj"),
        Module("ln_2", ("pre_mlp_norm",), "norm"),
        *linears("linear_in_out", mlp__c_fc="mlp.up_proj", mlp__c_proj="mlp.down_proj"),
    ),
    after=(Module("transformer.ln_f", ("norm",), "norm"), *HEADS_OF_GPT),
    ignored=(".attn.bias", ".attn.masked_bias"),
)

_OPT = Family(
    model_type="opt",
    causal_lm="OPTForCausalLM",
    read=_read_opt,
    before=(
        Module("model.decoder.embed_tokens", ("embed_tokens",), "embedding"),
        Module("model.decoder.embed_positions", ("embed_positions",), "positions"),
        Module("model.decoder.project_out", ("project_out",), "linear"),
        Module("model.decoder.project_in", ("project_in",), "linear"),
        Module("model.decoder.final_layer_norm", ("norm",), "norm"),
    ),
    blocks="model.decoder.layers",
    block=(
        *linears(
            self_attn__k_proj="self_attn.k_proj",
            self_attn__v_proj="self_attn.v_proj",
            self_attn__q_proj="self_attn.q_proj",
            self_attn__out_proj="self_attn.o_proj",
            fc1="mlp.up_proj",
            fc2="mlp.down_proj",
        ),
        # `do_layer_norm_before` selects one of the two; only that one has parameters.
        Module("self_attn_layer_norm", ("pre_attention_norm",), "norm"),
        Module("self_attn_layer_norm", ("post_attention_norm",), "norm"),
        Module("final_layer_norm", ("pre_mlp_norm",), "norm"),
        Module("final_layer_norm", ("post_mlp_norm",), "norm"),
    ),
    after=(LM_HEAD, SCORE),
)

FAMILIES = (_GPT_NEOX, _GPT2, _OPT)
