"""Encoders with a classification head: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ModernBERT, ViT."""

from __future__ import annotations

from typing import Any

from interop.hf.families.fields import (
    ENCODER_HEADS,
    Fields,
    NoHeadError,
    count_labels,
    read_activation,
    read_attention_bias,
    read_ropes,
    task_of,
)
from interop.hf.families.table import Family, Module, linears
from xlora_jax.models import Encoder, EncoderConfig, VisionTransformer

__all__ = ["FAMILIES"]


def _read_head(fields: Fields, family: str) -> dict[str, Any]:
    """Return the declaration of the classification head, or raise :class:`NoHeadError` if there is none."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "tie_word_embeddings"):
        fields.take(name)
    if decodes := fields.take("is_decoder", False):
        raise fields.error("is_decoder", decodes, "False")
    architectures, labels = fields.take("architectures"), fields.take("id2label")
    task = task_of({"architectures": architectures})
    if task not in ENCODER_HEADS:
        expected = f"{family}For{' or '.join(ENCODER_HEADS)}, or adapters that bring a classification head"
        raise NoHeadError(str(fields.error("architectures", architectures, expected)))
    return {"num_labels": count_labels({"id2label": labels}), "head": ENCODER_HEADS[task]}


def _read_encoder(fields: Fields, family: str) -> dict[str, Any]:
    """Return the part of a declaration that BERT, RoBERTa and ViT share."""
    heads, hidden = fields.take("num_attention_heads"), fields.take("hidden_size")
    return {
        **_read_head(fields, family),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "num_layers": fields.take("num_hidden_layers"),
        "intermediate_size": fields.take("intermediate_size"),
        "activation": read_activation(fields),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps"),
        "rope": None,
        "mlp": "plain",
        "o_bias": True,
        "mlp_bias": True,
    }


_ROBERTA_STEMS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


def _read_bert(fields: Fields) -> EncoderConfig:
    roberta = _ROBERTA_STEMS.get(fields.peek("model_type"))
    if (kind := fields.take("position_embedding_type", "absolute")) != "absolute":
        raise fields.error("position_embedding_type", kind, "'absolute'")
    padding = fields.peek("pad_token_id")
    return EncoderConfig(
        vocab_size=fields.take("vocab_size"),
        token_types=fields.take("type_vocab_size"),
        learned_positions=fields.take("max_position_embeddings"),
        # RoBERTa counts positions from its padding token id, and only for other tokens.
        position_offset=padding + 1 if roberta else 0,
        padding_token=padding if roberta else None,
        qkv_bias=True,
        norm_placement="sum",
        **_read_encoder(fields, roberta or "Bert"),
    )


def _read_distilbert(fields: Fields) -> EncoderConfig:
    # The file contains the position table, whether sinusoidal or learned.
    for name in ("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout"):
        fields.take(name)
    heads, hidden = fields.take("n_heads"), fields.take("dim")
    return EncoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("hidden_dim"),
        num_layers=fields.take("n_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        rope=None,
        learned_positions=fields.take("max_position_embeddings"),
        mlp="plain",
        activation=read_activation(fields, "activation"),
        norm="layer",
        norm_eps=1e-12,  # fixed in transformers
        norm_placement="sum",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        pooler_activation="relu",
        **_read_head(fields, "DistilBert"),
    )


def _read_modernbert(fields: Fields) -> EncoderConfig:
    # Fields of training, or of the masked-token head.
    for name in ("initializer_cutoff_factor", "mlp_dropout", "decoder_bias", "sparse_prediction", "cls_token_id"):
        fields.take(name)
    for name in ("sparse_pred_ignore_index", "deterministic_flash_attn"):
        fields.take(name)
    heads, hidden = fields.take("num_attention_heads"), fields.take("hidden_size")
    # transformers has already converted `global_attn_every_n_layers` into this field.
    sliding = tuple(kind == "sliding_attention" for kind in fields.take("layer_types"))
    reach, pooling = fields.take("local_attention") // 2, fields.take("classifier_pooling")
    return EncoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("intermediate_size"),
        num_layers=fields.take("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        **read_ropes(fields, hidden // heads),
        window=reach if any(sliding) else None,
        sliding=sliding if any(sliding) else (),
        qkv="fused",
        mlp="fused_gated",
        activation=read_activation(fields, "hidden_activation"),
        norm="layer" if fields.take("norm_bias") else "layer_unbiased",
        norm_eps=fields.take("norm_eps"),
        first_norm=False,
        final_norm=True,
        mlp_bias=fields.take("mlp_bias"),
        pooler_activation=read_activation(fields, "classifier_activation"),
        pooler_bias=fields.take("classifier_bias"),
        pooler_norm=True,
        pools_tokens=True,
        pools_mean=pooling == "mean",
        **read_attention_bias(fields),
        **_read_head(fields, "ModernBert"),
    )


def _read_vit(fields: Fields) -> EncoderConfig:
    # Fields of the pooler and of masked images, which the classifier does not use.
    for name in ("encoder_stride", "pooler_output_size", "pooler_act"):
        fields.take(name)

    def pair(name: str) -> tuple[int, ...]:
        value = fields.take(name)
        return (value, value) if isinstance(value, int) else tuple(value)

    return EncoderConfig(
        vocab_size=0,
        image_size=pair("image_size"),
        patch_size=pair("patch_size"),
        channels=fields.take("num_channels"),
        qkv_bias=fields.take("qkv_bias"),
        **_read_encoder(fields, "ViT"),
    )


def _bert(model_type: str, causal_lm: str, prefix: str, head: tuple[Module, ...]) -> Family:
    name = f"{prefix}.embeddings"
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        read=_read_bert,
        before=(
            Module(f"{name}.word_embeddings", ("embed_tokens",), "embedding"),
            Module(f"{name}.position_embeddings", ("embed_positions",), "positions"),
            Module(f"{name}.token_type_embeddings", ("embed_types",), "positions"),
            Module(f"{name}.LayerNorm", ("embed_norm",), "norm"),
        ),
        blocks=f"{prefix}.encoder.layer",
        block=(
            *linears(
                attention__self__query="self_attn.q_proj",
                attention__self__key="self_attn.k_proj",
                attention__self__value="self_attn.v_proj",
                attention__output__dense="self_attn.o_proj",
                intermediate__dense="mlp.up_proj",
                output__dense="mlp.down_proj",
            ),
            Module("attention.output.LayerNorm", ("post_attention_norm",), "norm"),
            Module("output.LayerNorm", ("post_mlp_norm",), "norm"),
        ),
        after=head,
        ignored=(".embeddings.position_ids", ".embeddings.token_type_ids"),
        formerly=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
        module=Encoder,
        head_first=model_type == "xlm-roberta",
    )


_VIT = Family(
    model_type="vit",
    causal_lm="ViTForImageClassification",
    read=_read_vit,
    before=(
        Module("vit.embeddings", ("embeddings",), "class_token"),
        Module("vit.embeddings.patch_embeddings.projection", ("patches",), "conv"),
    ),
    blocks="vit.layers",
    block=(
        *linears(
            attention__q_proj="self_attn.q_proj",
            attention__k_proj="self_attn.k_proj",
            attention__v_proj="self_attn.v_proj",
            attention__o_proj="self_attn.o_proj",
            mlp__fc1="mlp.up_proj",
            mlp__fc2="mlp.down_proj",
        ),
        Module("layernorm_before", ("pre_attention_norm",), "norm"),
        Module("layernorm_after", ("pre_mlp_norm",), "norm"),
    ),
    after=(Module("vit.layernorm", ("norm",), "norm"), Module("classifier", ("classifier",), "linear")),
    # Files use the names of transformers 4.
    renamed=(
        ("vit.layers.", "vit.encoder.layer."),
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    ),
    # For masked images, which are used only in pretraining.
    ignored=(".embeddings.mask_token",),
    module=VisionTransformer,
    input_size="image_size",
)

_DISTILBERT = Family(
    model_type="distilbert",
    causal_lm="DistilBertForSequenceClassification or DistilBertForTokenClassification",
    read=_read_distilbert,
    before=(
        Module("distilbert.embeddings.word_embeddings", ("embed_tokens",), "embedding"),
        Module("distilbert.embeddings.position_embeddings", ("embed_positions",), "positions"),
        Module("distilbert.embeddings.LayerNorm", ("embed_norm",), "norm"),
    ),
    blocks="distilbert.transformer.layer",
    block=(
        *linears(
            attention__q_lin="self_attn.q_proj",
            attention__k_lin="self_attn.k_proj",
            attention__v_lin="self_attn.v_proj",
            attention__out_lin="self_attn.o_proj",
        ),
        Module("sa_layer_norm", ("post_attention_norm",), "norm"),
        *linears(ffn__lin1="mlp.up_proj", ffn__lin2="mlp.down_proj"),
        Module("output_layer_norm", ("post_mlp_norm",), "norm"),
    ),
    after=(
        Module("pre_classifier", ("pooler",), "linear"),
        Module("classifier", ("classifier",), "linear"),
        Module("classifier", ("token_classifier",), "linear"),
    ),
    ignored=(".embeddings.position_ids",),
    module=Encoder,
)

_MODERNBERT = Family(
    model_type="modernbert",
    causal_lm="ModernBertForSequenceClassification or ModernBertForTokenClassification",
    read=_read_modernbert,
    before=(
        Module("model.embeddings.tok_embeddings", ("embed_tokens",), "embedding"),
        Module("model.embeddings.norm", ("embed_norm",), "norm"),
    ),
    blocks="model.layers",
    block=(
        Module("attn_norm", ("pre_attention_norm",), "norm"),
        *linears(attn__Wqkv="self_attn.qkv_proj", attn__Wo="self_attn.o_proj"),
        Module("mlp_norm", ("pre_mlp_norm",), "norm"),
        *linears(mlp__Wi="mlp.gate_up_proj", mlp__Wo="mlp.down_proj"),
    ),
    after=(
        Module("model.final_norm", ("norm",), "norm"),
        Module("head.dense", ("pooler",), "linear"),
        Module("head.norm", ("pooler_norm",), "norm"),
        Module("classifier", ("classifier",), "linear"),
        Module("classifier", ("token_classifier",), "linear"),
    ),
    module=Encoder,
)

_ROBERTA_HEAD = (
    Module("classifier.dense", ("pooler",), "linear"),
    Module("classifier.out_proj", ("classifier",), "linear"),
    Module("classifier", ("token_classifier",), "linear"),
)

FAMILIES = (
    _bert(
        "bert",
        "BertForSequenceClassification or BertForTokenClassification",
        "bert",
        (
            Module("bert.pooler.dense", ("pooler",), "linear"),
            Module("classifier", ("classifier",), "linear"),
            Module("classifier", ("token_classifier",), "linear"),
        ),
    ),
    *(
        _bert(name, f"{stem}ForSequenceClassification or {stem}ForTokenClassification", "roberta", _ROBERTA_HEAD)
        for name, stem in _ROBERTA_STEMS.items()
    ),
    _DISTILBERT,
    _MODERNBERT,
    _VIT,
)
