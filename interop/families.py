"""Model families of transformers: how each one's config reads and where its modules stand in our variables.

One table of names per family, from which loading, saving, the order of the adapted layers and the README's table of
families all derive. A config field is read, or it is known not to change the output, or it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xlora_jax.layers import ABSENT, AdaptedLayers, Slot
from xlora_jax.models import DecoderConfig, Rope

__all__ = ["FAMILIES", "Family", "Module", "Placed", "decoder_config", "family_of"]


@dataclass(frozen=True)
class Module:
    """One row of a family's table: a torch module and the place of its variables.

    Attributes:
        hf: name of the torch module; inside a block, relative to it.
        path: keys of our module, likewise.
        kind: ``linear`` (``weight [out, in]``, ``bias``), ``embedding`` (``weight [V, D]``), ``norm`` (``weight [D]``).
    """

    hf: str
    path: tuple[str, ...]
    kind: str


def _rows(kind: str, *names: str) -> tuple[Module, ...]:
    """Rows whose keys are the parts of the torch name."""
    return tuple(Module(name, tuple(name.split(".")), kind) for name in names)


@dataclass(frozen=True)
class Placed:
    """A torch module of one model, and its place.

    Attributes:
        hf: full torch name, such as ``model.layers.3.mlp.up_proj``.
        path: keys of the module in our variables.
        member: index on the leading axis where blocks are stacked, else None.
        kind: as in :class:`Module`.
    """

    hf: str
    path: tuple[str, ...]
    member: int | None
    kind: str


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of transformers.

    Attributes:
        model_type: its name there.
        causal_lm: the class that has an output head, as ``architectures`` in config.json names it.
        read: from config fields to a declaration.
        before: modules before the blocks, in the order in which torch declares them.
        blocks: torch name of the list of blocks.
        block: modules of one block, in torch's order.
        after: modules behind the blocks.
        ignored: ends of tensor names that old checkpoints carry and no model reads.
    """

    model_type: str
    causal_lm: str
    read: Callable[[Fields], DecoderConfig]
    before: tuple[Module, ...]
    blocks: str
    block: tuple[Module, ...]
    after: tuple[Module, ...]
    ignored: tuple[str, ...] = ()

    def modules(self, num_layers: int, *, stacked: bool) -> Iterator[Placed]:
        """All modules in torch's pre-order, which is the order in which PEFT numbers adapted layers."""
        for row in self.before:
            yield Placed(row.hf, row.path, None, row.kind)
        for i in range(num_layers):
            for row in self.block:
                path = ("layers", *row.path) if stacked else (f"layers_{i}", *row.path)
                yield Placed(f"{self.blocks}.{i}.{row.hf}", path, i if stacked else None, row.kind)
        for row in self.after:
            yield Placed(row.hf, row.path, None, row.kind)

    def adapted_layers(
        self, num_layers: int, adapted: Collection[str], *, stacked: bool, with_bias: bool
    ) -> AdaptedLayers:
        """Number the modules named in ``adapted`` as PEFT does."""
        names: list[str] = []
        slots: dict[tuple[str, ...], int | list[int]] = {}
        for module in self.modules(num_layers, stacked=stacked):
            number = ABSENT
            if module.hf in adapted:
                number = len(names)
                names.append(module.hf)
            if module.member is None:
                slots[module.path] = number
            else:
                numbers = slots.setdefault(module.path, [])
                assert isinstance(numbers, list)
                numbers.append(number)
        kept = [
            Slot(path, tuple(numbers) if isinstance(numbers, list) else numbers)
            for path, numbers in slots.items()
            if (set(numbers) if isinstance(numbers, list) else {numbers}) != {ABSENT}
        ]
        return AdaptedLayers(tuple(names), tuple(kept), with_bias)


class Fields:
    """The fields of a config, each to be taken once; what is left over is refused unless it has no effect."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._left = dict(values)
        self._where = where

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field and strike it off."""
        return self._left.pop(name, default)

    def nested(self, name: str) -> Fields:
        """Return a field that is itself a mapping."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Fields(value, f"{self._where}, {name}")

    def error(self, name: str, value: object, expected: str) -> ValueError:
        """Make the error for a field that has no meaning here."""
        return ValueError(f"{self._where}: field {name!r}: expected {expected}, got {value!r}")

    def finish(self, neutral: Mapping[str, tuple[Any, ...]], without_effect: Collection[str] = ()) -> None:
        """Refuse what is left, unless it is at a neutral value or known to have no effect."""
        for name, value in self._left.items():
            if name in without_effect or (name in neutral and value in neutral[name]):
                continue
            if name in neutral:
                raise self.error(name, value, f"{neutral[name][0]!r}, the only value that is implemented")
            raise ValueError(
                f"{self._where}: field {name!r} (value {value!r}) is not implemented, and ignoring it could change the "
                f"output; if it does not matter for your model, remove it from config.json"
            )


# Fields of PreTrainedConfig and of checkpoints on the hub that say nothing about the forward pass. The base model is
# frozen and runs without dropout; how `generate` behaves is told by its arguments.
_WITHOUT_EFFECT = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "auto_map"),
        *("return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript", "pretraining_tp"),
        *("id2label", "label2id", "problem_type", "num_labels", "initializer_range", "attention_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
        *("_attn_implementation", "attn_implementation", "unsloth_version", "unsloth_fixed"),
    )
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def decoder_config(family: Family, config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a config of ``transformers`` (``AutoConfig(...).to_dict()``).

    Args:
        family: the family that its ``model_type`` names.
        config: all its fields.
        where: what to call it in errors.

    Raises:
        ValueError: a field has a value that is not implemented; the message names it.
    """
    fields = Fields(config, where)
    try:
        declared = family.read(fields)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error
    fields.finish(_NEUTRAL, _WITHOUT_EFFECT)
    return declared


def _rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """Read ``rope_parameters``, as ``transformers.modeling_rope_utils`` does."""
    rope = fields.nested("rope_parameters")
    kind, theta = rope.take("rope_type", "default"), rope.take("rope_theta")
    rope.take("type")  # the old name of rope_type, which transformers has read already
    dim = head_dim
    read: dict[str, Any] = {}
    if kind == "linear":
        read = {"factor": rope.take("factor")}
    elif kind == "llama3":
        read = {
            "factor": rope.take("factor"),
            "low_freq_factor": rope.take("low_freq_factor"),
            "high_freq_factor": rope.take("high_freq_factor"),
            "original_length": rope.take("original_max_position_embeddings"),
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
    rope.finish({"partial_rotary_factor": (1.0, None)})
    return Rope(dim=dim, theta=theta, kind=kind, **read)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_llama(fields: Fields) -> DecoderConfig:
    """Read what llama, mistral and qwen2 share, and each one's own fields."""
    heads = fields.take("num_attention_heads")
    hidden = fields.take("hidden_size")
    head_dim = fields.take("head_dim") or hidden // heads
    layers = fields.take("num_hidden_layers")
    activation = fields.take("hidden_act")
    if activation not in _ACTIVATIONS:
        raise fields.error("hidden_act", activation, f"one of {', '.join(_ACTIVATIONS)}")
    return DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.take("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=_rope(fields, head_dim, fields.take("max_position_embeddings")),
        activation=_ACTIVATIONS[activation],
        norm_eps=fields.take("rms_norm_eps"),
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        **_biases(fields),
        **_windows(fields, layers),
    )


def _biases(fields: Fields) -> dict[str, bool]:
    if fields.take("model_type") == "qwen2":
        return {"qkv_bias": True}
    attention = fields.take("attention_bias", False)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": fields.take("mlp_bias", False)}


def _windows(fields: Fields, layers: int) -> dict[str, Any]:
    window = fields.take("sliding_window")
    # transformers has resolved these two into `layer_types` and `sliding_window`.
    fields.take("use_sliding_window")
    fields.take("max_window_layers")
    kinds = fields.take("layer_types")
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", sorted(unknown), "full_attention or sliding_attention")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"window": window, "sliding": sliding} if any(sliding) else {}


def _llama_like(model_type: str, causal_lm: str) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        read=_read_llama,
        before=(Module("model.embed_tokens", ("embed_tokens",), "embedding"),),
        blocks="model.layers",
        block=(
            *_rows("linear", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *_rows("linear", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            *_rows("norm", "input_layernorm", "post_attention_layernorm"),
        ),
        after=(Module("model.norm", ("norm",), "norm"), Module("lm_head", ("lm_head",), "linear")),
        ignored=(".rotary_emb.inv_freq",),
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama", "LlamaForCausalLM"),
        _llama_like("mistral", "MistralForCausalLM"),
        _llama_like("qwen2", "Qwen2ForCausalLM"),
    )
}


def family_of(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``, or raise a ValueError that lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{where}: field 'model_type': expected one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]
