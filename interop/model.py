"""Loading and saving X-LoRA models: base, experts and classifier."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.checkpoint.layouts import XLoraCheckpoint
from interop.checkpoint.read import read_xlora
from interop.checkpoint.write import check_layout, check_target, write_xlora
from interop.experts import fit_adapters, stack_experts, unstack_experts
from interop.hf.base import Placer, head_tensors, leave_in_memory, load_base, open_base, put_on_default_device
from interop.hf.head import Head
from interop.peft.adapter import LoraAdapter, load_lora
from interop.peft.heads import choose_head
from interop.storage.errors import FormatError
from interop.storage.hub import resolve
from xlora_jax import BaseModel, XLoraConfig, XLoraModel
from xlora_jax.layers.adapted import AdaptedLayers
from xlora_jax.memory import check_fits
from xlora_jax.trees import flatten, unflatten

if TYPE_CHECKING:
    from xlora_jax.training.data import Codec

__all__ = [
    "TASK_TYPES",
    "XLoraOrigin",
    "check_save",
    "experts_of",
    "load_xlora",
    "open_xlora",
    "save_xlora",
    "stored_dtype",
]


@dataclass(frozen=True)
class XLoraOrigin:
    """Record of the files that an X-LoRA model came from.

    Attributes:
        base: origin of the base model.
        adapters: adapters as loaded, in the order of the experts.
        extras: fields of the loaded checkpoint beyond the 13 of X-LoRA, such as ``task_type``.
    """

    base: Any
    adapters: tuple[LoraAdapter, ...]
    extras: Mapping[str, Any]

    @cached_property
    def codec(self) -> Codec:
        """Codec of the tokenizer beside the base model's files, loaded when it is first used."""
        from interop.hf.tokenizer import load_codec

        return load_codec(self.base.directory)


def load_xlora(
    base: str | Path | BaseModel,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    config: XLoraConfig | None = None,
    checkpoint: str | Path | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    expert_dtype: jax.typing.DTypeLike = "float32",
    seed: int = 0,
    head: str | None = None,
    scan_layers: bool = True,
    place: Placer | None = None,
    backend: str = "auto",
    router: str = "classifier",
    quantize: str | None = None,
    **hub_options: Any,
) -> XLoraModel:
    """Load an X-LoRA model: a base model, its experts, and a classifier, new or trained.

    Args:
        base: HF model directory or hub id, or a loaded base model.
        adapters: mapping of expert name to PEFT LoRA directory or hub id, in the order of the classifier's outputs.
            None takes the adapters of ``config`` or of ``checkpoint``. With a checkpoint, they replace its paths, in
            the same order.
        config: settings of a new classifier; None means PEFT's defaults. Not allowed with ``checkpoint``.
        checkpoint: directory or hub id of a trained X-LoRA checkpoint, in any layout.
        dtype: dtype of the base model and the classifier; None means the dtype in the base's config.json.
        expert_dtype: dtype of the experts and of the operands of their products. PEFT uses float32. bfloat16 is faster,
            and accumulates in float32.
        seed: seed of a new classifier.
        head: name of the expert whose classification head the model gets, needed if the adapters' heads differ (PEFT
            saves heads for SEQ_CLS and TOKEN_CLS). None takes the checkpoint's head, else the head the adapters share,
            else the base's own.
        scan_layers: see :func:`interop.load_base`.
        place: see :func:`interop.load_base`; it is called for the arrays of experts and classifier too.
        backend: see :func:`interop.load_base`.
        router: ``classifier``, or ``arrow``: each layer computes its gates from its own input and the experts'
            directions, and there is nothing to train. Of ``config``, ``top_k_lora``, ``softmax_temperature`` and
            ``global_scaling_weight`` apply.
        quantize: ``int8``, ``int4`` or ``nf4`` for the base's kernels, see :func:`interop.load_base`.
        **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for hub ids.

    Returns:
        The model.

    Raises:
        ValueError: arguments exclude each other, or a config does not fit the base or the experts.
        FormatError: a file can't be used; the message names it and says what to do.
    """

    def get_base(brought: Head | None) -> BaseModel:
        if not isinstance(base, BaseModel):
            return load_base(
                base,
                dtype=dtype,
                scan_layers=scan_layers,
                place=place,
                head=brought,
                backend=backend,
                quantize=quantize,
                **hub_options,
            )
        if dtype is not None and jnp.dtype(dtype) != jnp.dtype(base.module.dtype):
            raise ValueError(f"dtype {dtype} differs from that of the base model given, {base.module.dtype}")
        if quantize not in (None, base.origin.quantized):
            raise ValueError(
                f"quantize {quantize!r}: the base model given is loaded already, as {base.origin.quantized}; give its "
                f"directory or hub id instead, or load it with load_base(..., quantize={quantize!r})"
            )
        if brought is not None and not brought.equals(base.origin.head):
            raise ValueError(
                f"the base model given has not the classification head that {brought.owner} brings; give its directory "
                f"or hub id instead, or load it with load_base(..., head=choose_head(adapters)) of interop.peft.heads"
            )
        return base

    if checkpoint is not None and config is not None:
        raise ValueError("give either checkpoint (which has its config) or config (for a new classifier), not both")
    if router not in ("classifier", "arrow"):
        raise ValueError(f"router: expected 'classifier' or 'arrow', got {router!r}")
    if router == "arrow" and checkpoint is not None:
        raise ValueError("give either checkpoint (a trained classifier) or router='arrow' (none), not both")
    trained = None if checkpoint is None else read_xlora(resolve(checkpoint, **hub_options))
    return _put_together(
        get_base,
        trained,
        adapters,
        config,
        expert_dtype=jnp.dtype(expert_dtype),
        seed=seed,
        head=head,
        place=place or put_on_default_device,
        router=router,
        **hub_options,
    )


def open_xlora(
    base: str | Path,
    *,
    checkpoint: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> XLoraModel:
    """Open a trained X-LoRA model without reading the base's weights: to convert its layout, or to check that it fits.

    Args:
        base: HF model directory or hub id.
        checkpoint: directory or hub id, as in :func:`load_xlora`.
        adapters: mapping of expert name to directory or hub id, as in :func:`load_xlora`.
        dtype: dtype of base and classifier, as in :func:`load_xlora`.

    Returns:
        The model. The base's parameters are not read; experts and classifier are NumPy arrays.

    Raises:
        FormatError: :func:`load_xlora` would refuse it, for other reasons than the values of the base's weights.
    """
    trained = read_xlora(resolve(checkpoint))

    def opened(head: Head | None) -> BaseModel:
        model = open_base(base, dtype=dtype, head=head)
        # Without the base's weights, the gate is still the one that was trained on them in that form.
        quantized = model.origin.quantized or trained.extras["quantized"]
        return dataclasses.replace(model, origin=dataclasses.replace(model.origin, quantized=quantized))

    return _put_together(
        opened,
        trained,
        adapters,
        None,
        expert_dtype=np.dtype(np.float32),
        seed=0,
        head=None,
        place=leave_in_memory,
    )


def stored_dtype(checkpoint: str | Path) -> np.dtype[Any]:
    """Return the dtype of a checkpoint's classifier for :func:`open_xlora`, float32 in place of float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading repeats these warnings
        stored = read_xlora(resolve(checkpoint)).classifier[0][0].dtype
    return stored if stored.itemsize < 8 else np.dtype(np.float32)


def _put_together(
    get_base: Callable[[Head | None], BaseModel],
    trained: XLoraCheckpoint | None,
    adapters: Mapping[str, str | Path] | None,
    config: XLoraConfig | None,
    *,
    expert_dtype: np.dtype[Any],
    seed: int,
    head: str | None,
    place: Placer,
    router: str = "classifier",
    **hub_options: Any,
) -> XLoraModel:
    """Make a model from a base with the chosen head, from experts, and from a classifier, new or trained."""
    if trained is not None:
        config = trained.config
        adapters = experts_of(trained, adapters)
    elif adapters is None:
        adapters = None if config is None else config.adapters
    if not adapters:
        raise ValueError("no experts: pass adapters={name: directory or hub id}")
    experts_read = [load_lora(path, name=name, **hub_options) for name, path in adapters.items()]
    base_model = get_base(_brought_head(trained, experts_read, head))
    config = _fitted(config, adapters, base_model)

    loaded = fit_adapters(experts_read, base_model)
    experts, layers = stack_experts(loaded, base_model, expert_dtype, place, directions=router == "arrow")
    origin = XLoraOrigin(base_model.origin, loaded, {} if trained is None else trained.extras)
    params = {"base": base_model.params, "experts": experts, "classifier": {}}
    model = XLoraModel(base_model.module, params, config, layers, tuple(adapters), origin, router)
    if router == "arrow":
        return model
    classifier = (
        _new_classifier(model, seed)
        if trained is None
        else _trained_classifier(trained, jax.eval_shape(partial(_new_classifier, model, seed)), config, layers)
    )
    placed = {path: place(("classifier", *path), np.asarray(leaf)) for path, leaf in flatten(classifier).items()}
    return model.replace(params={**params, "classifier": unflatten(placed)})


def save_xlora(model: XLoraModel, directory: str | Path, layout: str = "peft") -> None:
    """Write classifier, settings and experts to a directory; an earlier save there is replaced as a whole.

    Args:
        model: model from :func:`load_xlora`, trained or not.
        directory: directory to create or replace; a kill at any moment leaves the old one or the new one.
        layout: ``peft``, ``xlora`` (the original) or ``mistralrs``.

    Raises:
        FormatError: the layout can't express this model; the message gives the reason.
    """
    if model.router != "classifier":
        raise FormatError(
            f"the router {model.router!r} has no trained weights to save; expected a model with a classifier. Load it "
            f"again from its adapters with load_xlora(..., router={model.router!r})."
        )
    origin: XLoraOrigin = model.origin
    classifier = model.params["classifier"]
    write_xlora(
        directory,
        layout=layout,
        config=model.config,
        classifier=[
            (np.asarray(dense["kernel"]), np.asarray(dense["bias"]))
            for dense in (classifier[f"dense_{i}"] for i in range(model.config.xlora_depth))
        ],
        adapters=unstack_experts(model.params["experts"], model.layers, origin.adapters),
        base_model=origin.base.name_or_path,
        layer_names=model.layer_names,
        extras={"task_type": TASK_TYPES.get(model.module.config.head), **origin.extras},
        head=head_tensors(BaseModel(model.module, model.params["base"], origin.base)),
        num_labels=model.module.config.num_labels,
        quantized=origin.base.quantized,
    )


def check_save(model: XLoraModel, directory: str | Path, layout: str = "peft") -> None:
    """Check that :func:`save_xlora` will be able to write a model, before it is trained. Nothing is written.

    Args:
        model: as loaded by :func:`load_xlora`.
        directory: to be created or replaced.
        layout: as of :func:`save_xlora`.

    Raises:
        FormatError: the layout can't express this model.
        OSError: the directory is a file, holds something else than an earlier save, or can't be written.
    """
    check_target(directory)
    origin: XLoraOrigin = model.origin
    for text in (*model.expert_names, str(origin.base.name_or_path), str(directory)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{text!a} holds half of a surrogate pair, which no JSON file can; rename it.") from error
    # Shapes decide: values may be spread over several processes, and are about to change.
    classifier = [
        (np.zeros(dense["kernel"].shape, np.float32), np.zeros(dense["bias"].shape, np.float32))
        for dense in (model.params["classifier"][f"dense_{i}"] for i in range(model.config.xlora_depth))
    ]
    head = None if origin.base.head is None else origin.base.head.tensors
    check_layout(layout, model.config, classifier, origin.adapters, model.layer_names, head)


def _brought_head(trained: XLoraCheckpoint | None, adapters: Sequence[LoraAdapter], expert: str | None) -> Head | None:
    """Return the head of checkpoint or adapters, or None for the base's own; see `head` of :func:`load_xlora`."""
    if trained is not None and trained.head and expert is None:
        return Head(f"checkpoint {trained.directory}", trained.extras.get("task_type"), trained.head)
    return choose_head(adapters, expert)


# PEFT's task type for each kind of head; it has none for image classification.
TASK_TYPES = {"lm": "CAUSAL_LM", "token": "TOKEN_CLS", "last": "SEQ_CLS", "pooled": "SEQ_CLS"}


def experts_of(trained: XLoraCheckpoint, adapters: Mapping[str, str | Path] | None = None) -> Mapping[str, str | Path]:
    """Return the experts of a checkpoint, or ``adapters`` in place of them.

    Raises:
        FormatError: an expert of the checkpoint is not at its path.
        ValueError: the number of ``adapters`` differs from the checkpoint's.
    """
    if adapters is None:
        lost = [
            f"{name} at {trained.config.adapters.get(name)!r}"
            for name, path in trained.adapters.items()
            if path is None
        ]
        if lost:
            raise FormatError(
                f"{trained.directory}: experts are not where the checkpoint says: {', '.join(lost)}. Pass "
                f"adapters={{name: directory or hub id}}, in the same order."
            )
        return {name: path for name, path in trained.adapters.items() if path is not None}
    if len(adapters) != len(trained.adapters):
        raise ValueError(
            f"adapters: the checkpoint has {len(trained.adapters)} experts ({', '.join(trained.adapters)}), got "
            f"{len(adapters)} ({', '.join(adapters)}); give one for each, in that order"
        )
    return adapters


def _fitted(config: XLoraConfig | None, adapters: Mapping[str, str | Path], base: BaseModel) -> XLoraConfig:
    """Return the config with these experts, checked against the base."""
    width = base.module.config.hidden_size
    paths = {name: str(path) for name, path in adapters.items()}
    if config is None:
        return XLoraConfig(hidden_size=width, adapters=paths)
    if config.hidden_size != width:
        raise ValueError(
            f"config.hidden_size is {config.hidden_size}, but the base model's hidden size is {width}: "
            f"XLoraConfig(hidden_size={width}, ...)"
        )
    return dataclasses.replace(config, adapters=paths)


_MAX_DEPTH = 1000


def _new_classifier(model: XLoraModel, seed: int) -> dict[str, Any]:
    """Return the parameters of a new classifier.

    Raises:
        ValueError: it would be deeper than can be compiled, or larger than this machine's memory.
    """
    config = model.config
    if config.xlora_depth > _MAX_DEPTH:
        raise ValueError(f"xlora_depth: expected at most {_MAX_DEPTH}, got {config.xlora_depth}")
    if config.xlora_depth > 1:
        last = len(model.expert_names) * (len(model.layers) if config.layerwise_scalings else 1)
        count = config.xlora_size * (config.hidden_size + last + (config.xlora_depth - 2) * config.xlora_size)
        check_fits(
            count * jnp.dtype(model.module.dtype).itemsize,
            f"a classifier of xlora_depth {config.xlora_depth} and xlora_size {config.xlora_size}",
            "give smaller ones",
        )
    hidden = jax.ShapeDtypeStruct((1, 1, model.config.hidden_size), model.module.dtype)
    init = jax.jit(model.xlora.classifier.init)
    params: dict[str, Any] = init(jax.random.key(seed), jnp.zeros(hidden.shape, hidden.dtype))["params"]
    return params


def _trained_classifier(
    trained: XLoraCheckpoint, template: dict[str, Any], config: XLoraConfig, layers: AdaptedLayers
) -> dict[str, Any]:
    """Return the checkpoint's classifier, checked against the shapes that config and experts require."""
    if trained.layer_names is not None and tuple(trained.layer_names) != layers.names:
        differing = next(
            pair for pair in zip_longest(trained.layer_names, layers.names, fillvalue="none") if pair[0] != pair[1]
        )
        raise FormatError(
            f"{trained.directory}: the classifier was trained for {len(trained.layer_names)} adapted layers, these "
            f"experts adapt {len(layers)}; the first difference is {differing[0]} there, {differing[1]} here. Pass the "
            f"experts that it was trained with."
        )
    params: dict[str, Any] = {}
    for i, (weight, bias) in enumerate(trained.classifier):
        want = template[f"dense_{i}"]
        assert bias is not None, "read_xlora has refused that"
        if weight.shape != want["kernel"].shape:
            last = i == config.xlora_depth - 1
            reason = f"{len(config.adapters)} experts, {len(layers)} adapted layers, " if last else ""
            raise FormatError(
                f"{trained.directory}: layer {i} of the classifier is {weight.shape[0]} -> {weight.shape[1]}, expected "
                f"{want['kernel'].shape[0]} -> {want['kernel'].shape[1]} ({reason}layerwise_scalings "
                f"{config.layerwise_scalings}); are these the experts that it was trained with?"
            )
        dtype = want["kernel"].dtype
        params[f"dense_{i}"] = {"kernel": jnp.asarray(weight, dtype), "bias": jnp.asarray(bias, dtype)}
    return params
