"""Reader of the fields in a config.json.

A field is a setting if the config class in transformers declares it, or transformers' model code reads it. Each setting
is used, known to have no effect, or refused by name. All other fields are skipped with one warning, because
transformers ignores them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import lru_cache
from inspect import signature
from typing import Any, cast

from interop.storage.errors import FormatError, brief
from xlora_jax.models import Rope

__all__ = [
    "DECODER_HEADS",
    "ENCODER_HEADS",
    "NEUTRAL",
    "READ_UNDECLARED",
    "TASKS",
    "WITHOUT_EFFECT",
    "Fields",
    "NoHeadError",
    "count_labels",
    "declared_fields",
    "read_activation",
    "read_attention_bias",
    "read_rope",
    "read_ropes",
    "read_windows",
    "task_of",
]


class NoHeadError(FormatError):
    """The base has no classification head, so it loads only with the head of an adapter."""


class Fields:
    """Settings of a config. Each is taken once; a remaining setting is refused unless it has no effect."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._left = dict(values)
        self._where = where
        self.passed_over: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field and mark it as read."""
        return self._left.pop(name, default)

    def keep(self, settings: frozenset[str]) -> None:
        """Skip the fields that are not in ``settings``."""
        self.passed_over += [n for n in self._left if n not in settings and n not in WITHOUT_EFFECT]
        self._left = {name: value for name, value in self._left.items() if name in settings}

    def peek(self, name: str) -> Any:
        """Return a field without marking it as read."""
        return self._left.get(name)

    def nested(self, name: str) -> Fields:
        """Return a field that is a mapping, and mark it as read; both objects share the list of skipped fields."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        inner = Fields(value, f"{self._where}, {name}")
        inner.passed_over = self.passed_over
        return inner

    def number(self, name: str) -> float:
        """Return a field that is a number above 0, and mark it as read."""
        value: Any = self.take(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, value, "a number above 0")
        return cast(float, value)

    def error(self, name: str, value: object, expected: str) -> FormatError:
        """Make the error for a field with an unusable value."""
        return FormatError(f"{self._where}: field {name!r}: expected {expected}, got {brief(value)}")

    def pass_over_rest(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Skip the remaining fields, but refuse a field of ``neutral`` that has none of its neutral values."""
        for name, value in self._left.items():
            if name not in neutral:
                self.passed_over.append(name)
            elif value not in neutral[name]:
                raise self.error(name, value, f"{neutral[name][0]!r}, the only value that is implemented")

    def finish(self) -> None:
        """Refuse the remaining fields, unless they have no effect or a neutral value."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            if name in NEUTRAL:
                raise self.error(name, value, f"{NEUTRAL[name][0]!r}, the only value that is implemented")
            raise FormatError(
                f"{self._where}: field {name!r} (value {brief(value)}) is not implemented, and transformers declares "
                f"it, so ignoring it could change the output; if it does not matter for your model, remove it from "
                f"config.json"
            )


# Declared fields that do not affect the forward pass. The base model is frozen and runs without dropout. Generation is
# configured by the arguments of `generate`.
WITHOUT_EFFECT = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "auto_map"),
        *("return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript", "pretraining_tp"),
        *("id2label", "label2id", "problem_type", "num_labels", "initializer_range", "attention_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
        *("_attn_implementation", "attn_implementation", "init_std", "activation_dropout"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout", "layerdrop", "residual_dropout"),
        *("embedding_dropout", "classifier_dropout", "router_aux_loss_coef", "output_router_logits"),
        *("router_jitter_noise",),
        # Old fields, which the config classes have already converted to `layer_types` and `rope_parameters`.
        *("sliding_window_pattern", "global_attn_every_n_layers", "partial_rotary_factor"),
    )
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True, None),
    "per_layer_config": (None, {}),
}
# Fields that transformers' config classes do not declare, although its code reads them, for one model or for all
# (masks, layers of unequal shape, quantization).
READ_UNDECLARED = frozenset(
    (
        *("head_dim", "num_labels", "classifier_dropout", "hidden_dropout", "is_causal", "per_layer_config"),
        *("quantization_config", "tie_word_embeddings", "architectures", "dtype", "model_type", "summary_last_dropout"),
        *("_attn_implementation",),
    )
)


@lru_cache(maxsize=64)
def declared_fields(model_type: str) -> frozenset[str]:
    """Return the fields that the installed transformers declares for a ``model_type``, including old spellings."""
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    declared = {*config_class().to_dict(), *config_class.attribute_map, *signature(config_class).parameters}
    if is_dataclass(config_class):
        declared |= {field.name for field in dataclass_fields(config_class)}
    return frozenset(declared)


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "tanh": "tanh",
}

# Map of PEFT's task_type to the suffix of transformers' class name for it.
TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
}
DECODER_HEADS = {"SequenceClassification": "last", "TokenClassification": "token"}
ENCODER_HEADS = {"SequenceClassification": "pooled", "TokenClassification": "token", "ImageClassification": "first"}


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return the task from the class name, the part after ``For``; None without a class."""
    return next((name.split("For")[-1] for name in config.get("architectures") or ()), None)


def count_labels(config: Mapping[str, Any]) -> int:
    """Return the number of classes, two if the config has none."""
    return len(config.get("id2label") or (0, 1))


def read_rope(rope: Fields, head_dim: int, max_positions: int, *, partial: bool = False) -> Rope:
    """Read ``rope_parameters``, as ``transformers.modeling_rope_utils`` does.

    Args:
        rope: fields of ``rope_parameters``.
        head_dim: C.
        max_positions: value of ``max_position_embeddings``.
        partial: whether the family's attention can rotate a part of each head.
    """
    kind, theta = rope.take("rope_type", "default"), rope.number("rope_theta")
    rope.take("type")  # the old name of rope_type, which transformers has already read
    dim = int(head_dim * rope.take("partial_rotary_factor", 1.0)) if partial else head_dim
    read: dict[str, Any] = {}
    if kind == "linear":
        read = {"factor": rope.number("factor")}
    elif kind == "llama3":
        read = {
            "factor": rope.number("factor"),
            "low_freq_factor": rope.number("low_freq_factor"),
            "high_freq_factor": rope.number("high_freq_factor"),
            "original_length": rope.number("original_max_position_embeddings"),
        }
    elif kind in ("yarn", "longrope"):
        original = rope.take("original_max_position_embeddings")
        given = rope.take("factor")
        factor = max_positions / original if given is None else given
        attention = rope.take("attention_factor")
        read = {"original_length": original, "factor": factor}
        if kind == "yarn":
            scale, scale_all = rope.take("mscale"), rope.take("mscale_all_dim")
            if attention is None:
                attention = _yarn_scale(factor, 1.0)
                if scale and scale_all:
                    attention = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all)
            read["beta_fast"] = rope.take("beta_fast") or 32
            read["beta_slow"] = rope.take("beta_slow") or 1
            read["truncate"] = rope.take("truncate", True)
        else:
            if attention is None:
                attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            read["short_factor"] = tuple(rope.take("short_factor"))
            read["long_factor"] = tuple(rope.take("long_factor"))
        read["attention_factor"] = attention
    elif kind == "dynamic":
        raise rope.error(
            "rope_type",
            kind,
            "default, linear, llama3, yarn or longrope ('dynamic' changes the frequencies with every token past the "
            "original length, so that no cache stays true; below that length it is 'default': set that, or 'yarn', in "
            "config.json)",
        )
    elif kind != "default":
        raise rope.error("rope_type", kind, "default, linear, llama3, yarn or longrope")
    # transformers reads only the parameters of the given kind, and warns about others.
    rope.pass_over_rest({"partial_rotary_factor": (1.0, None)})
    return Rope(dim=dim, theta=theta, kind=kind, **read)


def read_ropes(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Return the rope of the full-attention blocks and the rope of the sliding blocks."""
    positions, rope = fields.take("max_position_embeddings"), fields.nested("rope_parameters")
    read = {
        "rope": read_rope(rope.nested("full_attention"), head_dim, positions),
        "sliding_rope": read_rope(rope.nested("sliding_attention"), head_dim, positions),
    }
    rope.pass_over_rest({})
    return read


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_activation(fields: Fields, name: str = "hidden_act") -> str:
    """Return our name for the activation in the field ``name``."""
    value = fields.take(name)
    if value not in _ACTIVATIONS:
        raise fields.error(name, value, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def read_windows(fields: Fields, layers: int) -> dict[str, Any]:
    """Return the window size and the blocks that attend within it."""
    window = fields.take("sliding_window")
    # transformers has already converted these to `layer_types` and `sliding_window`.
    for name in ("use_sliding_window", "max_window_layers", "_sliding_window_pattern", "sliding_window_pattern"):
        fields.take(name)
    kinds = fields.take("layer_types")
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", sorted(unknown), "full_attention or sliding_attention")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"window": window, "sliding": sliding} if any(sliding) else {}


def read_attention_bias(fields: Fields) -> dict[str, Any]:
    """Return the bias flags of the attention projections, which ``attention_bias`` turns on together."""
    bias = fields.take("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}
