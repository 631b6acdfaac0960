"""User-facing models: module, parameters and config in one object, with the method names of PEFT and transformers."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.config import XLoraConfig
from xlora_jax.generation.generate import GenerationConfig, GenerationStats, generate, stream
from xlora_jax.generation.given import Given, read_given
from xlora_jax.generation.state import Ints
from xlora_jax.layers import mixing
from xlora_jax.layers.adapted import AdaptedLayers
from xlora_jax.models import BaseModule, Decoder, DecoderOutput
from xlora_jax.passes import Params, XLora, XLoraOutput, classify, forward, scaling_pass
from xlora_jax.routing.recorder import ScalingsLog
from xlora_jax.routing.text import Part, RoutedText, pieces_of
from xlora_jax.token_ids import check_token_ids, warn_beyond_context
from xlora_jax.trees import Path, flatten, unflatten

__all__ = ["BaseModel", "XLoraModel"]

_forward = partial(jax.jit, static_argnums=0)(forward)


# Whether the experts are on, by id of a model within a block of `disable_adapter`: each thread has its own.
_SWITCHES: ContextVar[Mapping[int, bool]] = ContextVar("switches", default=types.MappingProxyType({}))


@partial(jax.jit, static_argnums=0)
def _base_forward(module: BaseModule, params: Params, **inputs: Any) -> DecoderOutput:
    return cast(DecoderOutput, module.apply({"params": params}, **inputs))


@partial(jax.jit, static_argnums=0)
def _gates(xlora: XLora, params: Params, **inputs: Any) -> jax.Array:
    hidden, _ = scaling_pass(xlora, params, **inputs)
    gates = mixing.layer_gates(
        classify(xlora, params, hidden),
        top_k=xlora.config.top_k_lora,
        softmax_selected=xlora.config.enable_softmax_topk,
    )
    return gates.astype(jnp.float32)


@dataclass(frozen=True)
class BaseModel:
    """A base model without experts.

    Attributes:
        module: Flax module.
        params: parameters of the module.
        origin: record of the files that the model came from, which saving needs; None if it came from no files.
    """

    module: BaseModule
    params: Params
    origin: Any = None
    _stats: deque[GenerationStats] = field(default_factory=lambda: deque(maxlen=1), repr=False, compare=False)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **more: Any
    ) -> DecoderOutput:
        """Return logits ``[B, T, V]`` and hidden states ``[B, T, D]``; same arguments as :class:`XLoraModel`."""
        inputs = _inputs(self.module, input_ids, attention_mask, inputs_embeds, more)
        return cast(DecoderOutput, _base_forward(self.module, self.params, **inputs))

    def generate(
        self, input_ids: Any, attention_mask: Any = None, *, config: GenerationConfig | None = None, **options: Any
    ) -> jax.Array:
        """Generate; same arguments and result as :meth:`XLoraModel.generate`."""
        config = dataclasses.replace(config or GenerationConfig(), **options)
        out = generate(self._alone, {"base": self.params}, input_ids, attention_mask, config, experts=False)
        self._stats.append(out.stats)
        return jnp.asarray(out.tokens)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        steps: int = 4,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[list[Ints]]:
        """Generate piece by piece; same arguments and pieces as :meth:`XLoraModel.stream`."""
        config = dataclasses.replace(config or GenerationConfig(), **options)
        params = {"base": self.params}
        stats = yield from stream(self._alone, params, input_ids, attention_mask, config, experts=False, steps=steps)
        self._stats.append(stats)

    def unstacked(self, *, donate: bool = False) -> BaseModel:
        """Return this model with one set of arrays per block; see :meth:`XLoraModel.unstacked`."""
        if not isinstance(self.module, Decoder) or not self.module.scan_layers:
            return self
        params = _unstack(self.params, _members(self.module), donate)
        return BaseModel(self.module.clone(scan_layers=False), params, self.origin)

    def get_generation_stats(self) -> GenerationStats | None:
        """Return the cost of the last generation, or None if there was none."""
        return self._stats[-1] if self._stats else None

    @property
    def _alone(self) -> XLora:
        """Return a static description without adapted layers."""
        config = XLoraConfig(hidden_size=self.module.config.hidden_size, adapters={})
        return XLora(self.module, AdaptedLayers((), ()), 1, config)


@dataclass
class XLoraModel:
    """An X-LoRA model.

    The setters give the object a new frozen ``config``. Parameters are never changed in place. All functions below
    this class are pure: those of :mod:`xlora_jax.passes`, :mod:`xlora_jax.generation.generate` and
    :mod:`xlora_jax.training.step` take ``model.xlora`` and ``model.params``.

    An object can be called from several threads at once. Settings, the log of scalings and the results of
    :meth:`get_latest_scalings` and :meth:`get_generation_stats` belong to the object, so threads that want their own
    take a copy each, ``model.replace()``, which shares the parameters. :meth:`disable_adapter` acts in its own thread
    only.

    Attributes:
        module: Flax module of the base model.
        params: ``{"base": ..., "experts": ..., "classifier": ...}``.
        config: X-LoRA settings.
        layers: adapted layers.
        expert_names: names of the experts in the order of the classifier's outputs.
        origin: record of the files that base and experts came from, which saving needs; None if they came from no
            files.
        router: source of the gates, ``classifier`` or ``arrow``; see :class:`~xlora_jax.passes.XLora`.
    """

    module: BaseModule
    params: Params
    config: XLoraConfig
    layers: AdaptedLayers
    expert_names: tuple[str, ...]
    origin: Any = None
    router: str = "classifier"
    _enabled: bool = field(default=True, repr=False)
    _logging: bool = field(default=False, repr=False)
    _log: ScalingsLog = field(default_factory=ScalingsLog, repr=False)
    _latest: jax.Array | None = field(default=None, repr=False)
    _stats: GenerationStats | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the settings against the experts."""
        self.config.validate_experts(len(self.expert_names))

    @property
    def xlora(self) -> XLora:
        """Static description, the first argument of the pure functions."""
        return XLora(self.module, self.layers, len(self.expert_names), self.config, router=self.router)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Module paths of the adapted layers, in the order of the layers' axis of the scalings."""
        return self.layers.names

    def replace(self, *, params: Params | None = None, config: XLoraConfig | None = None) -> XLoraModel:
        """Return a copy with other parameters or settings, and an empty log."""
        return dataclasses.replace(
            self,
            params=self.params if params is None else params,
            config=self.config if config is None else config,
            _log=self._log.empty(),
            _latest=None,
            _stats=None,
        )

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        *,
        scalings: Any = None,
        **more: Any,
    ) -> XLoraOutput:
        """Run both passes.

        Args:
            input_ids: int ``[B, T]``, NumPy or JAX; or ``inputs_embeds``.
            attention_mask: ``[B, T]``, zero at padding.
            inputs_embeds: float ``[B, T, D]``.
            scalings: array to use in place of the classifier's scalings, broadcast to ``[B, T, L, N]``: ``[1, 0, 0]``
                is the first of three experts alone. Top-k, the softmax over the selected gates and the global weight
                still apply.
            **more: other inputs of the base model, such as ``token_type_ids``, or ``pixel_values`` in place of tokens.

        Returns:
            Logits ``[B, T, V]``, hidden states ``[B, T, D]`` and scalings ``[B, T, L, N]``.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` is given, shapes do not fit, or a token
                id is outside the base's embedding.
        """
        inputs = _inputs(self.module, input_ids, attention_mask, inputs_embeds, more)
        if not self._experts_on:
            base = _base_forward(self.module, self.params["base"], **inputs)
            return XLoraOutput(base.logits, base.hidden_states, None)
        if scalings is not None:
            inputs["scalings"] = jnp.asarray(scalings)
        out = cast(XLoraOutput, _forward(self.xlora, self.params, **inputs))
        if scalings is None:
            self._record(out.scalings, attention_mask)
        return out

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        scalings: Any = None,
        experts: Any = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> jax.Array:
        """Generate with a cache for each pass, on the device.

        Args:
            input_ids: int ``[B, T]``, NumPy or JAX; prompts of different length are padded, usually on the left.
            attention_mask: ``[B, T]``, zero at padding; None if there is no padding.
            scalings: constant scalings in place of the classifier's, broadcast to ``[B, 1, L, N]``; or a list with one
                entry per row: an array that broadcasts to ``[L, N]``, or None for a row that uses the classifier.
                Top-k, the softmax over the selected gates and the global weight still apply. If every row has its own
                scalings, a token takes one pass.
            experts: the same by name: ``{"math": 1.0}`` for all rows, or a list with one mapping or None per row.
                Experts without an entry get 0.
            config: generation settings; default :class:`~xlora_jax.generation.generate.GenerationConfig`.
            **options: fields of ``config`` to change: ``max_new_tokens=48, do_sample=True, top_p=0.9, seed=1``.

        Returns:
            int32 ``[B * num_return_sequences, T + max_new_tokens]``: the prompts as given, the new tokens, padding.

        Raises:
            ValueError: shapes do not fit, a prompt has no tokens, an expert does not exist, or a setting is invalid.
            TypeError: an option does not exist.
        """
        config = dataclasses.replace(config or GenerationConfig(), **options)
        given = self._given(input_ids, scalings, experts)
        out = generate(
            self.xlora,
            self.params,
            input_ids,
            attention_mask,
            config,
            experts=self._experts_on,
            record=self._logging,
            given=given,
        )
        self._stats = out.stats
        if out.scalings is not None:
            self._record(self.layers.expand(out.scalings), out.mask)
        return jnp.asarray(out.tokens)

    def unstacked(self, *, donate: bool = False) -> XLoraModel:
        """Return this model with one set of arrays per block (``scan_layers=False``), which decodes faster.

        Under ``nn.scan`` every block's weights are sliced out of a stack, which copies them for every token. Separate
        arrays are read in place. Compilation takes longer, and its time grows with depth.

        Args:
            donate: whether to delete each stacked array once it is split. Then memory holds at most one stacked array
                beside the new model. This model, and all models that share its parameters, become unusable.
        """
        if not isinstance(self.module, Decoder) or not self.module.scan_layers:
            return self
        groups = _members(self.module)
        base, experts = (_unstack(self.params[part], groups, donate) for part in ("base", "experts"))
        return dataclasses.replace(
            self.replace(params={**self.params, "base": base, "experts": experts}),
            module=self.module.clone(scan_layers=False),
            layers=self.layers.unstacked(groups),
        )

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        steps: int = 4,
        scalings: Any = None,
        experts: Any = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[list[Ints]]:
        """Generate piece by piece.

        Args:
            input_ids: prompts, as in :meth:`generate`.
            attention_mask: mask, as in :meth:`generate`.
            steps: number of decoding steps between two pieces.
            scalings: constant scalings, as in :meth:`generate`.
            experts: constant scalings by name, as in :meth:`generate`.
            config: settings, as in :meth:`generate`.
            **options: fields of ``config`` to change, as in :meth:`generate`.

        Yields:
            One int32 array per row: its new tokens since the last piece.
        """
        config = dataclasses.replace(config or GenerationConfig(), **options)
        self._stats = yield from stream(
            self.xlora,
            self.params,
            input_ids,
            attention_mask,
            config,
            experts=self._experts_on,
            steps=steps,
            given=self._given(input_ids, scalings, experts),
        )

    def _given(self, input_ids: Any, scalings: Any, experts: Any) -> Given | None:
        given = read_given(scalings, experts, len(input_ids), len(self.layers), self.expert_names)
        if given is not None and not self._experts_on:
            raise ValueError("scalings are given, but the experts are switched off (disable_adapter): switch them on")
        return given

    def get_generation_stats(self) -> GenerationStats | None:
        """Return the cost of the last generation: seconds, reads of the weights per token, acceptance of drafts."""
        return self._stats

    def _record(self, scalings: jax.Array | None, mask: Any) -> None:
        self._latest = scalings
        if self._logging and scalings is not None:
            self._log.record(scalings, mask)

    def set_topk_lora(self, value: int | None) -> None:
        """Keep the ``value`` largest gates of each token and layer; None keeps all."""
        self._set(top_k_lora=value)

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply the output of every expert by ``weight``."""
        self._set(global_scaling_weight=weight)

    def get_global_scaling_weight(self) -> float:
        """Return the factor of every expert's output."""
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the constant gate of the scaling pass; None means 1/n for n experts."""
        self._set(scaling_pass_value=1 / len(self.expert_names) if value is None else value)

    def get_latest_scalings(self) -> jax.Array | None:
        """Return the scalings ``[B, T, L, N]`` of the last call, or None if there was none.

        :meth:`generate` counts as a call only while scalings are logged; otherwise it does not keep scalings.
        """
        return self._latest

    def enable_scalings_logging(self, mode: str = "all", *, size: int = 100, every: int = 1, seed: int = 0) -> None:
        """Log the scalings of every call from now on, and one entry for every :meth:`generate`.

        Args:
            mode: ``all`` keeps every call, as PEFT does. The other modes do not grow with the run: ``reservoir`` (a
                random sample), ``mean`` (the mean over all tokens) and ``every`` (every n-th call), see
                :class:`~xlora_jax.routing.recorder.ScalingsLog`.
            size: number of entries that ``reservoir`` and ``every`` keep.
            every: distance of the calls that ``every`` keeps.
            seed: random seed of ``reservoir``.

        Raises:
            ValueError: a setting is invalid, or the log has entries of another mode.
        """
        log = ScalingsLog(mode, size, every, seed)
        same = all(getattr(log, name) == getattr(self._log, name) for name in ("mode", "size", "every", "seed"))
        if not same and self._log.seen:
            raise ValueError(
                f"mode {mode}: the log has entries of mode {self._log.mode} with other settings; save it, and call "
                f"clear_scalings_log() first"
            )
        if not same:
            self._log = log
        self._logging = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; the log stays."""
        self._logging = False

    def clear_scalings_log(self) -> None:
        """Empty the log."""
        self._log.clear()

    def get_scalings_log(self) -> list[jax.Array]:
        """Return a copy of the log, a list of scalings ``[B, T, L, N]``."""
        return self._log.entries()

    def save_scalings_log(self, path: str | FilePath) -> None:
        """Write the log to an ``.npz`` file, which :func:`~xlora_jax.routing.recorder.load_scalings_log` reads.

        Raises:
            ValueError: the path does not end in ``.npz``.
            OSError: the file can't be written.
        """
        self._log.save(path, expert_names=self.expert_names, layer_names=self.layer_names)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[jax.Array]]]:
        """Return the log by sequence length: for each T, the entries' indices in the log, and the entries."""
        buckets: dict[int, tuple[list[int], list[jax.Array]]] = {}
        for place, scalings in enumerate(self._log.entries()):
            places, entries = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            entries.append(scalings)
        return buckets

    @property
    def routing_layers(self) -> tuple[str, ...]:
        """Names of the layers' axis of :meth:`gates_of`: the adapted layers, or one name if they share their gates."""
        return self.layer_names if self.config.layerwise_scalings else ("all layers",)

    def gates_of(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> NDArray[np.float32]:
        """Return the gates of each token, without the real pass.

        Args:
            input_ids: int ``[B, T]``.
            attention_mask: ``[B, T]``, zero at padding.
            **more: other inputs, such as ``positions`` and ``segment_ids`` of packed rows.

        Returns:
            float32 ``[B, T, L or 1, N]``: after top-k and the softmax over the selected, before the global weight.
        """
        inputs = _inputs(self.module, input_ids, attention_mask, None, more)
        return np.asarray(_gates(self.xlora, self.params, **inputs))

    def routing(
        self,
        text: str,
        *,
        codec: Any = None,
        max_new_tokens: int = 0,
        name: str | None = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> RoutedText:
        """Return a text with the gates of its tokens, which displays itself in a notebook.

        Args:
            text: text, or the prompt of a text to generate.
            codec: :class:`~xlora_jax.training.data.Codec`, the tokenizer's functions; None takes the tokenizer of the
                base model's files.
            max_new_tokens: number of tokens to generate; prompt and generated tokens are told apart.
            name: title; None takes the beginning of the text.
            config: generation settings, as in :meth:`generate`.
            **options: fields of ``config`` to change.

        Raises:
            ValueError: the text has no tokens, or the model came from no files and there is no ``codec``.
        """
        if codec is None:
            if not hasattr(type(self.origin), "codec"):
                raise ValueError("codec: expected one, because this model came from no files; see xlora_jax.Codec")
            codec = self.origin.codec
        ids = list(codec.encode(text, 0)[0])
        if codec.bos is not None and ids[:1] != [codec.bos]:
            ids = [codec.bos, *ids]
        if not ids:
            raise ValueError(f"text: expected at least one token, got none of {text!r}")
        parts: tuple[Part, ...] = (Part(0, "text"),)
        if max_new_tokens:
            config = dataclasses.replace(
                config or GenerationConfig(), **options, max_new_tokens=max_new_tokens, num_return_sequences=1
            )
            parts = (Part(0, "prompt"), Part(len(ids), "generated"))
            out = generate(self.xlora, self.params, np.array([ids]), None, config, experts=self._experts_on)
            new = out.tokens[0, len(ids) :].tolist()
            end = next((place + 1 for place, token in enumerate(new) if token in config.eos), len(new))
            ids += new[:end]
        elif options:
            raise TypeError(f"options of generation need max_new_tokens: {', '.join(options)}")
        return RoutedText(
            pieces_of(ids, codec.decode),
            self.gates_of(np.array([ids]))[0],
            self.expert_names,
            self.routing_layers,
            parts,
            " ".join(text.split())[:40] if name is None else name,
        )

    @property
    def _experts_on(self) -> bool:
        return _SWITCHES.get().get(id(self), self._enabled)

    def enable_adapter_layers(self) -> None:
        """Switch the experts on; within a block of :meth:`disable_adapter`, until its end and in this thread."""
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        """Switch the experts off: calls and generation are the base model's, in one pass."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if id(self) in _SWITCHES.get():
            _SWITCHES.set({**_SWITCHES.get(), id(self): on})
        else:
            self._enabled = on

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the experts off within a ``with`` block, in this thread or asynchronous task only."""
        before = _SWITCHES.get().get(id(self))
        _SWITCHES.set({**_SWITCHES.get(), id(self): False})
        try:
            yield
        finally:
            switches = {key: on for key, on in _SWITCHES.get().items() if key != id(self)}
            _SWITCHES.set(switches if before is None else {**switches, id(self): before})

    def _set(self, **changes: Any) -> None:
        with warnings.catch_warnings():
            # The config gave its warnings when it was first made.
            warnings.simplefilter("ignore")
            config = dataclasses.replace(self.config, **changes)
        config.validate_experts(len(self.expert_names))
        self.config = config


def _members(module: Decoder) -> dict[str, list[str]]:
    """Return, for the key of each stack of blocks, the keys of its blocks in a model without stacks."""
    groups = module.config.groups
    return {group.name: [f"layers_{group.start + i}" for i in range(group.length)] for group in groups}


def _unstack(tree: Params, groups: Mapping[str, Sequence[str]], donate: bool) -> dict[str, Any]:
    """Split the stacks of a collection, leaf by leaf."""
    taken: dict[Path, jax.Array] = {}
    for path, leaf in flatten(tree).items():
        if path[0] not in groups:
            taken[path] = leaf
            continue
        members = [
            jax.block_until_ready(jax.tree.map(lambda array, i=i: array[i], leaf)) for i in range(len(groups[path[0]]))
        ]
        for name, member in zip(groups[path[0]], members, strict=True):
            taken[(name, *path[1:])] = member
        if donate:
            for array in jax.tree.leaves(leaf):
                array.delete()
    return unflatten(taken)


def _inputs(
    module: BaseModule, input_ids: Any, attention_mask: Any, inputs_embeds: Any, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the arguments of a call and convert them to arrays."""
    config = module.config
    inputs: dict[str, Any] = {name: jnp.asarray(value) for name, value in more.items() if value is not None}
    if "pixel_values" in inputs and input_ids is None and inputs_embeds is None:
        return inputs
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        inputs["input_ids"] = tokens = jnp.asarray(input_ids)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"input_ids: expected int [batch, tokens], got {tokens.dtype} {list(tokens.shape)}")
        check_token_ids(tokens, getattr(config, "vocab_size", None), "input_ids")
        if "token_type_ids" in inputs:
            check_token_ids(inputs["token_type_ids"], getattr(config, "token_types", None), "token_type_ids")
    else:
        inputs["inputs_embeds"] = tokens = jnp.asarray(inputs_embeds)
        if tokens.ndim != 3:
            raise ValueError(f"inputs_embeds: expected [batch, tokens, width], got shape {list(tokens.shape)}")
    if attention_mask is not None:
        inputs["attention_mask"] = mask = jnp.asarray(attention_mask)
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"attention_mask: expected shape {list(tokens.shape[:2])}, got {list(mask.shape)}")
    warn_beyond_context(tokens.shape[1], getattr(config, "context_length", None), stacklevel=4)
    return inputs
