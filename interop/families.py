"""Model families of transformers: how each one's config reads and where its modules stand in our variables.

One table of names per family, from which loading, saving, the order of the adapted layers and the README's table of
families all derive. A config field is read, or it is known not to change the output, or it is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jax

from interop.errors import FormatError, brief
from xlora_jax.layers import ABSENT, AdaptedLayers, Slot
from xlora_jax.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    Rope,
    RoutedMLP,
    Transformer,
    VisionTransformer,
)
from xlora_jax.trees import flatten

__all__ = [
    "ADAPTABLE",
    "FAMILIES",
    "LEAVES",
    "TASKS",
    "Family",
    "Module",
    "Placed",
    "abstract_params",
    "classifying",
    "decoder_config",
    "family_of",
]


@lru_cache(maxsize=32)
def abstract_params(module: Transformer) -> Mapping[str, Any]:
    """Shapes and dtypes of a module's parameters, without making them."""
    variables = jax.eval_shape(module.init, jax.random.key(0), **module.example_inputs())
    params: Mapping[str, Any] = variables["params"]
    return params


@dataclass(frozen=True)
class Module:
    """One row of a family's table: a torch module and the place of its variables.

    A row of which a model has no parameters (a norm that its config leaves out, say) is passed over.

    Attributes:
        hf: name of the torch module; inside a block, relative to it. ``*`` counts the experts of a base model's own
            mixture.
        path: keys of our module, likewise.
        kind: a key of :data:`LEAVES`.
    """

    hf: str
    path: tuple[str, ...]
    kind: str


def _rows(kind: str, *names: str) -> tuple[Module, ...]:
    """Rows whose keys are the parts of the torch name."""
    return tuple(Module(name, tuple(name.split(".")), kind) for name in names)


# For each kind of module: our leaf -> torch's tensor, and the order of torch's axes in ours (empty: the same). Both
# directions read this table.
LEAVES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "linear": {"kernel": ("weight", (1, 0)), "bias": ("bias", ())},
    # transformers' Conv1D (GPT-2): stored [in, out], which PEFT calls fan_in_fan_out.
    "linear_in_out": {"kernel": ("weight", ()), "bias": ("bias", ())},
    "conv": {"kernel": ("weight", (2, 3, 1, 0)), "bias": ("bias", ())},
    # Not torch modules of their own in transformers 5, so that no adapter can target them.
    "router": {"kernel": ("weight", (1, 0))},
    "routed": {"kernel": ("weight", (1, 0))},
    "embedding": {"embedding": ("weight", ())},
    "positions": {"embedding": ("weight", ())},
    "class_token": {"cls_token": ("cls_token", ()), "position_embeddings": ("position_embeddings", ())},
    "norm": {"scale": ("weight", ()), "bias": ("bias", ())},
}
# The kinds that LoRA can adapt, and what an adapter calls them.
ADAPTABLE = {"linear": "linear", "linear_in_out": "linear", "embedding": "embedding", "conv": "conv"}


@dataclass(frozen=True)
class Placed:
    """A torch module of one model, and its place.

    Attributes:
        hf: full torch name, such as ``model.layers.3.mlp.up_proj``.
        path: keys of the module in our variables.
        member: index on the leading axes where modules are stacked; empty where they are not.
        kind: as in :class:`Module`.
    """

    hf: str
    path: tuple[str, ...]
    member: tuple[int, ...]
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
        renamed: pairs of a part of a torch name and what stands for it in files.
        formerly: pairs of the end of a tensor's name in old files and what it is now.
        module: the Flax module that a declaration is for.
        input_size: the field that says how much there is of what goes in: words, or pixels.
    """

    model_type: str
    causal_lm: str
    read: Callable[[Fields], DecoderConfig]
    before: tuple[Module, ...]
    blocks: str
    block: tuple[Module, ...]
    after: tuple[Module, ...]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    formerly: tuple[tuple[str, str], ...] = ()
    module: type[Transformer] = Decoder
    input_size: str = "vocab_size"

    def modules(self, module: Transformer) -> Iterator[Placed]:
        """All modules that have parameters, and an output head that borrows its own.

        They come in torch's pre-order, which is the order in which PEFT numbers adapted layers.
        """
        config = module.config
        present = {path[:-1] for path in flatten(abstract_params(module))}
        if config.tie_word_embeddings:
            present.add(("lm_head",))
        count = config.routed.num_experts if config.routed is not None else 0

        def placed(row: Module, hf: str, path: tuple[str, ...], member: tuple[int, ...]) -> Iterator[Placed]:
            if path not in present:
                return
            if "*" in hf:
                for e in range(count):
                    yield Placed(hf.replace("*", str(e)), path, (*member, e), row.kind)
            else:
                yield Placed(hf, path, member, row.kind)

        for row in self.before:
            yield from placed(row, row.hf, row.path, ())
        for group in config.groups:
            for i in range(group.start, group.start + group.length):
                place = ((group.name,), (i - group.start,)) if module.scan_layers else ((f"layers_{i}",), ())
                for row in self.block:
                    yield from placed(row, f"{self.blocks}.{i}.{row.hf}", (*place[0], *row.path), place[1])
        for row in self.after:
            yield from placed(row, row.hf, row.path, ())

    @property
    def stem(self) -> str:
        """What the names of transformers' classes start with."""
        stem = self.causal_lm.split("For")[0].removesuffix("LMHeadModel")
        return f"{stem}Text" if self.model_type.endswith("_text") else stem

    @property
    def prefix(self) -> str:
        """First part of the torch names, which files lack that were saved without an output head."""
        return self.before[0].hf.split(".")[0] + "."

    def is_head(self, tensor: str) -> bool:
        """Whether a tensor, named as in files, is of what stands behind the blocks, for whatever task."""
        return not tensor.startswith(self.prefix) or tensor.startswith(f"{self.prefix}pooler.")

    def in_file(self, hf: str) -> str:
        """Return the name in files of a torch module."""
        for part, stored in self.renamed:
            hf = hf.replace(part, stored)
        return hf

    def adapted_layers(self, base: Transformer, adapted: Collection[str], *, with_bias: bool) -> AdaptedLayers:
        """Number the modules named in ``adapted`` as PEFT does."""
        names: list[str] = []
        slots: dict[tuple[str, ...], int | list[int]] = {}
        for module in self.modules(base):
            if module.kind not in ADAPTABLE:
                continue
            number = ABSENT
            if module.hf in adapted:
                number = len(names)
                names.append(module.hf)
            if not module.member:
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

    def peek(self, name: str) -> Any:
        """Return a field that someone else is to take."""
        return self._left.get(name)

    def nested(self, name: str) -> Fields:
        """Return a field that is itself a mapping."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Fields(value, f"{self._where}, {name}")

    def number(self, name: str) -> float:
        """Return a field that is a number above 0, and strike it off."""
        value: Any = self.take(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, value, "a number above 0")
        return cast(float, value)

    def error(self, name: str, value: object, expected: str) -> FormatError:
        """Make the error for a field that has no meaning here."""
        return FormatError(f"{self._where}: field {name!r}: expected {expected}, got {brief(value)}")

    def finish(self, neutral: Mapping[str, tuple[Any, ...]], without_effect: Collection[str] = ()) -> None:
        """Refuse what is left, unless it is at a neutral value or known to have no effect."""
        for name, value in self._left.items():
            if name in without_effect or (name in neutral and value in neutral[name]):
                continue
            if name in neutral:
                raise self.error(name, value, f"{neutral[name][0]!r}, the only value that is implemented")
            raise FormatError(
                f"{self._where}: field {name!r} (value {brief(value)}) is not implemented, and ignoring it could "
                f"change the output; if it does not matter for your model, remove it from config.json"
            )


# Fields of PreTrainedConfig and of checkpoints on the hub that say nothing about the forward pass. The base model is
# frozen and runs without dropout; how `generate` behaves is told by its arguments.
_WITHOUT_EFFECT = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "auto_map"),
        *("return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript", "pretraining_tp"),
        *("id2label", "label2id", "problem_type", "num_labels", "initializer_range", "attention_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
        *("_attn_implementation", "attn_implementation", "unsloth_version", "unsloth_fixed", "init_std"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout", "layerdrop", "residual_dropout"),
        *("embedding_dropout", "classifier_dropout", "router_aux_loss_coef", "output_router_logits"),
        *("router_jitter_noise",),
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
    "use_bidirectional_attention": (False, None),
}

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


def decoder_config(family: Family, config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a config of ``transformers`` (``AutoConfig(...).to_dict()``).

    Args:
        family: the family that its ``model_type`` names.
        config: all its fields.
        where: what to call it in errors.

    Raises:
        FormatError: a field has a value that is not implemented, or none at all; the message names it.
    """
    fields = Fields(config, where)
    try:
        declared = family.read(fields)
    except FormatError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: a field has no meaning for {family.model_type}: {error}") from error
    fields.finish(_NEUTRAL, _WITHOUT_EFFECT)
    head = _DECODER_HEADS.get(_task_of(config) or "")
    if family.module is Decoder and head is not None:
        # A head that classifies has a kernel of its own, and none of what follows the one of a language model.
        declared = dataclasses.replace(
            declared,
            head=head,
            num_labels=_num_labels(config),
            padding_token=config.get("pad_token_id"),
            tie_word_embeddings=False,
        )
    return declared


# PEFT's task_type to the end of the name of transformers' class for it.
TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
}
_DECODER_HEADS = {"SequenceClassification": "last", "TokenClassification": "token"}
_ENCODER_HEADS = {"SequenceClassification": "pooled", "TokenClassification": "token", "ImageClassification": "first"}


def _task_of(config: Mapping[str, Any]) -> str | None:
    """What the model is for, as the name of its class says."""
    return next((name.split("For")[-1] for name in config.get("architectures") or ()), None)


def _num_labels(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or (0, 1))


def classifying(
    family: Family, config: Mapping[str, Any], task_type: str | None, head: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Give a config the head that an adapter brings.

    Args:
        family: of the base.
        config: the base's, whatever its own head.
        task_type: PEFT's. Where it is none of :data:`TASKS`, the base's own class tells what the head is for.
        head: names and shapes of the head's tensors.
        where: who brings it, for errors.

    Returns:
        The config of a model with that head: its class, and as many labels as the head has rows.

    Raises:
        FormatError: the family has no such head.
    """
    task = TASKS.get(task_type or "", _task_of(config))
    if family.module is VisionTransformer:
        task = "ImageClassification"  # for which PEFT has no task_type
    if task not in (_DECODER_HEADS if family.module is Decoder else _ENCODER_HEADS):
        raise FormatError(
            f"{where}: brings a classification head ({', '.join(head)}), but neither its task_type, {task_type!r}, nor "
            f"the base's architectures, {config.get('architectures')!r}, say what for; expected task_type "
            f"{' or '.join(TASKS)} in its adapter_config.json."
        )
    heads = [row for row in family.after if row.kind == "linear" and row != _LM_HEAD]
    known = {f"{row.hf}.{suffix}": row for row in heads for suffix, _ in LEAVES[row.kind].values()}
    outputs = [name for name in known if name in head and name.endswith(".weight") and len(head[name]) == 2]
    if not outputs or not head.keys() <= known.keys():
        raise FormatError(
            f"{where}: brings a classification head ({', '.join(head)}) that {family.model_type} has not; expected "
            f"{', '.join(dict.fromkeys(row.hf for row in heads))}, with a weight [labels, width]. It was trained on "
            f"another base, or is more than a head."
        )
    labels = {i: f"LABEL_{i}" for i in range(head[outputs[-1]][0])}
    return {
        **config,
        "architectures": [f"{family.stem}For{task}"],
        "id2label": labels,
        "label2id": {label: i for i, label in labels.items()},
    }


def _rope(rope: Fields, head_dim: int, max_positions: int, *, partial: bool = False) -> Rope:
    """Read ``rope_parameters``, as ``transformers.modeling_rope_utils`` does.

    Args:
        rope: its fields.
        head_dim: C.
        max_positions: ``max_position_embeddings``.
        partial: whether the family's attention can rotate a part of each head.
    """
    kind, theta = rope.take("rope_type", "default"), rope.number("rope_theta")
    rope.take("type")  # the old name of rope_type, which transformers has read already
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
    rope.finish({"partial_rotary_factor": (1.0, None)})
    return Rope(dim=dim, theta=theta, kind=kind, **read)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _activation(fields: Fields, name: str = "hidden_act") -> str:
    value = fields.take(name)
    if value not in _ACTIVATIONS:
        raise fields.error(name, value, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _windows(fields: Fields, layers: int) -> dict[str, Any]:
    """Which blocks see a window only."""
    window = fields.take("sliding_window")
    # transformers has resolved these into `layer_types` and `sliding_window`.
    for name in ("use_sliding_window", "max_window_layers", "_sliding_window_pattern", "sliding_window_pattern"):
        fields.take(name)
    kinds = fields.take("layer_types")
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", sorted(unknown), "full_attention or sliding_attention")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"window": window, "sliding": sliding} if any(sliding) else {}


def _attention_bias(fields: Fields) -> dict[str, Any]:
    bias = fields.take("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _llama(
    fields: Fields,
    *,
    activation: str = "hidden_act",
    eps: str = "rms_norm_eps",
    partial: bool = False,
    **declared: Any,
) -> DecoderConfig:
    """Read the fields that most families share, under the names that most give them, and declare the rest."""
    heads, hidden = fields.take("num_attention_heads"), fields.take("hidden_size")
    layers = fields.take("num_hidden_layers")
    head_dim = fields.take("head_dim") or hidden // heads
    if "rope" not in declared:
        rope, positions = fields.nested("rope_parameters"), fields.take("max_position_embeddings")
        declared["rope"] = _rope(rope, head_dim, positions, partial=partial)
    return DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.take("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.take("num_key_value_heads") or heads,
        head_dim=head_dim,
        activation=_activation(fields, activation),
        norm_eps=fields.take(eps),
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        **declared,
        **_windows(fields, layers),
    )


def _read_llama(fields: Fields) -> DecoderConfig:
    return _llama(fields, **_attention_bias(fields), mlp_bias=fields.take("mlp_bias", False))


def _read_mistral(fields: Fields) -> DecoderConfig:
    return _llama(fields)


def _read_qwen2(fields: Fields) -> DecoderConfig:
    return _llama(fields, qkv_bias=True)


def _read_qwen3(fields: Fields) -> DecoderConfig:
    return _llama(fields, qk_norm="head", **_attention_bias(fields))


def _read_phi3(fields: Fields) -> DecoderConfig:
    # transformers has copied them into `rope_parameters` where they count.
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        fields.take(name)
    return _llama(fields, partial=True, qkv="fused", mlp="fused_gated")


def _read_gemma(fields: Fields) -> DecoderConfig:
    # An older name, which transformers 5 does not read.
    fields.take("hidden_activation")
    return _llama(fields, norm="rms_offset", embed_scale=_embed_scale(fields), **_attention_bias(fields))


def _read_gemma2(fields: Fields) -> DecoderConfig:
    return _llama(fields, **_gemma2(fields))


def _read_gemma3(fields: Fields) -> DecoderConfig:
    cap = fields.peek("attn_logit_softcapping")
    if cap is not None:
        raise fields.error(
            "attn_logit_softcapping", cap, "None: transformers reads it for Gemma 3 but does not apply it"
        )
    declared = _gemma2(fields)
    heads, hidden = fields.peek("num_attention_heads"), fields.peek("hidden_size")
    head_dim, positions = fields.peek("head_dim") or hidden // heads, fields.take("max_position_embeddings")
    rope = fields.nested("rope_parameters")
    declared["rope"] = _rope(rope.nested("full_attention"), head_dim, positions)
    declared["sliding_rope"] = _rope(rope.nested("sliding_attention"), head_dim, positions)
    rope.finish({})
    return _llama(fields, qk_norm="head", **declared)


def _embed_scale(fields: Fields) -> float:
    return float(fields.peek("hidden_size") ** 0.5)


def _gemma2(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    return {
        "activation": "hidden_activation",
        "norm": "rms_offset",
        "norm_placement": "around",
        "embed_scale": _embed_scale(fields),
        "attention_scale": fields.take("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.take("attn_logit_softcapping"),
        "logit_softcap": fields.take("final_logit_softcapping"),
        **_attention_bias(fields),
    }


def _read_granite(fields: Fields) -> DecoderConfig:
    return _llama(
        fields,
        input_multiplier=fields.take("embedding_multiplier"),
        attention_scale=fields.take("attention_multiplier"),
        residual_multiplier=fields.take("residual_multiplier"),
        logit_divisor=fields.take("logits_scaling"),
        mlp_bias=fields.take("mlp_bias", False),
        **_attention_bias(fields),
    )


def _read_olmo2(fields: Fields) -> DecoderConfig:
    return _llama(fields, norm="rms_float32", norm_placement="after", qk_norm="whole", **_attention_bias(fields))


def _read_smollm3(fields: Fields) -> DecoderConfig:
    fields.take("no_rope_layer_interval")  # transformers has resolved it into `no_rope_layers`
    without = tuple(not rotates for rotates in fields.take("no_rope_layers"))
    return _llama(fields, no_rope=without, mlp_bias=fields.take("mlp_bias", False), **_attention_bias(fields))


def _read_starcoder2(fields: Fields) -> DecoderConfig:
    bias = fields.take("use_bias")
    return _llama(fields, eps="norm_epsilon", norm="layer", mlp="plain", qkv_bias=bias, o_bias=bias, mlp_bias=bias)


def _read_phi(fields: Fields) -> DecoderConfig:
    return _llama(
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


def _read_gpt_neox(fields: Fields) -> DecoderConfig:
    return _llama(
        fields,
        eps="layer_norm_eps",
        partial=True,
        norm="layer",
        qkv="interleaved",
        mlp="plain",
        mlp_bias=True,
        parallel="own" if fields.take("use_parallel_residual") else None,
        **_attention_bias(fields),
    )


def _read_gpt2(fields: Fields) -> DecoderConfig:
    hidden, heads = fields.take("n_embd"), fields.take("n_head")
    # Upcasting the attention changes nothing: ours always takes its softmax in float32. The others are of other heads.
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
        activation=_activation(fields, "activation_function"),
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
        activation=_activation(fields, "activation_function"),
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


def _read_mixtral(fields: Fields) -> DecoderConfig:
    width = fields.peek("intermediate_size")
    return _llama(fields, routed=RoutedMLP(fields.take("num_local_experts"), fields.take("num_experts_per_tok"), width))


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    experts = fields.take("num_local_experts")
    routed = RoutedMLP(
        experts, fields.take("num_experts_per_tok"), fields.take("moe_intermediate_size"), fields.take("norm_topk_prob")
    )
    dense, step = fields.take("mlp_only_layers"), fields.take("decoder_sparse_step")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(fields.peek("num_hidden_layers")))
    return _llama(fields, qk_norm="head", routed=routed, routed_layers=layers, **_attention_bias(fields))


def _read_encoder(fields: Fields, family: str) -> dict[str, Any]:
    """What BERT, RoBERTa and ViT share."""
    heads, hidden = fields.take("num_attention_heads"), fields.take("hidden_size")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "tie_word_embeddings"):
        fields.take(name)
    if decodes := fields.take("is_decoder", False):
        raise fields.error("is_decoder", decodes, "False")
    architectures, labels = fields.take("architectures"), fields.take("id2label")
    task = _task_of({"architectures": architectures})
    if task not in _ENCODER_HEADS:
        raise fields.error("architectures", architectures, f"{family}For{' or '.join(_ENCODER_HEADS)}")
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "num_layers": fields.take("num_hidden_layers"),
        "intermediate_size": fields.take("intermediate_size"),
        "activation": _activation(fields),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps"),
        "rope": None,
        "mlp": "plain",
        "o_bias": True,
        "mlp_bias": True,
        "num_labels": _num_labels({"id2label": labels}),
        "head": _ENCODER_HEADS[task],
    }


def _read_bert(fields: Fields) -> EncoderConfig:
    roberta = fields.peek("model_type") == "roberta"
    if (kind := fields.take("position_embedding_type", "absolute")) != "absolute":
        raise fields.error("position_embedding_type", kind, "'absolute'")
    padding = fields.peek("pad_token_id")
    return EncoderConfig(
        vocab_size=fields.take("vocab_size"),
        token_types=fields.take("type_vocab_size"),
        learned_positions=fields.take("max_position_embeddings"),
        # RoBERTa counts from its padding token's number on, and tokens other than that only.
        position_offset=padding + 1 if roberta else 0,
        padding_token=padding if roberta else None,
        qkv_bias=True,
        norm_placement="sum",
        **_read_encoder(fields, "Roberta" if roberta else "Bert"),
    )


def _read_vit(fields: Fields) -> EncoderConfig:
    # Of the pooler and of masked images, which the classifier does not use.
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


_EMBED = Module("model.embed_tokens", ("embed_tokens",), "embedding")
_NORM = Module("model.norm", ("norm",), "norm")
_LM_HEAD = Module("lm_head", ("lm_head",), "linear")
_SCORE = Module("score", ("score",), "linear")
# Of three heads a model has one.
_HEADS = (_LM_HEAD, _SCORE, Module("score", ("token_classifier",), "linear"))
_HEADS_OF_GPT = (_LM_HEAD, _SCORE, Module("classifier", ("token_classifier",), "linear"))
_ATTENTION = _rows("linear", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORMS = _rows("norm", "self_attn.q_norm", "self_attn.k_norm")
_MLP = _rows("linear", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = (
    Module("input_layernorm", ("pre_attention_norm",), "norm"),
    Module("post_attention_layernorm", ("pre_mlp_norm",), "norm"),
)
_NORMS_AROUND = (
    Module("input_layernorm", ("pre_attention_norm",), "norm"),
    Module("post_attention_layernorm", ("post_attention_norm",), "norm"),
    Module("pre_feedforward_layernorm", ("pre_mlp_norm",), "norm"),
    Module("post_feedforward_layernorm", ("post_mlp_norm",), "norm"),
)


def _linears(kind: str = "linear", **paths: str) -> tuple[Module, ...]:
    """Rows of projections: torch name (``__`` for a dot) to our path."""
    return tuple(Module(hf.replace("__", "."), tuple(path.split(".")), kind) for hf, path in paths.items())


def _named_as_llama(
    model_type: str,
    causal_lm: str,
    read: Callable[[Fields], DecoderConfig],
    block: tuple[Module, ...] = (*_ATTENTION, *_MLP, *_NORMS),
    norm: Module = _NORM,
) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        read=read,
        before=(_EMBED,),
        blocks="model.layers",
        block=block,
        after=(norm, *_HEADS),
        ignored=(".rotary_emb.inv_freq",),
    )


def _routed(block: str, router: str, gate: str, up: str, down: str) -> tuple[Module, ...]:
    """Rows of a mixture of experts, under the names that they have in files."""
    experts = {gate: "gate_proj", up: "up_proj", down: "down_proj"}
    return (
        Module(f"{block}.{router}", ("mlp", "router"), "router"),
        *(Module(f"{block}.experts.*.{hf}", ("mlp", "experts", ours), "routed") for hf, ours in experts.items()),
    )


_PHI3 = _linears(
    self_attn__o_proj="self_attn.o_proj",
    self_attn__qkv_proj="self_attn.qkv_proj",
    mlp__gate_up_proj="mlp.gate_up_proj",
    mlp__down_proj="mlp.down_proj",
)
_STARCODER2_MLP = _linears(mlp__c_fc="mlp.up_proj", mlp__c_proj="mlp.down_proj")
_PHI = (
    *_ATTENTION[:3],
    *_linears(self_attn__dense="self_attn.o_proj"),
    Module("self_attn.q_layernorm", ("self_attn", "q_norm"), "norm"),
    Module("self_attn.k_layernorm", ("self_attn", "k_norm"), "norm"),
    *_linears(mlp__fc1="mlp.up_proj", mlp__fc2="mlp.down_proj"),
    _NORMS[0],
)
_GPT_NEOX = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    read=_read_gpt_neox,
    before=(Module("gpt_neox.embed_in", ("embed_tokens",), "embedding"),),
    blocks="gpt_neox.layers",
    block=(
        *_NORMS,
        *_linears(
            attention__query_key_value="self_attn.qkv_proj",
            attention__dense="self_attn.o_proj",
            mlp__dense_h_to_4h="mlp.up_proj",
            mlp__dense_4h_to_h="mlp.down_proj",
        ),
    ),
    after=(Module("gpt_neox.final_layer_norm", ("norm",), "norm"), *_HEADS_OF_GPT),
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
        *_linears("linear_in_out", attn__c_attn="self_attn.qkv_proj", attn__c_proj="self_attn.o_proj"),
        Module("ln_2", ("pre_mlp_norm",), "norm"),
        *_linears("linear_in_out", mlp__c_fc="mlp.up_proj", mlp__c_proj="mlp.down_proj"),
    ),
    after=(Module("transformer.ln_f", ("norm",), "norm"), *_HEADS_OF_GPT),
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
        *_linears(
            self_attn__k_proj="self_attn.k_proj",
            self_attn__v_proj="self_attn.v_proj",
            self_attn__q_proj="self_attn.q_proj",
            self_attn__out_proj="self_attn.o_proj",
            fc1="mlp.up_proj",
            fc2="mlp.down_proj",
        ),
        # Which of the two it is depends on `do_layer_norm_before`; only one of them has parameters.
        Module("self_attn_layer_norm", ("pre_attention_norm",), "norm"),
        Module("self_attn_layer_norm", ("post_attention_norm",), "norm"),
        Module("final_layer_norm", ("pre_mlp_norm",), "norm"),
        Module("final_layer_norm", ("post_mlp_norm",), "norm"),
    ),
    after=(_LM_HEAD, _SCORE),
)


def _bert(model_type: str, causal_lm: str, head: tuple[Module, ...]) -> Family:
    name = f"{model_type}.embeddings"
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
        blocks=f"{model_type}.encoder.layer",
        block=(
            *_linears(
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
        *_linears(
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
    # Files have the names of transformers 4.
    renamed=(
        ("vit.layers.", "vit.encoder.layer."),
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    ),
    # For masked images, which only pretraining has.
    ignored=(".embeddings.mask_token",),
    module=VisionTransformer,
    input_size="image_size",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _named_as_llama("llama", "LlamaForCausalLM", _read_llama),
        _named_as_llama("mistral", "MistralForCausalLM", _read_mistral),
        _named_as_llama("ministral", "MinistralForCausalLM", _read_mistral),
        _named_as_llama(
            "mixtral",
            "MixtralForCausalLM",
            _read_mixtral,
            (*_ATTENTION, *_routed("block_sparse_moe", "gate", "w1", "w3", "w2"), *_NORMS),
        ),
        _named_as_llama("qwen2", "Qwen2ForCausalLM", _read_qwen2),
        _named_as_llama("qwen3", "Qwen3ForCausalLM", _read_qwen3, (*_ATTENTION, *_QK_NORMS, *_MLP, *_NORMS)),
        _named_as_llama(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _read_qwen3_moe,
            (
                *_ATTENTION,
                *_QK_NORMS,
                *_MLP,
                *_routed("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
                *_NORMS,
            ),
        ),
        _named_as_llama("phi3", "Phi3ForCausalLM", _read_phi3, (*_PHI3, *_NORMS)),
        _named_as_llama("phi", "PhiForCausalLM", _read_phi, _PHI, Module("model.final_layernorm", ("norm",), "norm")),
        _named_as_llama("gemma", "GemmaForCausalLM", _read_gemma),
        _named_as_llama("gemma2", "Gemma2ForCausalLM", _read_gemma2, (*_ATTENTION, *_MLP, *_NORMS_AROUND)),
        _named_as_llama(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _read_gemma3,
            (*_ATTENTION, *_QK_NORMS, *_MLP, *_NORMS_AROUND),
        ),
        _named_as_llama("granite", "GraniteForCausalLM", _read_granite),
        _named_as_llama("olmo2", "Olmo2ForCausalLM", _read_olmo2, (*_ATTENTION, *_QK_NORMS, *_MLP, *_NORMS_AROUND)),
        _named_as_llama("smollm3", "SmolLM3ForCausalLM", _read_smollm3),
        _named_as_llama(
            "starcoder2", "Starcoder2ForCausalLM", _read_starcoder2, (*_ATTENTION, *_STARCODER2_MLP, *_NORMS)
        ),
        _GPT_NEOX,
        _GPT2,
        _OPT,
        _bert(
            "bert",
            "BertForSequenceClassification or BertForTokenClassification",
            (
                Module("bert.pooler.dense", ("pooler",), "linear"),
                Module("classifier", ("classifier",), "linear"),
                Module("classifier", ("token_classifier",), "linear"),
            ),
        ),
        _bert(
            "roberta",
            "RobertaForSequenceClassification or RobertaForTokenClassification",
            (
                Module("classifier.dense", ("pooler",), "linear"),
                Module("classifier.out_proj", ("classifier",), "linear"),
                Module("classifier", ("token_classifier",), "linear"),
            ),
        ),
        _VIT,
    )
}


def family_of(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``, or raise a FormatError that lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FormatError(
            f"{where}: field 'model_type': expected one of {', '.join(FAMILIES)}, got {brief(model_type)}"
        )
    return FAMILIES[model_type]
