"""X-LoRA for any Flax NNX model, without changes to it: the counterpart of :mod:`xlora_jax.conversion.linen`.

NNX has no interceptors. But a model is split and merged for every call, and in the merged copy the adapted layers get
another class, which mixes the experts in the layer's own variables. So the experts pass wherever a layer's variables
pass, through ``nnx.scan`` and ``nnx.vmap`` too. ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``, ``nnx.Embed``
and ``nnx.Conv`` can be adapted.

Axes as in :mod:`xlora_jax.layers.mixing`, and M for modules stacked by ``nnx.scan``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from xlora_jax.config import XLoraConfig
from xlora_jax.conversion.linen import PLANS, ForeignModule, FoundLayer, Lora, put_together
from xlora_jax.layers.modules import add_experts
from xlora_jax.model import XLoraModel
from xlora_jax.trees import Path, flatten, unflatten

__all__ = ["NnxModule", "convert_nnx", "find_nnx_layers"]

_PLANS: dict[type[nnx.Module], Callable[..., Any]] = {
    nnx.Linear: PLANS[linen.Dense],
    nnx.LinearGeneral: PLANS[linen.DenseGeneral],
    nnx.Einsum: PLANS[linen.Einsum],
    nnx.Embed: PLANS[linen.Embed],
    nnx.Conv: PLANS[linen.Conv],
}
_KERNELS = ("kernel", "embedding")
_COLLECTIONS = ("experts", "scalings")


class _Given(nnx.Variable[Any]):
    """An array of experts or gates in a layer; a distinct type, so parameter filters skip it."""


@dataclass(frozen=True)
class NnxModule(ForeignModule):
    """An NNX model with the interface of this library's own modules.

    Attributes:
        module: structure of the model, the ``GraphDef`` that ``nnx.split`` returns.
        paths: paths of all variables of the model.
    """

    module: Any
    paths: tuple[tuple[Any, ...], ...] = ()

    def call(
        self,
        variables: Mapping[str, Any],
        positional: list[Any],
        named: dict[str, Any],
        rngs: dict[str, jax.Array],
        captured: Path | None,
    ) -> tuple[Any, jax.Array | None]:
        """Run the model; see :meth:`ForeignModule.call`."""
        model = self.merged(variables["params"])
        layers = _by_path(model)
        given = {collection: _by_layer(variables[collection]) for collection in _COLLECTIONS if collection in variables}
        for number, (path, leaves) in enumerate(given.get("experts", {}).items()):
            _seat(layers[path], path, {name: leaves_of.get(path, {}) for name, leaves_of in given.items()})
            if "lora_dropout" in rngs:
                key = jax.random.fold_in(rngs["lora_dropout"], number)
                stacked = leaves["lora_b"].shape[:-2]
                layers[path].xlora_rng = _Given(jax.random.split(key, stacked) if stacked else key)
        if captured in layers:
            kind: Any = type(layers[captured])
            layers[captured].__class__ = _capturing(kind)
        out = model(*positional, **named)
        caught = getattr(layers.get(captured or ()), "xlora_caught", None)
        return out, None if caught is None else caught[...]

    def merged(self, params: Mapping[str, Any]) -> Any:
        """Return the model with ``params``."""
        leaves = flatten(params)
        tree: dict[Any, Any] = {}
        for path in self.paths:
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = leaves[_names(path)]
        return nnx.merge(self.module, tree)


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(map(str, path))


def _by_path(model: Any) -> dict[Path, Any]:
    return {_names(path): node for path, node in nnx.iter_graph(model) if path and isinstance(node, nnx.Module)}


def _by_layer(collection: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    layers: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten(collection).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    return layers


def _seat(layer: Any, path: Path, given: Mapping[str, Mapping[str, Any]]) -> None:
    """Store ``given`` in variables of a layer, and change its class to one that mixes them."""
    kind: Any = type(layer)
    layer.__class__ = _mixing(kind)
    layer.xlora_path = path
    for collection, leaves in given.items():
        for name, leaf in leaves.items():
            setattr(layer, f"xlora_{collection}_{name}", _Given(leaf))


@dataclass(frozen=True)
class _Bound:
    """An NNX layer with the Linen interface that :func:`xlora_jax.layers.modules.add_experts` and the plans need."""

    layer: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    @property
    def path(self) -> Path:
        return self.layer.xlora_path  # type: ignore[no-any-return]

    @property
    def features(self) -> Any:
        return self.layer.features if isinstance(self.layer, nnx.Embed) else self.layer.out_features

    @property
    def batch_dims(self) -> tuple[int, ...]:
        return tuple(self.layer.batch_axis)

    def has_variable(self, collection: str, name: str) -> bool:
        return hasattr(self.layer, f"xlora_{collection}_{name}")

    def get_variable(self, collection: str, name: str) -> Any:
        return getattr(self.layer, f"xlora_{collection}_{name}")[...]

    def has_rng(self, name: str) -> bool:
        return name == "lora_dropout" and hasattr(self.layer, "xlora_rng")

    def make_rng(self, name: str) -> Any:
        return self.layer.xlora_rng[...]


def _plan_of(kind: type) -> Callable[..., Any]:
    return next(plan for known, plan in _PLANS.items() if issubclass(kind, known))


@lru_cache
def _mixing(kind: Any) -> Any:
    """Return the subclass of a layer class that mixes experts."""
    plan = _plan_of(kind)

    class Mixing(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().__call__(*args, **kwargs)
            bound: Any = _Bound(self)
            shape, project, axes = plan(bound, outputs, *args, **kwargs)
            if (seen := getattr(self, "xlora_seen", None)) is not None:
                seen(bound, shape)
            flat = outputs if axes is None else axes.flatten(outputs)
            mixed = add_experts(bound, flat, project)
            return mixed if axes is None else axes.restore(mixed, outputs)

    return Mixing


@lru_cache
def _capturing(kind: Any) -> Any:
    """Return the subclass of a module class that keeps its output."""

    class Capturing(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().__call__(*args, **kwargs)
            self.xlora_caught = nnx.Intermediate(outputs)
            return outputs

    return Capturing


def _described(
    model: nnx.Module, hidden_states: str | Callable[[Any], jax.Array] = "", **settings: Any
) -> tuple[NnxModule, dict[str, Any]]:
    """Split a model into its structure and its variables by path."""
    graphdef, state = nnx.split(model)
    leaves = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
    foreign = NnxModule(graphdef, hidden_states, paths=tuple(leaves), **settings)
    return foreign, unflatten({_names(path): leaf for path, leaf in leaves.items()})


def find_nnx_layers(model: nnx.Module, *inputs: Any, **named: Any) -> dict[str, FoundLayer]:
    """Find the layers that experts can adapt, in the order in which a call of the model reaches them.

    Args:
        model: model to search.
        *inputs: positional inputs of a call; only their shapes and dtypes matter.
        **named: named inputs of a call; only their shapes and dtypes matter.

    Returns:
        Mapping of name (path joined by ``/``) to layer; see :func:`xlora_jax.conversion.linen.find_layers`.
    """
    foreign, params = _described(model)
    kernels = {path[:-1]: leaf.shape for path, leaf in flatten(params).items() if path[-1] in _KERNELS}
    found: dict[str, FoundLayer] = {}

    def seen(bound: _Bound, shape: tuple[int, ...]) -> None:
        whole = kernels[bound.path]
        own = next(getattr(bound.layer, name) for name in _KERNELS if hasattr(bound.layer, name)).shape
        stacked = len(whole) - len(own)
        if stacked > 1:
            raise ValueError(
                f"layer {'/'.join(bound.path)} is stacked {stacked} times over; experts can be stacked once"
            )
        carried = bound.get_variable("experts", "mark").shape == own
        found.setdefault("/".join(bound.path), FoundLayer(bound.path, shape, whole[0] if stacked else None, carried))

    def call(params: Any, inputs: Any, named: Any) -> None:
        merged = foreign.merged(params)
        for path, layer in _by_path(merged).items():
            if path in kernels and issubclass(type(layer), tuple(_PLANS)):
                # A marker as large as the kernel shows whether the transforms carry the experts too.
                _seat(layer, path, {"experts": {"mark": jnp.zeros(kernels[path])}})
                layer.xlora_seen = seen
        merged(*inputs, **named)

    jax.eval_shape(call, params, inputs, named)
    return found


def convert_nnx(
    model: nnx.Module,
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
    """Make an X-LoRA model of any Flax NNX model; the model is not changed.

    Args:
        model: model in evaluation mode (``model.eval()``).
        experts: mapping of expert name -> layer name (path joined by ``/``) -> LoRA, in the order of the classifier's
            outputs.
        config: X-LoRA settings. This and the following arguments are those of
            :func:`xlora_jax.conversion.linen.convert`.
        hidden_states: path of a submodule that is not inside a transform, or a function of the model's output.
        example: inputs of a call by name.
        logits: function from the model's output to logits; None takes the output itself.
        positional: names of the inputs that the model takes by position, in order.
        dtype: dtype of the new classifier.
        expert_dtype: dtype of the experts and of the operands of their products.
        seed: seed of the new classifier.

    Returns:
        The X-LoRA model; its base parameters are all variables of ``model``, by path.

    Raises:
        ValueError: see :func:`xlora_jax.conversion.linen.convert`.
    """
    foreign, params = _described(
        model,
        hidden_states,
        logits=logits,
        positional=positional,
        hidden_size=config.hidden_size,
        dtype=dtype,
        param_dtype=dtype,
    )
    named = dict(example)
    inputs = [named.pop(name) for name in positional if name in named]
    found = find_nnx_layers(model, *inputs, **named)
    return put_together(foreign, params, experts, found, config, example, np.dtype(expert_dtype), seed)
