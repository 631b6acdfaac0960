"""HF base models that are not ported to Flax: transformers' own PyTorch code, run as a JAX function by torchax.

Layers and their numbers come from the model's ``named_modules()``, which is PEFT's order.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from interop.hf.auto import load_hf_config, load_torch_model
from interop.hf.families.table import Placed
from interop.hf.head import Head
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import read_json
from interop.storage.tensors import open_tensors, require_finite
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.trees import Path as TreePath
from xlora_jax.trees import flatten, unflatten

if TYPE_CHECKING:
    from xlora_jax.conversion.linen import FoundLayer
    from xlora_jax.conversion.torch import TorchModule

__all__ = ["TorchDetails", "TorchFamily", "declare_torch", "head_tensors_of", "read_torch_params", "torch_shapes"]

_HEADS = {
    "ForSequenceClassification": "pooled",
    "ForTokenClassification": "token",
    "ForImageClassification": "first",
    "ForMaskedLM": "masked",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "ForConditionalGeneration": "lm",
    "ForSpeechSeq2Seq": "lm",
}
_AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}


@dataclass(frozen=True)
class TorchDetails:
    """The part of a model's config that this library needs.

    Attributes:
        hidden_size: D, width of the hidden states.
        vocab_size: V, number of rows of the input embedding; None for a model without tokens.
        context_length: number of positions that the model was made for; None if unknown.
        head: kind of the output head: ``lm``, ``masked``, ``token``, ``pooled`` or ``first``.
        num_labels: number of classes of a classification head.
        two_sequences: whether the model has an encoder and a decoder.
    """

    hidden_size: int
    vocab_size: int | None
    context_length: int | None
    head: str
    num_labels: int
    two_sequences: bool


@dataclass(frozen=True, eq=False)
class TorchFamily:
    """The layers of one PyTorch model, with the interface of :class:`~interop.hf.families.table.Family`.

    Attributes:
        model_type: its name in transformers.
        causal_lm: name of transformers' class.
        placed: all modules with parameters.
        layers: layers that experts can adapt, by name.
        refused: reasons why experts can't adapt certain layers, by name of the layer.
        table: path of the table whose values a tied head shares.
    """

    model_type: str
    causal_lm: str
    placed: tuple[Placed, ...]
    layers: Mapping[str, FoundLayer]
    refused: Mapping[str, str]
    table: TreePath
    unread: tuple[str, ...] = ()
    blocks: str = ""

    def modules(self, module: Any) -> Iterator[Placed]:
        """Yield all modules with parameters, in torch's order; see :meth:`Family.modules`."""
        return iter(self.placed)

    def kernel_shapes(self, module: Any) -> dict[TreePath, tuple[int, ...]]:
        """Return the kernel shape of every layer that can be adapted, by path; see :meth:`Family.kernel_shapes`."""
        return {layer.path: layer.shape for layer in self.layers.values()} | {
            placed.path: () for placed in self.placed if placed.hf in self.refused
        }

    def adapted_layers(self, base: Any, adapted: Collection[str], *, with_bias: bool) -> AdaptedLayers:
        """Number the layers named in ``adapted`` as PEFT does."""
        names = tuple(name for name in self.layers if name in adapted)
        slots = tuple(Slot(self.layers[name].path, number) for number, name in enumerate(names))
        return AdaptedLayers(names, slots, with_bias)


def declare_torch(
    directory: Path, dtype: jax.typing.DTypeLike | None, head: Head | None, *, weights: bool
) -> tuple[TorchModule, TorchFamily, Mapping[str, Any], Any]:
    """Make the model of a directory, and find its layers.

    Args:
        directory: directory of the model.
        dtype: dtype of parameters and computation; None means the one in config.json, or float32.
        head: classification head that replaces the model's own; None keeps it.
        weights: whether to read the weights; without them, all tensors are on the device ``meta``.

    Returns:
        The module, its layers, its config as a mapping, and the PyTorch model.

    Raises:
        FormatError: a file can't be used, or torchax can't run the model; the message names file or operator.
    """
    import torch

    from xlora_jax.conversion.torch import TorchModule, describe, find_torch_layers

    config = _read_config(directory)
    own = config.to_dict()
    dtype = jnp.dtype(dtype or own.get("dtype") or (own.get("text_config") or {}).get("dtype") or "float32")
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kind = _class_of(config, directory, head)
    if weights:
        model = _with_weights(kind, config, directory, getattr(torch, dtype.name), head)
    else:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=getattr(torch, dtype.name))
    model = model.eval()
    parameters = inspect_parameters(model)
    leaves = describe(model)
    table = next((leaf.path for leaf in leaves if leaf.path[-1] == "embedding"), ())
    details = TorchDetails(
        hidden_size=int(config.get_text_config(decoder=True).hidden_size),
        vocab_size=_vocab_size(model),
        context_length=getattr(config.get_text_config(decoder=True), "max_position_embeddings", None),
        head=next((head for end, head in _HEADS.items() if kind.__name__.endswith(end)), "none"),
        num_labels=config.num_labels,
        two_sequences=bool(getattr(config, "is_encoder_decoder", False)),
    )
    example = _example(model, config)
    module = TorchModule(
        model,
        _last_hidden_states,
        logits=_logits,
        positional=(),
        hidden_size=details.hidden_size,
        dtype=dtype,
        param_dtype=dtype,
        leaves=leaves,
        options=(("output_hidden_states", True),),
        head=_plain_head(model, example) if weights and details.head == "lm" else None,
        renamed=(("positions", "position_ids"),) if "position_ids" in parameters else (),
        details=details,
    )
    try:
        found, refused = find_torch_layers(module, unflatten(torch_shapes(module, model)), **example)
    except Exception as error:  # whatever the model's code, torchax or JAX raise while they trace it
        raise FormatError(
            f"{directory}: torchax can't run {kind.__name__} as a JAX function: {type(error).__name__}: "
            f"{brief(str(error), 400)}"
        ) from error
    family = TorchFamily(config.model_type, kind.__name__, _placed(model, found, refused), found, refused, table)
    return module, family, own, model


def inspect_parameters(model: Any) -> frozenset[str]:
    """Return the names of the inputs of a model."""
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def _read_config(directory: Path) -> Any:
    path = directory / "config.json"
    content = read_json(path)
    if content.get("quantization_config"):
        raise FormatError(f"{path}: field 'quantization_config': expected none; quantized models don't run by torchax.")
    try:
        config = load_hf_config(directory)
    except Exception as error:  # of transformers, of any type
        raise FormatError(f"{path}: transformers can't read it: {error}") from error
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "decoder", "encoder"))):
        if part is not None:
            part.use_cache = False
    config.return_dict = True
    return config


def _class_of(config: Any, directory: Path, head: Head | None) -> Any:
    """Return transformers' class for a config."""
    import transformers

    if head is not None:
        auto = _AUTO.get(head.task_type or "")
        known = {} if auto is None else getattr(transformers, auto)._model_mapping
        if type(config) not in known:
            raise FormatError(
                f"{head.owner}: brings a classification head, but transformers has no class of a "
                f"{config.model_type} for its task_type {head.task_type!r}; expected {' or '.join(_AUTO)}."
            )
        return known[type(config)]
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise FormatError(
            f"{directory / 'config.json'}: field 'architectures': expected the name of a class of transformers "
            f"{transformers.__version__}, got {brief(names)}."
        )
    return kind


def _with_weights(kind: Any, config: Any, directory: Path, dtype: Any, head: Head | None) -> Any:
    tensors = open_tensors(directory)  # checks the files, and links out of the directory
    if not any(tensor.file.suffix == ".safetensors" for tensor in tensors.values()):
        raise FormatError(f"{directory}: expected safetensors, got {listed({t.file.name for t in tensors.values()})}.")
    for tensor in tensors.values():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            require_finite(tensor.read(), tensor.name, tensor.file)
    if head is not None:
        _set_labels(kind, config, head)
    model, report = load_torch_model(kind, directory, config, dtype)
    brought = {} if head is None else head.tensors
    missing = sorted(set(report["missing_keys"]) - brought.keys())
    mismatched = sorted({str(key[0]) for key in report["mismatched_keys"]} - brought.keys())
    if missing or mismatched:
        raise FormatError(
            f"{directory}: the tensors are not those of a {kind.__name__} with this config. Missing: "
            f"{listed(missing) or 'none'}. Of another shape: {listed(mismatched) or 'none'}. Expected a checkpoint "
            f"saved with {kind.__name__}.save_pretrained."
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{directory}: {listed(unused)} belong to no part of this {kind.__name__} and are not used, as in "
            f"transformers.",
            UserWarning,
            stacklevel=5,
        )
    _put_head(model, head)
    return model


def _set_labels(kind: Any, config: Any, head: Head) -> None:
    """Set the number of classes of a config so that a head fits, if any number does."""
    import torch

    sizes = {name: tensor.shape for name, tensor in head.tensors.items()}
    for labels in dict.fromkeys(shape[0] for shape in sizes.values() if shape):
        config.id2label = {i: f"LABEL_{i}" for i in range(labels)}
        config.label2id = {label: i for i, label in config.id2label.items()}
        with torch.device("meta"):
            own = {name: tuple(parameter.shape) for name, parameter in kind._from_config(config).named_parameters()}
        if all(own.get(name) == shape for name, shape in sizes.items()):
            return


def _put_head(model: Any, head: Head | None) -> None:
    """Write the tensors of a head into a model."""
    import torch

    own = dict(model.named_parameters())
    for name, value in ({} if head is None else head.tensors).items():
        assert head is not None
        if name not in own or tuple(own[name].shape) != value.shape:
            raise FormatError(
                f"{head.owner}: brings {name!r} of shape {list(value.shape)}; {type(model).__name__} has "
                f"{list(own[name].shape) if name in own else 'no such parameter'}. It was trained on another base."
            )
        with torch.no_grad():
            own[name].copy_(torch.from_numpy(np.array(value, np.float32)))


def _vocab_size(model: Any) -> int | None:
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return int(table.weight.shape[0]) if hasattr(table, "weight") and table.weight.ndim == 2 else None


def _example(model: Any, config: Any) -> dict[str, Any]:
    """Return inputs to trace a model with. The lengths of two sequences differ, so that their layers can be told."""
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": jnp.zeros((2, config.num_channels, height, width), jnp.float32)}
    lengths = {"input_ids": 5}
    if getattr(config, "is_encoder_decoder", False):
        lengths = {"input_ids": 7, "decoder_input_ids": 5}
    tokens = {name: jnp.asarray(np.arange(2 * n).reshape(2, n) % 3 + 3, jnp.int32) for name, n in lengths.items()}
    return {**tokens, "attention_mask": jnp.ones((2, lengths["input_ids"]), jnp.int32)}


def _last_hidden_states(out: Any) -> jax.Array:
    """Return the last hidden states of an output of transformers, as PEFT takes them; the decoder's of two."""
    states: Sequence[jax.Array] = out.get("hidden_states") or out["decoder_hidden_states"]
    return states[-1]


def _logits(out: Any) -> jax.Array:
    logits: jax.Array = out["logits"]
    return logits


def _plain_head(model: Any, example: Mapping[str, Any]) -> str | None:
    """Return the name of the output head, if the logits are its output for the last hidden states; else None."""
    import torch

    head = model.get_output_embeddings()
    if head is None:
        return None
    inputs = {name: torch.from_numpy(np.array(value, np.int64)) for name, value in example.items()}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        again, logits = head(_last_hidden_states(out)).float(), out.logits.float()
    if again.shape != logits.shape or (again - logits).abs().max() > 1e-5 * logits.abs().max():
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def torch_shapes(module: TorchModule, model: Any) -> dict[TreePath, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each leaf of the parameters, by path."""
    return {leaf.path: _abstract(model, leaf.name, leaf.transposed) for leaf in module.leaves}


def _abstract(model: Any, name: str, transposed: bool) -> jax.ShapeDtypeStruct:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = module._parameters[own] if own in module._parameters else module._buffers[own]
    shape = tuple(tensor.shape)
    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    return jax.ShapeDtypeStruct(shape[::-1] if transposed else shape, jax.dtypes.canonicalize_dtype(dtype))


def _placed(model: Any, found: Mapping[str, FoundLayer], refused: Mapping[str, str]) -> tuple[Placed, ...]:
    import torch

    placed: list[Placed] = []
    for name, module in model.named_modules():
        if name not in found and name not in refused and not module._parameters:
            continue
        kind = "other"
        if isinstance(module, torch.nn.Embedding):
            kind = "embedding"
        elif name in found or name in refused:
            kind = {torch.nn.Linear: "linear"}.get(type(module), "linear")
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
                kind = "conv"
            elif not isinstance(module, torch.nn.Linear):
                kind = "linear_in_out"
        placed.append(Placed(name, tuple(name.split(".")), (), kind))
    return tuple(placed)


def read_torch_params(module: TorchModule, model: Any, place: Any) -> dict[str, Any]:
    """Move a model's tensors into the tree of parameters, one at a time."""
    from xlora_jax.conversion.torch import take_params

    def put(path: TreePath, leaf: NDArray[Any]) -> Any:
        return place(("base", *path), leaf)

    return take_params(model, module.leaves, put)


def head_tensors_of(module: TorchModule, params: Mapping[str, Any], head: Head) -> dict[str, NDArray[Any]]:
    """Return the tensors of a head that an adapter brought, by torch name; unchanged ones as they were loaded."""
    flat = flatten(params)
    own = {leaf.name: leaf for leaf in module.leaves}
    found: dict[str, NDArray[Any]] = {}
    for name, brought in head.tensors.items():
        value = np.asarray(flat[own[name].path])
        value = value.T if own[name].transposed else value
        found[name] = brought if np.array_equal(brought.astype(value.dtype), value) else value
    return found
