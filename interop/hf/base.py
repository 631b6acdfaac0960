"""HF base models in Flax: from config.json to a module, and from safetensors to parameters, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
import operator
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike, NDArray

from interop.hf.config import read_config
from interop.hf.families.registry import FAMILIES, classifying, decoder_config, torchax_hint
from interop.hf.families.table import LEAVES, Family, abstract_params
from interop.hf.head import Head
from interop.hf.quantized.grid import QuantizedTensor, common_grid, fill
from interop.hf.quantized.readers import open_weights
from interop.hf.torch_base import TorchFamily, declare_torch, head_tensors_of, read_torch_params, torch_shapes
from interop.storage.atomic import replacing
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json, write_json
from interop.storage.hub import resolve
from interop.storage.tensors import LazyTensor, open_tensors, require_finite, write_safetensors
from xlora_jax import BaseModel
from xlora_jax.layers import quantized
from xlora_jax.layers.quantized import QuantizedKernel
from xlora_jax.models import Transformer
from xlora_jax.trees import Path as TreePath
from xlora_jax.trees import flatten, unflatten

__all__ = [
    "BaseOrigin",
    "Placer",
    "UnreadLeaf",
    "blank_head",
    "head_tensors",
    "leave_in_memory",
    "load_base",
    "open_base",
    "put_on_default_device",
    "read_params",
    "save_base",
]

# From a path and NumPy arrays (one, or those of a quantized kernel) to JAX arrays.
Placer = Callable[[TreePath, Any], Any]

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_MAX_SHARD_BYTES = 5 * 10**9  # as in transformers
_COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
_OWNED = ("config.json", "model*.safetensors", "model.safetensors.index.json", *_COMPANIONS)


@dataclass(frozen=True)
class BaseOrigin:
    """Record of the files that a base model came from.

    Attributes:
        name_or_path: directory or hub id as the user gave it.
        directory: directory of the model's files.
        family: a :class:`~interop.hf.families.table.Family`, or a :class:`~interop.hf.torch_base.TorchFamily`.
        config: model's config as transformers reads it.
        head: classification head that replaces the base's own, or None.
        quantized: grid that the blocks' kernels were rounded to by this library, such as ``nf4``, or the name of the
            method that quantized the files, such as ``bitsandbytes``; None for a base that is not quantized.
    """

    name_or_path: str
    directory: Path
    family: Any
    config: Mapping[str, Any]
    head: Head | None = None
    quantized: str | None = None


def load_base(
    base: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    scan_layers: bool = True,
    place: Placer | None = None,
    head: Head | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    **hub_options: Any,
) -> BaseModel:
    """Load an HF model: a causal language model or a classification model.

    Args:
        base: directory or hub id, with config.json and safetensors (single or sharded) or a ``.bin`` file.
        dtype: dtype of parameters and computation: float32, bfloat16 or float16. None means the dtype in config.json,
            or float32.
        scan_layers: whether to stack the blocks (fast to compile, any depth), or to keep one set of arrays per block
            (fast to decode).
        place: function that puts each parameter on devices as soon as it is read, from its path and its NumPy array,
            such as :func:`xlora_jax.sharding.placer` of a mesh. None puts all parameters on the default device.
        head: classification head (see :func:`interop.peft.heads.choose_head`) that replaces the head in the base's
            files; None keeps the base's own.
        backend: ``flax``, for the families of this library; ``torchax``, for PyTorch code of transformers as a JAX
            function (extra ``torchax``); or ``auto``: ``flax`` if the family is ported, else ``torchax``.
        quantize: ``int8`` (a scale per output), ``int4`` or ``nf4`` (a scale per 64 inputs), to store the kernels of
            the blocks in that many bits; embeddings, heads, norms and biases stay as they are. Tensors are quantized
            one by one as they are read. None keeps the kernels in ``dtype``.
        **hub_options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``.

    Returns:
        The model; ``model(input_ids, attention_mask).logits`` are its logits.

    Raises:
        FormatError: a file is broken, a tensor is missing, unexpected or of the wrong shape, or a config field has a
            value that is not implemented.
        ValueError: ``dtype`` or ``quantize`` has another value.
    """
    if quantize not in (None, *quantized.KINDS):
        raise ValueError(f"quantize: expected None or one of {', '.join(quantized.KINDS)}, got {quantize!r}")
    directory = resolve(base, **hub_options)
    if _runs_by_torchax(directory, backend):
        if quantize is not None:
            raise ValueError(f"quantize: {base} runs as PyTorch code through torchax, which has float kernels only")
        foreign, family, config, model = declare_torch(directory, dtype, head, weights=True)
        params = read_torch_params(foreign, model, place or put_on_default_device)
        return BaseModel(foreign, params, BaseOrigin(str(base), directory, family, config, head))
    module, origin = _declare(base, directory, dtype, scan_layers, head)
    stored, method = open_weights(directory)
    if method is not None and quantize is not None:
        raise ValueError(
            f"quantize: {base} is quantized already, by {method}: leave out quantize={quantize!r}, or give the model "
            f"that it was made from"
        )
    origin = dataclasses.replace(origin, quantized=method or quantize)
    module, tensors = _as_stored(module, origin, stored)
    place = place or put_on_default_device
    params = read_params(module, origin, tensors, np.dtype(module.param_dtype), place)
    return BaseModel(module, params, origin)


def _runs_by_torchax(directory: Path, backend: str) -> bool:
    """Return whether a model runs as PyTorch code.

    Raises:
        ValueError: the backend is unknown.
        FormatError: the model's family is not ported, and torchax is not installed or not allowed.
    """
    if backend not in ("auto", "flax", "torchax"):
        raise ValueError(f"backend: expected 'auto', 'flax' or 'torchax', got {backend!r}")
    path = file_in(directory, "config.json")
    if path is None or backend == "flax":
        return False
    model_type = read_json(path).get("model_type")
    if backend == "auto":
        if not isinstance(model_type, str) or model_type in FAMILIES or torchax_hint():
            return False
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            return False
        warnings.warn(
            f"{path}: {model_type!r} is not ported to Flax, so it runs as PyTorch code through torchax.",
            UserWarning,
            stacklevel=3,
        )
    elif hint := torchax_hint():
        raise FormatError(f"{path}: backend 'torchax' is not installed.{hint}")
    return True


def _declare(
    base: str | Path, directory: Path, dtype: jax.typing.DTypeLike | None, scan_layers: bool, head: Head | None
) -> tuple[Transformer, BaseOrigin]:
    """Return the module that config.json describes, and the record of its files."""
    config_file = file_in(directory, "config.json")
    if config_file is None:
        raise FormatError(f"{directory}: no config.json; expected the directory of an HF base model.")
    family, config = read_config(config_file)
    if dtype is None:
        # Of a multimodal model the text side may have it.
        dtype = config.get("dtype") or (config.get("text_config") or {}).get("dtype") or "float32"
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    if head is not None:
        shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
        config = classifying(family, config, head.task_type, shapes, head.owner)
    declared, passed_over = decoder_config(family, config, str(config_file))
    if passed_over:
        warnings.warn(
            f"{config_file}: transformers ignores these fields of a {family.model_type}, and so does this library: "
            f"{', '.join(map(brief, passed_over))}.",
            UserWarning,
            stacklevel=3,
        )
    module = family.module(declared, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers)
    return module, BaseOrigin(str(base), directory, family, config, head)


@dataclass(frozen=True)
class UnreadLeaf:
    """A parameter in a file. Its shape and dtype are known; its values are read when NumPy needs them.

    Attributes:
        shape: shape in the module.
        dtype: dtype in the module.
        read: function that reads the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the values, for `numpy.asarray`."""
        return self.read().astype(self.dtype if dtype is None else dtype, copy=False)


def open_base(
    base: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    head: Head | None = None,
    backend: str = "auto",
    **hub_options: Any,
) -> BaseModel:
    """Open an HF model without reading its weights, to check adapters and checkpoints against it.

    Of a hub id only config.json is fetched. Names and shapes of tensors are checked if the weights are on disk.

    Args:
        base: directory or hub id, as in :func:`load_base`.
        dtype: dtype, as in :func:`load_base`.
        head: classification head, as in :func:`load_base`.
        backend: backend, as in :func:`load_base`.
        **hub_options: options for hub ids, as in :func:`load_base`.

    Returns:
        A model whose parameters are instances of :class:`UnreadLeaf`.

    Raises:
        FormatError: :func:`load_base` would refuse the model, for other reasons than the values of its weights.
    """
    directory = resolve(base, files=("config.json",), **hub_options)
    if _runs_by_torchax(directory, backend):
        foreign, family, config, model = declare_torch(directory, dtype, head, weights=False)
        shapes = torch_shapes(foreign, model)
        torch_names = {leaf.path: (leaf.name, leaf.transposed) for leaf in foreign.leaves}
        unread_leaves = {
            path: UnreadLeaf(leaf.shape, leaf.dtype, partial(_stored, directory, *torch_names[path]))
            for path, leaf in shapes.items()
        }
        return BaseModel(foreign, unflatten(unread_leaves), BaseOrigin(str(base), directory, family, config, head))
    module, origin = _declare(base, directory, dtype, True, head)
    is_local = Path(base).expanduser().is_dir()

    def absent() -> NDArray[Any]:
        raise FileNotFoundError(f"{base}: its weights are needed for this, and not downloaded: `hf download {base}`.")

    if not is_local and not any(file for ending in _WEIGHTS for file in directory.glob(ending)):
        shapes = flatten(abstract_params(module))
        unread = {path: UnreadLeaf(leaf.shape, np.dtype(leaf.dtype), absent) for path, leaf in shapes.items()}
        return BaseModel(module, unflatten(unread), origin)
    stored, method = open_weights(directory)
    origin = dataclasses.replace(origin, quantized=method)
    module, tensors = _as_stored(module, origin, stored)
    wanted = _checked(module, origin, tensors)
    dtype = np.dtype(module.param_dtype)
    unread = {
        path: UnreadLeaf(shape, dtype, partial(_fill, shape, sources, tensors, dtype))
        for path, (shape, sources) in wanted.items()
    }
    return BaseModel(module, unflatten(unread), origin)


def _stored(directory: Path, name: str, transposed: bool) -> NDArray[Any]:
    """Read one tensor of a model that runs by torchax."""
    value = open_tensors(directory)[name].read()
    return value.T if transposed else value


def blank_head(base: str | Path, **hub_options: Any) -> Head:
    """Return a head of zeros for an encoder without a classification head: two classes of sequences.

    Args:
        base: directory or hub id, as in :func:`load_base`.
        **hub_options: options for hub ids, as in :func:`load_base`.
    """
    family, config = read_config(resolve(base, files=("config.json",), **hub_options) / "config.json")
    config = {**config, "architectures": [f"{family.stem}ForSequenceClassification"], "id2label": {0: "0", 1: "1"}}
    declared, _ = decoder_config(family, config, str(base))
    tensors = {
        source.tensor: np.zeros(source.in_file(shape[len(source.member) :]), np.float32)
        for shape, sources in _sources(family.module(declared), family).values()
        for source in sources
        if family.is_head(source.tensor)
    }
    return Head(str(base), "SEQ_CLS", tensors)


def put_on_default_device(path: TreePath, leaf: Any) -> Any:
    """Put a parameter on the default device."""
    # Of the aligned arrays of a quantized kernel, device_put makes no copy on CPUs.
    return jax.tree.map(jax.device_put, leaf) if isinstance(leaf, QuantizedKernel) else jnp.asarray(leaf)


def leave_in_memory(path: TreePath, leaf: Any) -> Any:
    """Return a parameter as it is, for a model that is only checked or written, and never run."""
    return leaf


def read_params(
    module: Transformer,
    origin: BaseOrigin,
    tensors: Mapping[str, LazyTensor],
    dtype: np.dtype[Any],
    place: Placer,
) -> dict[str, Any]:
    """Read the parameters of ``module``, one leaf at a time, with at most one more stacked leaf in memory."""
    wanted = _checked(module, origin, tensors)
    params: dict[TreePath, Any] = {}
    in_float: list[str] = []
    # The largest leaf comes first: its reading takes the most extra memory, and the model takes the least then.
    for path, (shape, sources) in sorted(wanted.items(), key=lambda item: -math.prod(item[1][0])):
        leaf: Any = None
        if origin.quantized is not None and _is_quantizable(path, module):
            leaf = _quantized(shape, sources, tensors, origin.quantized)
            in_float += ["/".join(path)] if leaf is None else []
        elif any(isinstance(tensors[source.tensor], QuantizedTensor) for source in sources):
            in_float.append("/".join(path))
        if leaf is None:
            leaf = _fill(shape, sources, tensors, dtype)
        # Placing is asynchronous: without waiting, the buffers of several leaves would be in memory together.
        params[path] = jax.block_until_ready(place(("base", *path), leaf))
        del leaf
    if in_float:
        warnings.warn(
            f"{origin.directory}: of this base, quantized as {origin.quantized}, {listed(in_float)} are held in "
            f"{dtype}: embeddings and heads always are, and kernels whose values fit no grid in 8 or 4 bits here.",
            UserWarning,
            stacklevel=3,
        )
    return unflatten(params)


def _is_quantizable(path: TreePath, module: Transformer) -> bool:
    """Return whether a leaf is the kernel of a projection in a block. A router decides, and is small."""
    in_block = path[0].startswith("layers_") or path[0] in {group.name for group in module.config.groups}
    return in_block and path[-1] == "kernel" and path[-2] != "router"


def _quantized(
    shape: tuple[int, ...], sources: Sequence[_Source], tensors: Mapping[str, LazyTensor], quantization: str
) -> QuantizedKernel | None:
    """Read one kernel, tensor by tensor: quantized as in its files, or here.

    Returns:
        The kernel in NumPy arrays, or None if no grid fits it.
    """
    if quantization not in quantized.KINDS:
        grid = common_grid([tensors[source.tensor] for source in sources])
        if grid is None or sources[0].order != (1, 0):
            return None
        kernel = quantized.empty(shape, grid.kind, grid.group, offsets=grid.offsets)
        for source in sources:
            stored = tensors[source.tensor]
            assert isinstance(stored, QuantizedTensor)
            fill(stored, grid, jax.tree.map(operator.itemgetter(source.member), kernel))
        return kernel
    group = quantized.group_size(shape[-2], quantization)
    if group is None:
        return None
    kernel = quantized.empty(shape, quantization, group)
    for source in sources:
        tensor = tensors[source.tensor]
        value = require_finite(tensor.read(), tensor.name, tensor.file)
        own = jax.tree.map(operator.itemgetter(source.member), kernel)
        quantized.quantize(np.transpose(value, source.order) if source.order else value, quantization, own)
        del value  # else it would stay in memory while the next one is read
    return kernel


def _fill(
    shape: tuple[int, ...], sources: Sequence[_Source], tensors: Mapping[str, LazyTensor], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Read one leaf."""
    buffer = np.empty(shape, dtype)
    for source in sources:
        tensor = tensors[source.tensor]
        value = require_finite(tensor.read(), tensor.name, tensor.file)
        buffer[source.member] = np.transpose(value, source.order) if source.order else value
    return buffer


def save_base(model: BaseModel, directory: str | Path, *, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """Write a base model as HF files, which transformers and :func:`load_base` read.

    Parameters are written in their own dtype, so an unchanged model that was loaded in its stored dtype is restored bit
    for bit. The config is the loaded one, with that dtype. The tokenizer's files are copied, and
    the vision side of a multimodal model.

    Args:
        model: model from :func:`load_base`.
        directory: directory to create, or to replace as a whole.
        max_shard_bytes: maximum size of one file; larger models are split over several files, with an index.

    Raises:
        FileExistsError: the directory holds files that this function does not write.
        FormatError: the model is quantized.
    """
    origin: BaseOrigin = model.origin
    if isinstance(origin.family, TorchFamily):
        raise FormatError(
            f"{origin.name_or_path}: a base that runs by torchax is not written; it is unchanged: copy its directory."
        )
    if origin.quantized is not None:
        raise FormatError(
            f"save_base: this base is quantized ({origin.quantized}), and its kernels are not written in this form. "
            f"Copy {origin.name_or_path} itself, or load it without quantize=. An X-LoRA model is saved by save_xlora, "
            f"which writes no base."
        )
    with replacing(directory, owned=_OWNED) as folder:
        config = read_json(origin.directory / "config.json")
        config.pop("torch_dtype", None)
        if model.module.config.head == "lm":
            config["tie_word_embeddings"] = model.module.config.tie_word_embeddings
        if origin.head is not None:
            config |= {name: origin.config[name] for name in ("architectures", "id2label", "label2id")}
        write_json(folder / "config.json", {**config, "dtype": jnp.dtype(model.module.param_dtype).name})
        for name in _COMPANIONS:
            if (companion := file_in(origin.directory, name)) is not None:
                shutil.copyfile(companion, folder / name)
        unread: dict[str, LazyTensor] = {}
        if origin.family.unread:
            stored = open_tensors(origin.directory)
            unread = {name: tensor for name, tensor in stored.items() if origin.family.is_unread(name)}
        _write_shards(folder, {**unread, **_tensors(model)}, max_shard_bytes)


def _tensors(model: BaseModel) -> dict[str, LazyTensor]:
    """Return the model's tensors under their names in files; each is copied from the device when it is read."""
    origin: BaseOrigin = model.origin
    leaves = flatten(model.params)
    tensors: dict[str, LazyTensor] = {}

    def taken(leaf: jax.Array, source: _Source) -> NDArray[Any]:
        value = np.asarray(leaf[source.member] if source.member else leaf)
        return np.transpose(value, np.argsort(source.order)) if source.order else value

    for path, (shape, sources) in _sources(cast(Transformer, model.module), origin.family).items():
        # A quantized kernel has no form in files; `save_base` refuses it, and a head is never quantized.
        for source in () if isinstance(leaves[path], QuantizedKernel) else sources:
            own = shape[len(source.member) :]
            tensors[source.tensor] = LazyTensor(
                source.tensor,
                origin.directory,
                np.dtype(leaves[path].dtype),
                source.in_file(own),
                partial(taken, leaves[path], source),
            )
    return tensors


def head_tensors(model: BaseModel) -> dict[str, NDArray[Any]]:
    """Return the head that replaced the base's own, by tensor names in files; empty if the base kept its own head.

    An unchanged tensor is returned as it was loaded, in its stored dtype.
    """
    origin: BaseOrigin = model.origin
    if origin.head is None:
        return {}
    if isinstance(origin.family, TorchFamily):
        return head_tensors_of(cast(Any, model.module), model.params, origin.head)
    tensors = _tensors(model)
    found: dict[str, NDArray[Any]] = {}
    for name, brought in origin.head.tensors.items():
        own = tensors[name].read()
        found[name] = brought if np.array_equal(brought.astype(own.dtype), own) else own
    return found


def _write_shards(directory: Path, tensors: Mapping[str, LazyTensor], max_bytes: int) -> None:
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if filled and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
        total += size
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(directory / file, shard)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


@dataclass(frozen=True)
class _Source:
    """The torch tensor that fills a leaf, or one member of a stacked leaf."""

    tensor: str
    member: tuple[int, ...]
    order: tuple[int, ...]

    def in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in files of a tensor with ``shape`` here."""
        return tuple(shape[axis] for axis in np.argsort(self.order)) if self.order else shape


def _sources(module: Transformer, family: Family) -> dict[TreePath, tuple[tuple[int, ...], list[_Source]]]:
    """Return, for each leaf of the parameters, its shape and the tensors that fill it."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    wanted: dict[TreePath, tuple[tuple[int, ...], list[_Source]]] = {}
    for placed in family.modules(module):
        for leaf, (suffix, order) in LEAVES[placed.kind].items():
            path = (*placed.path, leaf)
            if path in shapes:
                source = _Source(f"{family.in_file(placed.hf)}.{suffix}", placed.member, order)
                wanted.setdefault(path, (shapes[path], []))[1].append(source)
    unfilled = shapes.keys() - wanted.keys()
    assert not unfilled, f"no row of the family's table fills {unfilled}"
    return wanted


def _as_stored(
    module: Transformer, origin: BaseOrigin, tensors: Mapping[str, LazyTensor]
) -> tuple[Transformer, Mapping[str, LazyTensor]]:
    """Return the module that fits the tensors, and its tensors under their full names.

    As in transformers: if the file stores both a tied table and a head, the head is used if it differs from the table;
    a tied table may be stored as the head only; heads of other tasks are not used.
    """
    family, where = origin.family, origin.directory
    if unread := [name for name in tensors if family.is_unread(name)]:
        parts = dict.fromkeys(name.split(".")[name.startswith("model.")] for name in unread)
        warnings.warn(
            f"{where}: {len(unread)} tensors of the vision side ({', '.join(parts)}) are passed over: of a "
            f"{family.model_type} only the text side is built.",
            UserWarning,
            stacklevel=3,
        )
    tensors = {family.as_written(name): tensor for name, tensor in tensors.items() if not family.is_unread(name)}
    if not any(name.startswith(family.prefix) for name in tensors):
        # Files saved from the class without an output head, such as the hub's gpt2, lack the first part of the names.
        head = f"{family.in_file('lm_head')}."
        tensors = {name if name.startswith(head) else family.prefix + name: t for name, t in tensors.items()}
    for old, new in family.formerly:
        tensors = {f"{name.removesuffix(old)}{new}" if name.endswith(old) else name: t for name, t in tensors.items()}
    head, table = (f"{family.in_file(name)}.weight" for name in ("lm_head", family.before[0].hf))
    if module.config.tie_word_embeddings and head in tensors:
        if table not in tensors:
            tensors = {**tensors, table: tensors[head]}
        elif tensors[head].shape != tensors[table].shape or not np.array_equal(
            tensors[head].read(), tensors[table].read()
        ):
            warnings.warn(
                f"{tensors[head].file}: {head!r} differs from {table!r}, although config.json ties them; as in "
                f"transformers, both are used. Set tie_word_embeddings to false in config.json.",
                UserWarning,
                stacklevel=3,
            )
            module = module.clone(config=dataclasses.replace(module.config, tie_word_embeddings=False))
    needed = {source.tensor for _, sources in _sources(module, family).values() for source in sources}
    unused = [name for name in tensors if name not in needed and family.is_head(name)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if origin.head is not None:
        tensors |= {name: _in_memory(name, array, origin) for name, array in origin.head.tensors.items()}
    elif others := [name for name in unused if not (module.config.tie_word_embeddings and name == head)]:
        warnings.warn(
            f"{where}: {listed(others)} belong to no part of this {_class_of(module, origin)} and are not used, as in "
            f"transformers.",
            UserWarning,
            stacklevel=3,
        )
    return module, tensors


def _class_of(module: Transformer, origin: BaseOrigin) -> str:
    """Return the name of transformers' class."""
    name: str = origin.family.causal_lm if module.config.head == "lm" else origin.config["architectures"][0]
    return name


def _in_memory(name: str, array: NDArray[Any], origin: BaseOrigin) -> LazyTensor:
    """Return a head's tensor in the form of a tensor from the base's files."""
    return LazyTensor(name, origin.directory, array.dtype, array.shape, lambda: array)


def _checked(
    module: Transformer, origin: BaseOrigin, tensors: Mapping[str, LazyTensor]
) -> dict[TreePath, tuple[tuple[int, ...], list[_Source]]]:
    """Return the tensors that fill each leaf of the parameters, after a check of all tensors, before any is read."""
    family, where, kind = origin.family, origin.directory, _class_of(module, origin)
    wanted = _sources(module, family)
    names = {source.tensor for _, sources in wanted.values() for source in sources}
    missing = sorted(names - tensors.keys())
    unexpected = sorted(name for name in tensors.keys() - names if not name.endswith(family.ignored or ("\0",)))
    if missing or unexpected:
        raise FormatError(
            f"{where}: the tensors are not those of a {kind} with this config. "
            f"Missing: {_list(missing)}. Unexpected: {_list(unexpected)}. Expected a checkpoint saved with "
            f"{kind}.save_pretrained."
        )
    for shape, sources in wanted.values():
        for source in sources:
            expected = shape[len(source.member) :]
            expected = source.in_file(expected)
            tensor = tensors[source.tensor]
            if tensor.shape != expected:
                raise FormatError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected shape {list(expected)} from config.json, got "
                    f"{list(tensor.shape)}."
                )
            if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
                raise FormatError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected a floating-point dtype of at least 16 bits, got "
                    f"{tensor.dtype}; quantized checkpoints are not supported, convert it to bfloat16."
                )
    return wanted


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "none"
