"""X-LoRA for any PyTorch model that torchax can run: the counterpart of :mod:`xlora_jax.conversion.linen`.

torchax runs the model's own PyTorch code on JAX arrays, so both passes are one jitted JAX function. A forward hook on
each adapted layer mixes the experts. The model's parameters and buffers become a JAX tree: a linear layer's weight is
stored as ``kernel [D, F]`` and an embedding's as ``embedding [V, D]``, as in Flax, so that sharding rules apply; all
others keep their names and shapes.

This module needs the extra ``torchax`` and is imported by nothing else here.

Axes as in :mod:`xlora_jax.layers.mixing`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from torchax.tensor import Tensor
except ImportError as error:
    raise ImportError(
        f"{error}: PyTorch models run through torchax: pip install 'xlora-jax[torchax]', with a build of torch for the "
        f"CPU"
    ) from error

from xlora_jax.config import XLoraConfig
from xlora_jax.conversion.linen import Axes, ForeignModule, FoundLayer, Lora, Plan, put_together
from xlora_jax.conversion.torch_lowerings import make_environment, masks_by_jax
from xlora_jax.layers.modules import add_experts, project_conv, project_dense
from xlora_jax.model import XLoraModel
from xlora_jax.models import DecoderOutput
from xlora_jax.trees import Path, flatten, unflatten

__all__ = ["Leaf", "TorchModule", "adaptable_layers", "convert_torch", "describe", "find_torch_layers", "take_params"]

ENVIRONMENT = make_environment()
# A call changes the model while it runs (parameters, hooks), and torchax's modes; one at a time.
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer of a PyTorch model, and its place in the JAX tree.

    Attributes:
        name: its name in PyTorch, such as ``model.layers.0.mlp.up_proj.weight``.
        path: its path in the tree.
        transposed: whether the tree holds the transpose.
    """

    name: str
    path: Path
    transposed: bool = False


@dataclass(frozen=True)
class TorchModule(ForeignModule):
    """A PyTorch model with the interface of this library's own modules.

    Attributes:
        module: ``torch.nn.Module`` in evaluation mode, whose parameters may be on the device ``meta``.
        leaves: parameters and buffers.
        options: further named inputs of every call, such as ``(("output_hidden_states", True),)``.
        head: torch name of the output head, if the logits are its product with the hidden states; None otherwise.
        renamed: pairs of this library's name of an input and the model's, such as ``("positions", "position_ids")``.
        details: object with further attributes of :attr:`config`; None for none.
    """

    module: Any
    leaves: tuple[Leaf, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    head: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    details: Any = field(default=None)

    @property
    def config(self) -> Any:
        """Config: ``hidden_size``, and the attributes of :attr:`details`."""
        return super().config if self.details is None else self.details

    @property
    def whole_logits(self) -> bool:
        """Whether logits can only be had by running the model as a whole."""
        return self.head is None

    @property
    def head_path(self) -> Path:
        """Path of the output head."""
        return tuple((self.head or "").split("."))

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Mapping[str, jax.Array] | None = None,
        method: str | None = None,
        with_logits: bool = True,
        **inputs: Any,
    ) -> Any:
        """Run the model, or its output head (``method="unembed"``); see :class:`~xlora_jax.models.BaseModule`."""
        if method == "unembed" and self.head is not None:
            head = self.module.get_submodule(self.head)
            with self._running(variables, dict(rngs or {}), ()) as (torch_params, _):
                prefix = f"{self.head}."
                own = {name.removeprefix(prefix): p for name, p in torch_params.items() if name.startswith(prefix)}
                return _call(head, own or _tied(self.module, head, torch_params), args, {})
        names = dict(self.renamed)
        if "segment_ids" in inputs:
            raise ValueError(
                "segment_ids: a PyTorch model can't keep the documents of a packed row apart; train with one document "
                "per row (pack=False, --no-pack)"
            )
        if getattr(self.config, "two_sequences", False) and "decoder_input_ids" not in inputs:
            raise ValueError(
                f"{type(self.module).__name__} has an encoder and a decoder: give decoder_input_ids beside input_ids"
            )
        return super().apply(
            variables,
            *args,
            rngs=rngs,
            method=method,
            with_logits=with_logits,
            **{names.get(name, name): value for name, value in inputs.items()},
        )

    def call(
        self,
        variables: Mapping[str, Any],
        positional: list[Any],
        named: dict[str, Any],
        rngs: dict[str, jax.Array],
        captured: Path | None,
    ) -> tuple[Any, jax.Array | None]:
        """Run the model; see :meth:`ForeignModule.call`."""
        with self._running(variables, rngs, captured or ()) as (torch_params, caught):
            out = _call(self.module, torch_params, positional, {**dict(self.options), **named})
        return out, caught[0] if caught else None

    @contextmanager
    def _running(
        self, variables: Mapping[str, Any], rngs: Mapping[str, jax.Array], captured: Path
    ) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Hook the adapted layers; yield the parameters by torch name, and the outputs of the module ``captured``."""
        caught: list[Any] = []
        with self.hooked(self._hooks(variables, rngs, captured, caught)):
            yield self.torch_params(variables["params"]), caught

    def _hooks(
        self, variables: Mapping[str, Any], rngs: Mapping[str, jax.Array], captured: Path, caught: list[Any]
    ) -> dict[str, Callable[..., Any]]:
        given = {name: _by_layer(variables[name]) for name in ("experts", "scalings") if name in variables}
        hooks: dict[str, Callable[..., Any]] = {}
        for number, path in enumerate(given.get("experts", {})):
            own = {name: layers.get(path, {}) for name, layers in given.items()}
            key = jax.random.fold_in(rngs["lora_dropout"], number) if "lora_dropout" in rngs else None
            hooks[".".join(path)] = _mixing(path, own, key)
        if captured:
            name = ".".join(captured)
            mixing = hooks.get(name)

            def capture(layer: Any, args: Any, output: Any) -> Any:
                output = output if mixing is None else mixing(layer, args, output)
                caught.append(ENVIRONMENT.t2j_iso(output))
                return output

            hooks[name] = capture
        return hooks

    @contextmanager
    def hooked(self, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Call ``hooks``, by module name, after these modules, within a ``with`` block in which torchax is on."""
        with _LOCK, ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(self.module.get_submodule(name).register_forward_hook(hook).remove)
            # A key made in one trace must not be left in the environment for the next.
            stack.enter_context(ENVIRONMENT.override_property(prng=jax.random.key(0)))
            stack.enter_context(masks_by_jax(ENVIRONMENT))
            stack.enter_context(warnings.catch_warnings())
            # PyTorch counts in int64, and JAX in int32 unless told otherwise.
            warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")
            yield

    def torch_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tree's arrays by torch name, in torch's layout."""
        flat = flatten(params)
        return {leaf.name: flat[leaf.path].T if leaf.transposed else flat[leaf.path] for leaf in self.leaves}


def _call(module: Any, params: dict[str, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a module with other parameters; arrays in, arrays out."""
    args, kwargs, params = ENVIRONMENT.j2t_iso((tuple(args), kwargs, params))
    with ENVIRONMENT, torch.no_grad():
        out = torch.func.functional_call(module, params, args, kwargs, tie_weights=True)
        return ENVIRONMENT.t2j_iso(out)


def _tied(model: Any, head: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a head that shares its weight with another module."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return {name: params[names[id(tensor)]] for name, tensor in head.named_parameters()}


def _by_layer(collection: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    layers: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten(collection).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    return layers


@dataclass(frozen=True)
class _Bound:
    """A PyTorch layer with the Linen interface that :func:`~xlora_jax.layers.modules.add_experts` needs."""

    path: Path
    variables: Mapping[str, Mapping[str, Any]]
    key: jax.Array | None
    conv: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.conv, name)

    def has_variable(self, collection: str, name: str) -> bool:
        return name in self.variables.get(collection, {})

    def get_variable(self, collection: str, name: str) -> Any:
        return self.variables[collection][name]

    def has_rng(self, name: str) -> bool:
        return name == "lora_dropout" and self.key is not None

    def make_rng(self, name: str) -> Any:
        return self.key


def _mixing(path: Path, variables: Mapping[str, Mapping[str, Any]], key: jax.Array | None) -> Callable[..., Any]:
    """Return the forward hook that mixes the experts of a layer."""

    def hook(layer: Any, args: Any, output: Any) -> Any:
        outputs, inputs = ENVIRONMENT.t2j_iso((output, args[0]))
        bound: Any = _Bound(path, variables, key, _conv_settings(layer))
        _, project, axes = _plan(layer)(bound, layer, outputs, inputs)
        flat = outputs if axes is None else axes.flatten(outputs)
        mixed = add_experts(bound, flat, project)
        if (scale := getattr(layer, "embed_scale", None)) is not None:
            # Gemma's embedding multiplies the row that it looks up; the experts' part is multiplied as well.
            factor = ENVIRONMENT.t2j_iso(scale) if isinstance(scale, torch.Tensor) else scale
            mixed = flat + (mixed - flat) * jnp.asarray(factor, flat.dtype)
        return ENVIRONMENT.j2t_iso(mixed if axes is None else axes.restore(mixed, outputs))

    return hook


def _plan_linear(bound: Any, layer: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    return (inputs.shape[-1], outputs.shape[-1]), project_dense(bound, inputs), None


def _plan_embedding(bound: Any, layer: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    return tuple(layer.weight.shape), lambda lora_a: jnp.take(lora_a, inputs, axis=0), None


def _plan_conv(bound: Any, layer: Any, outputs: jax.Array, inputs: jax.Array) -> Plan:
    moved = jnp.moveaxis(inputs, 1, -1)
    order = (0, *range(2, outputs.ndim), 1)
    shape = (*layer.kernel_size, layer.in_channels, layer.out_channels)
    return shape, project_conv(bound, moved), Axes(order, 1)


def _conv_settings(layer: Any) -> Any:
    """Return a convolution's settings under the names that they have in Flax; None for another layer."""
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    padding = layer.padding.upper() if isinstance(layer.padding, str) else [(p, p) for p in layer.padding]
    return SimpleNamespace(
        kernel_size=tuple(layer.kernel_size),
        strides=tuple(layer.stride),
        padding=padding,
        input_dilation=1,
        kernel_dilation=tuple(layer.dilation),
    )


_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def _is_conv1d_of_transformers(layer: Any) -> bool:
    """Return whether this is GPT-2's ``Conv1D``: a linear layer whose weight is ``[D, F]``."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _plan(layer: Any) -> Callable[..., Plan]:
    if isinstance(layer, torch.nn.Embedding):
        return _plan_embedding
    return _plan_conv if isinstance(layer, _CONVOLUTIONS) else _plan_linear


def adaptable_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that LoRA can adapt, by name, in the order in which PEFT numbers them (``named_modules``)."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, *_CONVOLUTIONS)
    return {
        name: layer
        for name, layer in model.named_modules()
        if name and (isinstance(layer, kinds) or _is_conv1d_of_transformers(layer))
    }


def describe(model: torch.nn.Module) -> tuple[Leaf, ...]:
    """Return the places of a model's parameters and buffers in the JAX tree; a shared parameter has one."""
    layers = adaptable_layers(model)
    leaves: list[Leaf] = []
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        owner, _, own = name.rpartition(".")
        layer = layers.get(owner)
        at = tuple(owner.split(".")) if owner else ()
        if own == "weight" and isinstance(layer, torch.nn.Embedding):
            leaves.append(Leaf(name, (*at, "embedding")))
        elif own == "weight" and layer is not None and not isinstance(layer, _CONVOLUTIONS):
            leaves.append(Leaf(name, (*at, "kernel"), transposed=isinstance(layer, torch.nn.Linear)))
        else:
            leaves.append(Leaf(name, (*at, own)))
    return tuple(leaves)


def take_params(
    model: torch.nn.Module,
    leaves: Sequence[Leaf],
    place: Callable[[Path, NDArray[Any]], Any],
    dtype: jax.typing.DTypeLike | None = None,
) -> dict[str, Any]:
    """Move a model's parameters and buffers into a JAX tree, one at a time; the model keeps their shapes only.

    Args:
        model: model; its tensors are on the device ``meta`` afterwards.
        leaves: places of the tensors, see :func:`describe`.
        place: function that puts an array on devices, from its path and the NumPy array.
        dtype: dtype of the floating-point parameters; None keeps theirs. Buffers keep theirs.

    Returns:
        The tree.
    """
    params: dict[Path, Any] = {}
    buffers = {name for name, _ in model.named_buffers()}
    owners = _owners(model)
    for leaf in leaves:
        tensor = model.get_parameter(leaf.name) if leaf.name not in buffers else model.get_buffer(leaf.name)
        value = _as_numpy(tensor.T if leaf.transposed else tensor)
        if dtype is not None and leaf.name not in buffers and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(dtype)
        params[leaf.path] = jax.block_until_ready(place(leaf.path, value))
        # Every name of a shared tensor lets go of it.
        empty = torch.empty_like(tensor, device="meta")
        shared = torch.nn.Parameter(empty, requires_grad=False) if leaf.name not in buffers else empty
        for module, own in owners.get(id(tensor), ()):
            held: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
            held[own] = shared
        del tensor
    for module in model.modules():
        for own, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not isinstance(value, Tensor):
                # A tensor that is neither parameter nor buffer is a constant of the program.
                setattr(module, own, ENVIRONMENT.j2t_iso(jnp.asarray(_as_numpy(value))))
    return unflatten(params)


def _owners(model: torch.nn.Module) -> dict[int, list[tuple[torch.nn.Module, str]]]:
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, own))
    return owners


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        # NumPy has no bfloat16 of its own; the bits are those of ml_dtypes'.
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return np.ascontiguousarray(tensor.numpy())


def find_torch_layers(
    foreign: TorchModule, params: Mapping[str, Any], **example: Any
) -> tuple[dict[str, FoundLayer], dict[str, str]]:
    """Find the layers that experts can adapt, in PEFT's order.

    Args:
        foreign: model.
        params: its parameters.
        **example: inputs of a call by name; only their shapes and dtypes matter.

    Returns:
        Mapping of name to layer, and mapping of the names of all other layers to the reason why experts can't adapt
        them: never called, or called on something else than the tokens of the gates.
    """
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            if not args or not isinstance(output, torch.Tensor):
                return
            outputs, inputs = ENVIRONMENT.t2j_iso((output, args[0]))
            bound: Any = _Bound(tuple(name.split(".")), {}, None, _conv_settings(layer))
            shape, _, axes = _plan(layer)(bound, layer, outputs, inputs)
            flat = outputs if axes is None else axes.flatten(outputs)
            calls.setdefault(name, []).append((shape, flat.shape[:-1]))

        return hook

    layers = adaptable_layers(foreign.module)

    def run(params: Any, example: Any) -> jax.Array:
        with foreign.hooked({name: noting(name) for name in layers}):
            out: DecoderOutput = foreign.apply({"params": params}, **example)
            return out.hidden_states

    hidden = jax.eval_shape(run, params, example)
    batch, length = hidden.shape[:2]
    found: dict[str, FoundLayer] = {}
    refused: dict[str, str] = {}
    for name, layer in layers.items():
        seen = calls.get(name)
        positions = [] if seen is None else [at for _, at in seen]
        is_conv = isinstance(layer, _CONVOLUTIONS)
        if seen is None:
            refused[name] = "a call of the model does not reach it"
        elif not is_conv and any(at not in ((batch, length), (batch * length,)) for at in positions):
            refused[name] = (
                f"it acts on positions {list(positions[0])}, and there are gates for the tokens "
                f"{[batch, length]} of the hidden states only"
            )
        else:
            found[name] = FoundLayer(tuple(name.split(".")), seen[0][0], None, True)
    return found, refused


def convert_torch(
    model: torch.nn.Module,
    experts: Mapping[str, Mapping[str, Lora]],
    config: XLoraConfig,
    *,
    hidden_states: str | Callable[[Any], jax.Array],
    example: Mapping[str, Any],
    logits: Callable[[Any], jax.Array] | None = None,
    positional: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    expert_dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> XLoraModel:
    """Make an X-LoRA model of any PyTorch model that torchax can run.

    The model's parameters are moved: afterwards the PyTorch model is on the device ``meta``, and belongs to the
    X-LoRA model.

    Args:
        model: model in evaluation mode (``model.eval()``).
        experts: mapping of expert name -> layer name, such as ``model.layers.0.mlp.up_proj`` -> LoRA (in Flax's
            layout), in the order of the classifier's outputs.
        config: X-LoRA settings; ``hidden_size`` is the width of the hidden states.
        hidden_states: function from the model's output to the classifier's input ``[B, T, D]``, such as
            ``lambda out: out.hidden_states[-1]``, or the path of a submodule whose output is taken.
        example: inputs of a call by name, to trace the model; only their shapes and dtypes matter. Where a model has
            two sequences (encoder and decoder), give them different lengths.
        logits: function from the model's output to logits, such as ``lambda out: out.logits``; None takes the output
            itself.
        positional: names of the inputs that the model takes by position, in order; others are passed by name.
        options: further named inputs of every call, such as ``{"output_hidden_states": True, "use_cache": False}``;
            hashable.
        dtype: dtype of the new classifier.
        expert_dtype: dtype of the experts and of the operands of their products.
        seed: seed of the new classifier.

    Returns:
        The model. Layers are numbered as PEFT numbers them.

    Raises:
        ValueError: an expert names a layer that does not exist or does not fit, or at which the gates have no meaning.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, in which dropout is on: call model.eval() first")
    foreign = TorchModule(
        model,
        hidden_states,
        logits=logits,
        positional=positional,
        hidden_size=config.hidden_size,
        dtype=dtype,
        param_dtype=dtype,
        leaves=describe(model),
        options=tuple((options or {}).items()),
    )
    params = take_params(model, foreign.leaves, lambda path, leaf: jnp.asarray(leaf))
    found, refused = find_torch_layers(foreign, params, **example)
    for expert, layers in experts.items():
        if lost := [name for name in layers if name in refused]:
            raise ValueError(
                f"expert {expert!r}, layer {lost[0]!r} can't be adapted: {refused[lost[0]]}; leave it out of the "
                f"expert's targets"
            )
    return put_together(foreign, params, experts, found, config, example, np.dtype(expert_dtype), seed)
