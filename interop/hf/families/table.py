"""Tables of module names. Loading, saving and the order of the adapted layers derive from them.

A :class:`Family` lists its torch modules, and the path of each one's variables in our module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

from interop.hf.families.fields import Fields
from xlora_jax.layers.adapted import ABSENT, AdaptedLayers, Slot
from xlora_jax.models import Decoder, DecoderConfig, Transformer
from xlora_jax.trees import Path, flatten

__all__ = [
    "ADAPTABLE",
    "ATTENTION",
    "EMBED",
    "HEADS",
    "HEADS_OF_GPT",
    "LEAVES",
    "LM_HEAD",
    "MLP",
    "NORM",
    "NORMS",
    "NORMS_AROUND",
    "QK_NORMS",
    "SCORE",
    "Family",
    "Module",
    "Placed",
    "abstract_params",
    "linears",
    "routed_experts",
    "rows",
]


@lru_cache(maxsize=32)
def abstract_params(module: Transformer) -> Mapping[str, Any]:
    """Return the shapes and dtypes of a module's parameters, without allocating them."""
    variables = jax.eval_shape(module.init, jax.random.key(0), **module.example_inputs())
    params: Mapping[str, Any] = variables["params"]
    return params


@dataclass(frozen=True)
class Module:
    """Row of a family's table: a torch module and the path of its variables.

    A row without parameters in a model is skipped, for example a norm that its config leaves out.

    Attributes:
        hf: name of the torch module; in a block, relative to the block. ``*`` is the index of torch modules that ours
            stacks: the experts of a base model's own mixture, or the norms of single heads.
        path: keys of our module; in a block, relative to the block.
        kind: key of :data:`LEAVES`.
    """

    hf: str
    path: tuple[str, ...]
    kind: str


def rows(kind: str, *names: str) -> tuple[Module, ...]:
    """Make rows whose keys are the parts of the torch name."""
    return tuple(Module(name, tuple(name.split(".")), kind) for name in names)


# For each kind of module: our leaf -> torch's tensor, and the order of torch's axes in our array (empty: the same).
# Loading and saving both use this table.
LEAVES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "linear": {"kernel": ("weight", (1, 0)), "bias": ("bias", ())},
    # transformers' Conv1D (GPT-2): stored [in, out], which PEFT calls fan_in_fan_out.
    "linear_in_out": {"kernel": ("weight", ()), "bias": ("bias", ())},
    "conv": {"kernel": ("weight", (2, 3, 1, 0)), "bias": ("bias", ())},
    # In transformers 5 these are not separate torch modules, so no adapter can target them.
    "router": {"kernel": ("weight", (1, 0))},
    "routed": {"kernel": ("weight", (1, 0))},
    "embedding": {"embedding": ("weight", ())},
    "positions": {"embedding": ("weight", ())},
    "class_token": {"cls_token": ("cls_token", ()), "position_embeddings": ("position_embeddings", ())},
    "norm": {"scale": ("weight", ()), "bias": ("bias", ())},
}

# Kinds that LoRA can adapt, and their names in adapters.
ADAPTABLE = {"linear": "linear", "linear_in_out": "linear", "embedding": "embedding", "conv": "conv"}


@dataclass(frozen=True)
class Placed:
    """A torch module of one model, and the path of its variables.

    Attributes:
        hf: full torch name, such as ``model.layers.3.mlp.up_proj``.
        path: keys of the module in our variables.
        member: index on the leading axes of stacked modules; empty if not stacked.
        kind: key of :data:`LEAVES`.
    """

    hf: str
    path: tuple[str, ...]
    member: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of transformers.

    Attributes:
        model_type: its name in transformers.
        causal_lm: name of the class with an output head, as in ``architectures`` of config.json.
        read: function from config fields to a declaration.
        before: modules before the blocks, in torch's order of declaration.
        blocks: torch name of the list of blocks.
        block: modules of one block, in torch's order.
        after: modules after the blocks.
        ignored: suffixes of tensor names in old checkpoints that no model reads.
        renamed: pairs of a part of a torch name and its replacement in files.
        formerly: pairs of a tensor name's suffix in old files and its present suffix.
        module: Flax module class of the declaration.
        input_size: name of the config field with the size of the input: vocabulary or image.
        head_first: whether torch declares the modules of ``after`` before all others (XLM-RoBERTa).
        texts: values of ``model_type`` that the ``text_config`` of a multimodal model may have; empty for a text-only
            model.
        starts: groups of equivalent prefixes of tensor names: in torch, in files that transformers writes, in other
            files.
        unread: keys of modules that are not built here (vision), directly after an optional ``model``.
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
    head_first: bool = False
    texts: tuple[str, ...] = ()
    starts: tuple[tuple[str, ...], ...] = ()
    unread: tuple[str, ...] = ()

    def modules(self, module: Transformer) -> Iterator[Placed]:
        """Yield all modules with parameters, and an output head with tied parameters.

        The order is torch's pre-order, in which PEFT numbers adapted layers.
        """
        config = module.config
        present = {path[:-1]: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
        if config.tie_word_embeddings:
            present.setdefault(("lm_head",), ())

        def placed(row: Module, hf: str, path: tuple[str, ...], member: tuple[int, ...]) -> Iterator[Placed]:
            if path not in present:
                return
            if "*" in hf:
                for i in range(present[path][len(member)]):
                    yield Placed(hf.replace("*", str(i)), path, (*member, i), row.kind)
            else:
                yield Placed(hf, path, member, row.kind)

        first = (*self.after, *self.before) if self.head_first else self.before
        for row in first:
            yield from placed(row, row.hf, row.path, ())
        for group in config.groups:
            for i in range(group.start, group.start + group.length):
                place = ((group.name,), (i - group.start,)) if module.scan_layers else ((f"layers_{i}",), ())
                for row in self.block:
                    yield from placed(row, f"{self.blocks}.{i}.{row.hf}", (*place[0], *row.path), place[1])
        for row in () if self.head_first else self.after:
            yield from placed(row, row.hf, row.path, ())

    @property
    def stem(self) -> str:
        """Prefix of the names of transformers' classes."""
        stem = self.causal_lm.split("For")[0].removesuffix("LMHeadModel")
        return f"{stem}Text" if self.model_type.endswith("_text") else stem

    @property
    def prefix(self) -> str:
        """Prefix of names in files; files saved without an output head lack it."""
        if self.starts:
            return self.starts[0][1]
        return self.before[0].hf.split(".")[0] + "."

    def kernel_shapes(self, module: Transformer) -> dict[Path, tuple[int, ...]]:
        """Return the kernel shape of every layer that can be adapted, by path; for an embedding ``[V, D]``."""
        params = flatten(abstract_params(module))
        leaves = {path[:-1]: leaf.shape for path, leaf in params.items() if path[-1] in ("kernel", "embedding")}
        # A tied head has no kernel of its own.
        config = module.config
        leaves.setdefault(("lm_head",), (config.embed_size or config.hidden_size, config.vocab_size))
        return {
            placed.path: leaves[placed.path][len(placed.member) :]
            for placed in self.modules(module)
            if placed.kind in ADAPTABLE
        }

    @property
    def table(self) -> Path:
        """Path of the table whose values a tied head shares."""
        return ("embed_tokens", "embedding")

    @property
    def refused(self) -> Mapping[str, str]:
        """Reasons why experts can't adapt certain layers, by name of the layer; none here."""
        return {}

    def is_head(self, tensor: str) -> bool:
        """Return whether a tensor, named as in files, belongs to an output head of any task."""
        return not tensor.startswith(self.prefix) or tensor.startswith(f"{self.prefix}pooler.")

    def in_file(self, hf: str) -> str:
        """Return a torch module's name in files."""
        for part, stored in self.renamed:
            hf = hf.replace(part, stored)
        return next((stored + hf.removeprefix(start) for start, stored, *_ in self.starts if hf.startswith(start)), hf)

    def as_written(self, tensor: str) -> str:
        """Return the name that transformers writes for a tensor, given any of its names in files."""
        spelled = [(start, group[1]) for group in self.starts for start in group if tensor.startswith(start)]
        if not spelled:
            return tensor
        start, stored = max(spelled, key=lambda pair: len(pair[0]))
        return stored + tensor.removeprefix(start)

    def is_unread(self, name: str) -> bool:
        """Return whether a tensor or a module belongs to a part that is not built here."""
        parts = name.split(".")
        return bool(self.unread) and parts[parts[0] == "model"] in self.unread

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


EMBED = Module("model.embed_tokens", ("embed_tokens",), "embedding")
NORM = Module("model.norm", ("norm",), "norm")
LM_HEAD = Module("lm_head", ("lm_head",), "linear")
SCORE = Module("score", ("score",), "linear")
# A model has one of three heads.
HEADS = (LM_HEAD, SCORE, Module("score", ("token_classifier",), "linear"))
HEADS_OF_GPT = (LM_HEAD, SCORE, Module("classifier", ("token_classifier",), "linear"))
ATTENTION = rows("linear", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
QK_NORMS = rows("norm", "self_attn.q_norm", "self_attn.k_norm")
MLP = rows("linear", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = (
    Module("input_layernorm", ("pre_attention_norm",), "norm"),
    Module("post_attention_layernorm", ("pre_mlp_norm",), "norm"),
)

NORMS_AROUND = (
    Module("input_layernorm", ("pre_attention_norm",), "norm"),
    Module("post_attention_layernorm", ("post_attention_norm",), "norm"),
    Module("pre_feedforward_layernorm", ("pre_mlp_norm",), "norm"),
    Module("post_feedforward_layernorm", ("post_mlp_norm",), "norm"),
)


def linears(kind: str = "linear", **paths: str) -> tuple[Module, ...]:
    """Make rows of projections from keywords: torch name (``__`` for a dot) to our path."""
    return tuple(Module(hf.replace("__", "."), tuple(path.split(".")), kind) for hf, path in paths.items())


def routed_experts(block: str, router: str, gate: str, up: str, down: str) -> tuple[Module, ...]:
    """Make rows of a mixture of experts, under their names in files."""
    experts = {gate: "gate_proj", up: "up_proj", down: "down_proj"}
    return (
        Module(f"{block}.{router}", ("mlp", "router"), "router"),
        *(Module(f"{block}.experts.*.{hf}", ("mlp", "experts", ours), "routed") for hf, ours in experts.items()),
    )
