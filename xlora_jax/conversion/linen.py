"""X-LoRA for any Flax Linen model, without changes to it: its layers are intercepted, its parameters keep their paths.

Experts act wherever the ``experts`` collection has an entry at the path of an ``nn.Dense``, ``nn.DenseGeneral``,
``nn.Einsum``, ``nn.Embed`` or ``nn.Conv``. Lifted transforms must carry the collections. ``nn.remat`` and ``nn.jit`` do
so by default; ``nn.scan`` and ``nn.vmap`` need ``variable_axes={"params": 0, "experts": 0, "scalings": 0}``.

NNX models: :mod:`xlora_jax.conversion.nnx`.

Axes as in :mod:`xlora_jax.layers.mixing`, and M for modules stacked by ``nn.scan``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numpy.typing import NDArray

from xlora_jax.config import XLoraConfig
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.layers.modules import (
    XLoraConv,
    XLoraDense,
    XLoraEmbed,
    XLoraTiedHead,
    add_experts,
    project_conv,
    project_dense,
)
from xlora_jax.layers.stacking import Piece, stack_pieces
from xlora_jax.model import XLoraModel
from xlora_jax.models import DecoderOutput
from xlora_jax.trees import Path, flatten, unflatten

__all__ = [
    "PLANS",
    "Axes",
    "ForeignModule",
    "FoundLayer",
    "Lora",
    "Plan",
    "convert",
    "find_layers",
    "intercepted",
    "put_together",
]

_OURS = (XLoraDense, XLoraEmbed, XLoraConv, XLoraTiedHead)


@dataclass(frozen=True, eq=False)
class Lora:
    """One expert's LoRA of one module: it adds ``alpha / r * (x @ a @ b)``.

    Attributes:
        a: ``[D, r]``; several input axes (``nn.DenseGeneral``, ``nn.Einsum``) are flattened in the kernel's order. For
            an embedding ``[V, r]``; for a convolution ``[*kernel_size, D, r]``, with all input channels even if the
            layer is grouped. For modules under ``nn.scan``, with a leading axis M.
        b: ``[r, F]``; several output axes are flattened in the kernel's order. For PEFT's grouped convolutions it is
            block-diagonal.
        alpha: LoRA's alpha; None means r, so a scale of 1.
        dropout: probability of LoRA dropout in training.
    """

    a: NDArray[Any] | jax.Array
    b: NDArray[Any] | jax.Array
    alpha: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class FoundLayer:
    """A layer that experts can adapt.

    Attributes:
        path: path of the module.
        shape: shape of its kernel with flattened axes: ``[D, F]``, ``[V, D]`` or ``[*kernel_size, D, F]``.
        members: M if ``nn.scan`` stacks the module, else None.
        carried: whether the transforms around the module carry the collections ``experts`` and ``scalings``.
    """

    path: Path
    shape: tuple[int, ...]
    members: int | None
    carried: bool


@dataclass(frozen=True)
class _Width:
    """Minimal config: only the hidden size is known."""

    hidden_size: int


@dataclass(frozen=True)
class ForeignModule:
    """An adapter that gives any Flax module the interface of this library's modules; hashable if its attributes are.

    Attributes:
        module: Flax module.
        hidden_states: source of the classifier's input ``[B, T, D]``: the path of a submodule, such as
            ``"final_norm"``, whose output is taken; or a function of the module's output.
        logits: function from the module's output to logits; None takes the output itself.
        positional: names of the inputs that are passed by position, in order; others are passed by name.
        hidden_size: D, width of the hidden states.
        dtype: dtype of the classifier's computation.
        param_dtype: dtype of the classifier's parameters.
    """

    module: nn.Module
    hidden_states: str | Callable[[Any], jax.Array]
    logits: Callable[[Any], jax.Array] | None = None
    positional: tuple[str, ...] = ("input_ids",)
    hidden_size: int = 0
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def whole_logits(self) -> bool:
        """Whether logits can only be had by running the model as a whole: True, its head is unknown."""
        return True

    @property
    def config(self) -> Any:
        """Config with the width of the hidden states."""
        return _Width(self.hidden_size)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Mapping[str, jax.Array] | None = None,
        method: str | None = None,
        with_logits: bool = True,
        **inputs: Any,
    ) -> DecoderOutput:
        """Run the module with its layers intercepted; see :class:`~xlora_jax.models.BaseModule`."""
        if args or method is not None:
            raise NotImplementedError(
                f"{type(self.module).__name__}: a converted model has no output head apart; call it as a whole"
            )
        del with_logits  # jit drops logits that nothing uses
        given = dict(inputs)
        positional = [given.pop(name) for name in self.positional if name in given]
        path = _path(self.hidden_states) if isinstance(self.hidden_states, str) else None
        out, captured = self.call(variables, positional, given, dict(rngs or {}), path)
        if path is not None:
            if captured is None:
                raise ValueError(
                    f"hidden_states: no submodule {self.hidden_states!r} was called; the names of "
                    f"{type(self.module).__name__}'s submodules are the keys of its parameters, joined by '/'"
                )
            hidden = captured
        else:
            hidden = cast(Callable[[Any], jax.Array], self.hidden_states)(out)
        return DecoderOutput(hidden, out if self.logits is None else self.logits(out))

    def call(
        self,
        variables: Mapping[str, Any],
        positional: list[Any],
        named: dict[str, Any],
        rngs: dict[str, jax.Array],
        captured: Path | None,
    ) -> tuple[Any, jax.Array | None]:
        """Run the model; return its output, and the output of the submodule at ``captured``, or None if not called."""
        with intercepted():
            out, state = self.module.apply(
                variables,
                *positional,
                rngs=rngs,
                mutable=["intermediates"],
                capture_intermediates=lambda module, name: name == "__call__" and module.path == captured,
                **named,
            )
        found = None if captured is None else flatten(state.get("intermediates", {})).get((*captured, "__call__"))
        return out, None if found is None else found[0]

    def clone(self, **changes: Any) -> ForeignModule:
        """Return the module; raise ValueError for settings that only this library's own models have."""
        if given := sorted(name for name, value in changes.items() if value is not None):
            raise ValueError(
                f"{type(self.module).__name__}: {', '.join(given)} can be set for this library's own models only; a "
                f"converted one has what its author gave it (nn.remat, say)"
            )
        return self

    def empty_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: the cache of a foreign model is unknown."""
        raise NotImplementedError(
            f"{type(self.module).__name__} does not generate here: a converted model has no cache"
        )


def _path(name: str) -> Path:
    return tuple(part for part in name.replace(".", "/").split("/") if part)


@contextlib.contextmanager
def intercepted(seen: Callable[[nn.Module, tuple[int, ...]], None] | None = None) -> Iterator[None]:
    """Make Flax layers mix the experts at their paths, within a ``with`` block.

    Args:
        seen: function called with each such layer and the shape of its kernel with flattened axes.
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        outputs = next_fun(*args, **kwargs)
        plan = next((plan for kind, plan in PLANS.items() if isinstance(module, kind)), None)
        mixes_itself = isinstance(module, _OURS)
        if plan is None or context.method_name != "__call__" or mixes_itself:
            return outputs
        shape, project, axes = plan(module, outputs, *args, **kwargs)
        if seen is not None:
            seen(module, shape)
        if not module.has_variable("experts", "lora_b"):
            return outputs
        flat = outputs if axes is None else axes.flatten(outputs)
        mixed = add_experts(module, flat, project)
        return mixed if axes is None else axes.restore(mixed, outputs)

    with nn.intercept_methods(interceptor):
        yield


@dataclass(frozen=True)
class Axes:
    """The feature axes of an output.

    Attributes:
        order: permutation that moves the feature axes last.
        features: number of feature axes; flattened they are F.
    """

    order: tuple[int, ...]
    features: int

    def flatten(self, outputs: jax.Array) -> jax.Array:
        """Return ``outputs`` as ``[..., F]``, with the feature axes last and flattened."""
        moved = jnp.transpose(outputs, self.order)
        return moved.reshape(*moved.shape[: outputs.ndim - self.features], -1)

    def restore(self, mixed: jax.Array, like: jax.Array) -> jax.Array:
        """Return ``mixed [..., F]`` in the shape of ``like``; the inverse of :meth:`flatten`."""
        moved = mixed.reshape([like.shape[axis] for axis in self.order])
        return jnp.transpose(moved, np.argsort(self.order).tolist())


Plan = tuple[tuple[int, ...], Callable[[jax.Array], jax.Array], Axes | None]


# Plans serve NNX layers too: they have the same names for all attributes that are read here.


def _plan_dense(module: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    return (inputs.shape[-1], outputs.shape[-1]), project_dense(module, inputs), None


def _plan_embed(module: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    shape = (module.num_embeddings, module.features)
    return shape, lambda lora_a: jnp.take(lora_a, inputs, axis=0), None


def _plan_conv(module: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    kernel = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    return (*kernel, inputs.shape[-1], outputs.shape[-1]), project_conv(module, inputs), None


def _plan_dense_general(module: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    if np.size(module.batch_dims):
        raise ValueError(
            f"layer {'/'.join(module.path)}: nn.DenseGeneral with batch_dims {module.batch_dims} has a kernel for each "
            f"entry of the batch axes, and no single A and B; leave it out of the experts' targets"
        )
    # Flax sorts the axes, so the kernel has them in the order of the inputs.
    axes = sorted(axis % inputs.ndim for axis in np.ravel(module.axis).tolist())
    features = np.ravel(module.features).tolist()
    x = _contracted_last(inputs, axes)
    order = tuple(range(outputs.ndim))
    return (x.shape[-1], math.prod(features)), project_dense(module, x), Axes(order, len(features))


def _plan_einsum(module: Any, outputs: jax.Array, inputs: jax.Array, einsum_str: str | None = None) -> Plan:
    equation = (einsum_str or module.einsum_str or "").replace(" ", "")
    terms, _, result = equation.partition("->")
    left, _, right = terms.partition(",")
    if "." in equation:
        dots = "".join(letter for letter in "ZYXWVUTSRQ" if letter not in equation)
        left = left.replace("...", dots[: inputs.ndim - len(left.replace("...", ""))])
        result = result.replace("...", dots[: outputs.ndim - len(result.replace("...", ""))])
    contracted = [letter for letter in right if letter in left and letter not in result]
    features = [letter for letter in right if letter in result and letter not in left]
    kept = [letter for letter in left if letter in result]
    if len(contracted) + len(features) != len(right) or len(kept) + len(contracted) != len(left):
        raise ValueError(
            f"layer {'/'.join(module.path)}: nn.Einsum {equation!r} is no plain projection (an axis of the kernel is "
            f"shared by input and output, or one is summed alone); leave it out of the experts' targets"
        )
    x = _contracted_last(inputs, [left.index(letter) for letter in contracted])
    order = tuple(result.index(letter) for letter in (*kept, *features))
    width = math.prod(outputs.shape[result.index(letter)] for letter in features)
    return (x.shape[-1], width), project_dense(module, x), Axes(order, len(features))


def _contracted_last(inputs: jax.Array, axes: list[int]) -> jax.Array:
    """Move the contracted axes last, in the kernel's order, flattened to one axis D."""
    kept = [axis for axis in range(inputs.ndim) if axis not in axes]
    moved = jnp.transpose(inputs, [*kept, *axes])
    return moved.reshape(*moved.shape[: len(kept)], -1)


PLANS: dict[type[nn.Module], Callable[..., Plan]] = {
    nn.Dense: _plan_dense,
    nn.DenseGeneral: _plan_dense_general,
    nn.Einsum: _plan_einsum,
    nn.Embed: _plan_embed,
    nn.Conv: _plan_conv,
}


def find_layers(module: nn.Module, params: Mapping[str, Any], *inputs: Any, **named: Any) -> dict[str, FoundLayer]:
    """Find the layers that experts can adapt, in the order in which a call of the model reaches them.

    Args:
        module: model to search.
        params: parameters of the model.
        *inputs: positional inputs of a call; only their shapes and dtypes matter.
        **named: named inputs of a call; only their shapes and dtypes matter.

    Returns:
        Mapping of name (path joined by ``/``) to layer, in the order of the layer axis of the scalings. There, the
        layers that one ``nn.scan`` stacks follow one another, block by block.
    """
    kernels = {path[:-1]: leaf.shape for path, leaf in flatten(params).items() if path[-1] in ("kernel", "embedding")}
    # A marker at each kernel's path shows whether the transforms carry the collections there.
    marks = unflatten({(*path, "mark"): np.zeros(shape[:1]) for path, shape in kernels.items()})
    found: dict[str, FoundLayer] = {}

    def seen(layer: nn.Module, shape: tuple[int, ...]) -> None:
        path = tuple(layer.path)
        own = layer.variables["params"]
        whole = kernels[path]
        stacked = len(whole) - len(own["kernel" if "kernel" in own else "embedding"].shape)
        carried = layer.has_variable("experts", "mark") and layer.has_variable("scalings", "mark")
        members = whole[0] if stacked else None
        if stacked > 1:
            raise ValueError(f"layer {'/'.join(path)} is stacked {stacked} times over; experts can be stacked once")
        found.setdefault("/".join(path), FoundLayer(path, shape, members, carried))

    def call(params: Any, marks: Any, inputs: Any, named: Any) -> None:
        with intercepted(seen):
            module.apply({"params": params, "experts": marks, "scalings": marks}, *inputs, **named)

    jax.eval_shape(call, params, marks, inputs, named)
    return found


def convert(
    module: nn.Module,
    params: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, Lora]],
    config: XLoraConfig,
    *,
    hidden_states: str | Callable[[Any], jax.Array],
    example: Mapping[str, Any],
    logits: Callable[[Any], jax.Array] | None = None,
    positional: tuple[str, ...] = ("input_ids",),
    dtype: jax.typing.DTypeLike = jnp.float32,
    expert_dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> XLoraModel:
    """Make an X-LoRA model of any Flax Linen model.

    Args:
        module: model in evaluation mode.
        params: parameters of the model; they are not changed.
        experts: mapping of expert name -> layer name (module path joined by ``/``) -> LoRA, in the order of the
            classifier's outputs.
        config: X-LoRA settings; ``hidden_size`` is the width of the hidden states.
        hidden_states: path of a submodule whose output ``[B, T, D]`` the classifier reads, or a function of the
            model's output. Usually this is the input of the output head.
        example: inputs of a call by name, to trace the model; only their shapes and dtypes matter.
        logits: function from the model's output to logits; None takes the output itself.
        positional: names of the inputs that the module takes by position, in order; others are passed by name.
        dtype: dtype of the new classifier.
        expert_dtype: dtype of the experts and of the operands of their products.
        seed: seed of the new classifier.

    Returns:
        The model, with a new classifier. Adapted layers are numbered as :func:`find_layers` lists them.

    Raises:
        ValueError: an expert names a layer that does not exist or does not fit, or a lifted transform does not carry
            the collections to the layer. The message says what to add.
    """
    foreign = ForeignModule(module, hidden_states, logits, positional, config.hidden_size, dtype, dtype)
    named = dict(example)
    inputs = [named.pop(name) for name in positional if name in named]
    found = find_layers(module, params, *inputs, **named)
    return put_together(foreign, params, experts, found, config, example, np.dtype(expert_dtype), seed)


def put_together(
    foreign: ForeignModule,
    params: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, Lora]],
    found: Mapping[str, FoundLayer],
    config: XLoraConfig,
    example: Mapping[str, Any],
    expert_dtype: np.dtype[Any],
    seed: int,
) -> XLoraModel:
    """Make an X-LoRA model of a wrapped module and its layers; arguments and errors as in :func:`convert`."""
    stacked, layers = _stack(experts, found, expert_dtype)
    hidden = jax.eval_shape(lambda params: foreign.apply({"params": params}, **example).hidden_states, params)
    if hidden.ndim != 3 or hidden.shape[-1] != config.hidden_size:
        raise ValueError(
            f"hidden_states: expected [B, T, {config.hidden_size}] (config.hidden_size), got {list(hidden.shape)}"
        )
    tree = {"base": params, "experts": stacked, "classifier": {}}
    model = XLoraModel(cast(Any, foreign), tree, config, layers, tuple(experts))
    classifier = model.xlora.classifier.init(jax.random.key(seed), jnp.zeros((1, 1, config.hidden_size), foreign.dtype))
    return model.replace(params={**tree, "classifier": classifier["params"]})


def _stack(
    experts: Mapping[str, Mapping[str, Lora]], found: Mapping[str, FoundLayer], dtype: np.dtype[Any]
) -> tuple[dict[str, Any], AdaptedLayers]:
    """Return the ``experts`` collection, and the adapted layers with their numbers."""
    for expert, loras in experts.items():
        for name, lora in loras.items():
            _check(expert, name, lora, found)
    adapted = [name for name in found if any(name in loras for loras in experts.values())]
    if not adapted:
        raise ValueError("the experts adapt no layer at all")
    leaves: dict[Path, jax.Array] = {}
    for name in adapted:
        layer = found[name]
        members = [
            [
                _piece(number, loras[name], None if layer.members is None else member)
                for number, loras in enumerate(experts.values())
                if name in loras
            ]
            for member in range(layer.members or 1)
        ]
        for leaf, array in stack_pieces(members, layer.shape, len(experts), dtype).items():
            leaves[(*layer.path, leaf)] = jnp.asarray(array[0] if layer.members is None else array)
    names, slots = _numbered([found[name] for name in adapted])
    return unflatten(leaves), AdaptedLayers(names, slots)


def _numbered(layers: list[FoundLayer]) -> tuple[tuple[str, ...], tuple[Slot, ...]]:
    """Number layers in order; adjacent layers under one scan are numbered block by block."""
    names: list[str] = []
    numbers: dict[Path, list[int]] = {}
    while layers:
        first = layers[0]
        run = 1
        while first.members is not None and run < len(layers) and _same_scan(first, layers[run]):
            run += 1
        for member in range(first.members or 1):
            for layer in layers[:run]:
                numbers.setdefault(layer.path, []).append(len(names))
                name = "/".join(layer.path)
                names.append(name if layer.members is None else f"{name}[{member}]")
        layers = layers[run:]
    stacked = {name.rpartition("[")[0] for name in names if name.endswith("]")}
    slots = tuple(Slot(path, tuple(own) if "/".join(path) in stacked else own[0]) for path, own in numbers.items())
    return tuple(names), slots


def _same_scan(one: FoundLayer, other: FoundLayer) -> bool:
    return one.members == other.members and one.path[0] == other.path[0]


def _piece(expert: int, lora: Lora, member: int | None) -> Piece:
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    if member is not None:
        a, b = a[member], b[member]
    rank = b.shape[0]
    return Piece(expert, a, b, 1.0 if lora.alpha is None else lora.alpha / rank, dropout=lora.dropout)


def _check(expert: str, name: str, lora: Lora, found: Mapping[str, FoundLayer]) -> None:
    where = f"expert {expert!r}, layer {name!r}"
    if name not in found:
        raise ValueError(f"{where}: the model has no such layer that can be adapted; it has {', '.join(found)}")
    layer = found[name]
    if not layer.carried:
        raise ValueError(
            f"{where}: a lifted transform around it does not carry the collections 'experts' and 'scalings', so no "
            f"expert could act there. Give the nn.scan (or nn.vmap) variable_axes={{'params': 0, 'experts': 0, "
            f"'scalings': 0}}, and split_rngs={{'lora_dropout': True}} if experts are trained with dropout; nn.remat "
            f"and nn.jit carry them if `variables` is left at its default. In NNX the transform has to treat all "
            f"variables of a module as it treats its parameters"
        )
    lead = () if layer.members is None else (layer.members,)
    *inputs, width = layer.shape
    a, b = np.shape(lora.a), np.shape(lora.b)
    if a[:-1] != (*lead, *inputs) or b != (*lead, a[-1], width):
        raise ValueError(
            f"{where}: expected a {[*lead, *inputs, 'r']} and b {[*lead, 'r', width]}, got {list(a)} and {list(b)}"
        )
