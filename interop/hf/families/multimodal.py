"""Text part of multimodal models: Gemma 3, Mistral 3, Qwen2.5-VL, Qwen3-VL.

Their language model is a decoder that also exists by itself. Its module names have a prefix, and its config is nested
as ``text_config``. Images are not supported. For text alone, the complete model in transformers gives the same logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from interop.hf.families.fields import READ_UNDECLARED, Fields, declared_fields, read_attention_bias, read_rope
from interop.hf.families.llama import FAMILIES as TEXT_FAMILIES
from interop.hf.families.llama import head_dim_of, llama_config
from interop.hf.families.table import ATTENTION, LM_HEAD, MLP, NORMS, NORMS_AROUND, QK_NORMS, Family, Module
from xlora_jax.models import DecoderConfig

__all__ = ["FAMILIES", "Reader"]

Reader = Callable[[Fields], DecoderConfig]

# Declared fields of the vision part, of image and video tokens, and of initialization.
_OF_VISION = (
    *("vision_config", "image_token_id", "image_token_index", "video_token_id", "vision_start_token_id"),
    *("vision_end_token_id", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "projector_hidden_act"),
    *("vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"),
)


def _read_multimodal(fields: Fields, texts: Mapping[str, Reader]) -> DecoderConfig:
    """Read the nested text config; ``texts`` maps each allowed ``model_type`` to its reader."""
    for name in _OF_VISION:
        fields.take(name)
    # transformers uses this field for tying, and ignores the one in the nested config.
    tied = fields.take("tie_word_embeddings")
    text = fields.nested("text_config")
    model_type = text.peek("model_type")
    if model_type not in texts:
        raise text.error("model_type", model_type, " or ".join(map(repr, texts)))
    text.keep(declared_fields(model_type) | READ_UNDECLARED)
    declared = texts[model_type](text)
    text.finish()
    return dataclasses.replace(declared, tie_word_embeddings=tied)


def _read_gemma3(fields: Fields) -> DecoderConfig:
    cap = fields.peek("final_logit_softcapping")
    if cap is not None:
        raise fields.error(
            "final_logit_softcapping",
            cap,
            "None: transformers applies it to the text model alone, not in Gemma 3 as a whole",
        )
    return _reader_of("gemma3_text")(fields)


def _read_qwen2_5_vl(fields: Fields) -> DecoderConfig:
    return _with_mrope(fields, qkv_bias=True)


def _read_qwen3_vl(fields: Fields) -> DecoderConfig:
    return _with_mrope(fields, qk_norm="head", **read_attention_bias(fields))


def _with_mrope(fields: Fields, **declared: Any) -> DecoderConfig:
    """Read a config whose rope has axes for time, height and width, which are equal for text alone."""
    positions, rope = fields.take("max_position_embeddings"), fields.nested("rope_parameters")
    for name in ("mrope_section", "mrope_interleaved"):
        rope.take(name)
    return llama_config(fields, rope=read_rope(rope, head_dim_of(fields), positions), **declared)


def _reader_of(model_type: str) -> Reader:
    return next(family.read for family in TEXT_FAMILIES if family.model_type == model_type)


def _multimodal(
    model_type: str,
    causal_lm: str,
    texts: Mapping[str, Reader],
    block: tuple[Module, ...],
    starts: tuple[tuple[str, ...], ...],
    unread: tuple[str, ...],
) -> Family:
    name = "model.language_model"
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        read=lambda fields: _read_multimodal(fields, texts),
        before=(Module(f"{name}.embed_tokens", ("embed_tokens",), "embedding"),),
        blocks=f"{name}.layers",
        block=block,
        after=(Module(f"{name}.norm", ("norm",), "norm"), LM_HEAD),
        ignored=(".rotary_emb.inv_freq",),
        input_size="text_config",
        texts=tuple(texts),
        starts=starts,
        unread=unread,
    )


# transformers 5 writes the names of version 4.50 and earlier, and also reads newer ones.
_AS_LLAVA = (
    ("model.language_model.", "language_model.model.", "language_model."),
    ("lm_head", "language_model.lm_head"),
)
_SIDE_OF_LLAVA = ("vision_tower", "multi_modal_projector")

FAMILIES = (
    _multimodal(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"gemma3_text": _read_gemma3},
        (*ATTENTION, *QK_NORMS, *MLP, *NORMS_AROUND),
        _AS_LLAVA,
        _SIDE_OF_LLAVA,
    ),
    _multimodal(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"mistral": _reader_of("mistral")},
        (*ATTENTION, *MLP, *NORMS),
        _AS_LLAVA,
        _SIDE_OF_LLAVA,
    ),
    _multimodal(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"qwen2_5_vl_text": _read_qwen2_5_vl},
        (*ATTENTION, *MLP, *NORMS),
        (("model.language_model.", "model.", "language_model.model."),),
        ("visual",),
    ),
    _multimodal(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {"qwen3_vl_text": _read_qwen3_vl},
        (*ATTENTION, *QK_NORMS, *MLP, *NORMS),
        (("model.language_model.", "model.language_model.", "language_model.model."),),
        ("visual",),
    ),
)
