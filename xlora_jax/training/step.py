"""Training steps for the gate, and optionally the experts, with any optax transformation.

The parameters are split into a trainable and a frozen tree. Only trainable parameters have gradients and optimizer
state.

Axes: A micro-batches of an accumulated step, B batch, T tokens, D width, L adapted layers, N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh

from xlora_jax.config import XLoraConfig
from xlora_jax.layers import mixing
from xlora_jax.passes import Params, XLora, classify, real_pass, scaling_pass, unembed
from xlora_jax.routing.metrics import layer_mean, routing_sums
from xlora_jax.sharding import keep_batch_split
from xlora_jax.token_ids import check_token_ids
from xlora_jax.training.losses import (
    IGNORED_LABEL,
    causal_lm_loss,
    chunked_cross_entropy,
    next_token_targets,
    summed_cross_entropy,
)
from xlora_jax.training.regularizers import Regularizers
from xlora_jax.trees import Path, flatten, unflatten

__all__ = [
    "BATCH_KEYS",
    "IGNORED_LABEL",
    "TrainState",
    "batch_loss",
    "causal_lm_loss",
    "check_batch",
    "init_train_state",
    "inputs_of",
    "make_eval_step",
    "make_scaling_step",
    "make_train_step",
    "merge_params",
    "scaled_loss",
    "split_params",
]

_LEARNED_BY_EXPERTS = ("lora_a", "lora_b", "lora_bias")
_INPUTS = ("input_ids", "attention_mask", "positions", "segment_ids")

# Keys that a batch may have; a step refuses any other.
BATCH_KEYS = (*_INPUTS, "labels", "scaling_hidden")

# NumPy arrays or JAX arrays.
Batch = Mapping[str, Any]


def split_params(params: Params, config: XLoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into a trainable and a frozen tree; :func:`merge_params` joins them.

    The classifier is trainable. With ``use_trainable_adapters`` the experts' ``lora_a``, ``lora_b`` and ``lora_bias``
    are trainable too, but not the columns that assign ranks to experts.
    """
    flat = flatten(params)

    def learns(path: Path) -> bool:
        if path[0] == "experts":
            return config.use_trainable_adapters and path[-1] in _LEARNED_BY_EXPERTS
        return path[0] == "classifier"

    trainable = {path: leaf for path, leaf in flat.items() if learns(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def merge_params(trainable: Params, frozen: Params) -> dict[str, Any]:
    """Join the two trees of :func:`split_params`."""
    return unflatten(flatten(frozen) | flatten(trainable))


@struct.dataclass
class TrainState:
    """Training state, which changes from step to step.

    Attributes:
        step: int32, number of batches seen.
        trainable: tree of the trainable parameters.
        opt_state: optimizer state of ``trainable``.
        rng: PRNG key of the dropouts, folded with ``step``.
        skipped: int32, number of skipped steps: their loss or gradient was not finite, and they changed nothing.
        skipped_in_row: int32, number of consecutive skipped steps up to now.
    """

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: optax.OptState
    rng: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def init_train_state(
    params: Params,
    config: XLoraConfig,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Make the initial training state from ``params``.

    Args:
        params: mapping with ``base``, ``experts`` and ``classifier``.
        config: X-LoRA config, which decides whether the experts are trainable.
        optimizer: any optax transformation.
        seed: random seed of the dropouts.
        dtype: dtype of the trainable parameters; None keeps theirs. Next to a bfloat16 base, float32 keeps small
            updates from being rounded away.

    Returns:
        The state and the frozen parameters; every step takes both.
    """
    trainable, frozen = split_params(params, config)
    # The step donates its state, so the caller's `params` are copied.
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), trainable)
    zero = [jnp.int32(0) for _ in range(3)]
    state = TrainState(zero[0], trainable, optimizer.init(trainable), jax.random.key(seed), zero[1], zero[2])
    return state, frozen


def batch_loss(
    xlora: XLora,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    *,
    rngs: Mapping[str, jax.Array] | None = None,
    loss_chunk: int = 256,
    regularizers: Regularizers | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run both passes and compute the loss, as a pure function to differentiate with respect to ``trainable``.

    Args:
        xlora: static description of the model.
        trainable: tree of the trainable parameters.
        frozen: tree of the other parameters.
        batch: mapping with ``input_ids`` and ``labels``, int ``[B, T]``. It may have ``attention_mask``, and for packed
            documents ``positions`` and ``segment_ids``, each ``[B, T]``. With ``scaling_hidden [B, T, D]``, the result
            of :func:`~xlora_jax.passes.scaling_pass` for these tokens, that pass is not run.
        rngs: PRNG keys: ``dropout`` for the classifier's dropout, ``lora_dropout`` for the experts'. A dropout without
            a key is off.
        loss_chunk: number of positions of a row whose logits exist at a time.
        regularizers: additional loss terms; None for none.

    Returns:
        Sum of the tokens' cross-entropy (float32), sum of the additional terms (float32), scalings ``[B, T, L or 1,
        N]``.

    Raises:
        ValueError: the model classifies.
    """
    check_batch(xlora, batch)
    params = merge_params(trainable, frozen)
    rngs = dict(rngs or {})
    lora_rngs: list[dict[str, jax.Array]] = [{}, {}]
    if "lora_dropout" in rngs:
        lora_rngs = [{"lora_dropout": key} for key in jax.random.split(rngs["lora_dropout"])]

    hidden = batch.get("scaling_hidden")
    if xlora.arrow is not None:
        return _arrow_loss(xlora, params, batch, inputs_of(batch), loss_chunk)
    if hidden is None:
        hidden, _ = scaling_pass(xlora, params, rngs=lora_rngs[0], **inputs_of(batch))
    hidden = hidden.astype(xlora.module.dtype)
    dropout = {key: rng for key, rng in rngs.items() if key == "dropout"}
    extra = jnp.float32(0)
    if regularizers:
        config = xlora.config
        # The terms are defined on logits, so the classifier runs without its softmax.
        bare = dataclasses.replace(xlora, config=dataclasses.replace(config, enable_softmax=False))
        logits = classify(bare, params, hidden, rngs=dropout)
        scalings = mixing.temperature_softmax(logits, config.softmax_temperature) if config.enable_softmax else logits
        mask = batch.get("segment_ids", batch.get("attention_mask"))
        extra = regularizers(logits, mask, temperature=config.softmax_temperature, top_k=config.top_k_lora)
    else:
        scalings = classify(xlora, params, hidden, rngs=dropout)

    total = scaled_loss(xlora, trainable, frozen, batch, scalings, rngs=lora_rngs[1], loss_chunk=loss_chunk)
    return total, extra, scalings


def scaled_loss(
    xlora: XLora,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    scalings: jax.Array,
    *,
    rngs: Mapping[str, jax.Array] | None = None,
    loss_chunk: int = 256,
) -> jax.Array:
    """Return the sum of the tokens' cross-entropy (float32) with given ``scalings [B, T, L or 1, N]``: the real pass.

    The other arguments are those of :func:`batch_loss`.
    """
    params = merge_params(trainable, frozen)
    whole = getattr(xlora.module, "whole_logits", False)
    out = real_pass(xlora, params, scalings, rngs=rngs, with_logits=whole, **inputs_of(batch))
    targets = next_token_targets(batch["labels"], batch.get("segment_ids"))
    if whole:
        assert out.logits is not None
        return summed_cross_entropy(out.logits, targets)
    head_path = getattr(xlora.module, "head_path", ("lm_head",))
    of_head = {path: leaf for path, leaf in flatten(params["experts"]).items() if path[:-1] == head_path}
    head_scalings = scalings if of_head else None

    def head(learned: Any, rest: Any, hidden: jax.Array, scalings: jax.Array | None) -> jax.Array:
        return unembed(xlora, merge_params(learned, rest), hidden, scalings)

    learned = {path: leaf for path, leaf in flatten(trainable).items() if path[:-1] == ("experts", *head_path)}
    return chunked_cross_entropy(
        head, unflatten(learned), frozen, out.hidden_states, head_scalings, targets, loss_chunk
    )


def inputs_of(batch: Batch) -> dict[str, Any]:
    """Return the inputs of the base model in a batch."""
    return {key: batch[key] for key in _INPUTS if key in batch}


def check_batch(xlora: XLora, batch: Batch) -> None:
    """Check the keys of a batch, and that the model predicts tokens.

    Raises:
        ValueError: the model classifies, or the batch has an unknown key.
    """
    if (kind := getattr(xlora.module.config, "head", "lm")) != "lm":
        raise ValueError(
            f"the base model has a head that classifies ({kind!r}), which has no next token to predict: train it with "
            f"xlora_jax.training.classification.make_objective_step"
        )
    unknown = sorted(set(batch) - set(BATCH_KEYS))
    if unknown:
        raise ValueError(f"batch: expected only {', '.join(BATCH_KEYS)}, got {', '.join(unknown)} as well")


def _arrow_loss(
    xlora: XLora, params: Params, batch: Batch, inputs: Mapping[str, Any], loss_chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the results of :func:`batch_loss` for a model without a classifier, whose scalings are NaN."""
    assert xlora.arrow is not None
    out = real_pass(xlora, params, xlora.arrow, with_logits=False, **inputs)

    def head(learned: Any, params: Any, hidden: jax.Array, scalings: jax.Array | None) -> jax.Array:
        return unembed(xlora, params, hidden, xlora.arrow)

    targets = next_token_targets(batch["labels"], batch.get("segment_ids"))
    total = chunked_cross_entropy(head, {}, params, out.hidden_states, None, targets, loss_chunk)
    return total, jnp.float32(0), jnp.full((*targets.shape, 1, xlora.num_experts), jnp.nan)


def _count(batch: Batch) -> jax.Array:
    """Return the number of tokens of a batch that are predicted and not ignored."""
    labels, segments = batch["labels"], batch.get("segment_ids")
    fold = [array if array is None else array.reshape(-1, array.shape[-1]) for array in (labels, segments)]
    return (next_token_targets(cast(jax.Array, fold[0]), fold[1]) != IGNORED_LABEL).sum()


def _routing_of(xlora: XLora, batch: Batch, scalings: jax.Array) -> dict[str, jax.Array]:
    """Return the sums of :func:`~xlora_jax.routing.metrics.layer_mean` over the predicted tokens of a batch."""
    segments = batch.get("segment_ids")
    counted = next_token_targets(batch["labels"], segments) != IGNORED_LABEL
    gates = mixing.layer_gates(
        scalings, top_k=xlora.config.top_k_lora, softmax_selected=xlora.config.enable_softmax_topk
    )
    return layer_mean(routing_sums(gates, counted, segment_ids=segments))


class _CheckedStep:
    """A jitted step that first checks its batch on the host."""

    def __init__(self, xlora: XLora, jitted: Any) -> None:
        self.lower = jitted.lower
        self._jitted, self._vocab_size = jitted, getattr(xlora.module.config, "vocab_size", None)

    def __call__(self, first: Any, frozen: Params, batch: Batch) -> Any:
        check_token_ids(batch["input_ids"], self._vocab_size, "input_ids")
        check_token_ids(batch["labels"], self._vocab_size, "labels", ignored=IGNORED_LABEL)
        return self._jitted(first, frozen, batch)


def make_train_step(
    xlora: XLora,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss_chunk: int = 256,
    regularizers: Regularizers | None = None,
    mesh: Mesh | None = None,
    state_shardings: Any = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Any]]]:
    """Make the jitted step ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    The classifier's dropout and the experts' ``lora_dropout`` are on, as in PEFT's training mode. The loss is the mean
    over all tokens of the step, so accumulated micro-batches with fewer labels count less. If the loss or gradient of a
    step is not finite, only the counters of such steps change.

    Args:
        xlora: static description of the model.
        optimizer: any optax transformation.
        accumulate: A, number of micro-batches per step. Above 1 every array of a batch has a leading A axis.
        loss_chunk: number of positions of a row whose logits exist at a time.
        regularizers: additional loss terms; None for none.
        mesh: mesh of the parameters and batches, see :mod:`xlora_jax.sharding`; None for one device.
        state_shardings: shardings of the returned state; None leaves them to the compiler.

    Returns:
        The step. A batch is as in :func:`batch_loss`; its ids and labels are checked against the vocabulary on the
        host. Metrics are float32 scalars: ``loss`` (cross-entropy per token), ``regularization`` (if there are
        additional terms), ``grad_norm``, ``tokens`` (number of predicted tokens), ``finite``. ``routing`` is a mapping
        of sums over the predicted tokens, see :func:`~xlora_jax.routing.metrics.layer_mean`.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
    if xlora.router != "classifier":
        raise ValueError(f"the router {xlora.router!r} has nothing to train: expected a model with a classifier")

    def loss_of(trainable: Params, frozen: Params, batch: Batch, rng: jax.Array, count: jax.Array) -> Any:
        dropout, lora_dropout = jax.random.split(rng)
        with keep_batch_split(mesh):
            total, extra, scalings = batch_loss(
                xlora,
                trainable,
                frozen,
                batch,
                rngs={"dropout": dropout, "lora_dropout": lora_dropout},
                loss_chunk=loss_chunk,
                regularizers=regularizers,
            )
            routing = _routing_of(xlora, batch, lax.stop_gradient(scalings))
        loss, extra = total / count, extra / accumulate
        return loss + extra, (loss, extra, routing)

    gradient_of = jax.grad(loss_of, has_aux=True)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        rng = jax.random.fold_in(state.rng, state.step)
        count = jnp.maximum(_count(batch), 1).astype(jnp.float32)
        if accumulate == 1:
            gradients, (loss, extra, routing) = gradient_of(state.trainable, frozen, batch, rng, count)
        else:

            def micro(carry: Any, part: Any) -> tuple[Any, None]:
                number, micro_batch = part
                more = gradient_of(state.trainable, frozen, micro_batch, jax.random.fold_in(rng, number), count)
                return jax.tree.map(jnp.add, carry, more), None

            first = jax.tree.map(lambda array: array[0], dict(batch))
            shapes = jax.eval_shape(gradient_of, state.trainable, frozen, first, rng, count)
            start = (
                jax.tree.map(jnp.zeros_like, state.trainable),
                jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1]),
            )
            (gradients, (loss, extra, routing)), _ = lax.scan(micro, start, (jnp.arange(accumulate), dict(batch)))

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(extra) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        bad = 1 - finite.astype(jnp.int32)
        state = TrainState(
            state.step + 1,
            cast(dict[str, Any], trainable),
            opt_state,
            state.rng,
            state.skipped + bad,
            (state.skipped_in_row + bad) * bad,
        )
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": norm, "tokens": _count(batch).astype(jnp.float32)}
        if regularizers:
            metrics["regularization"] = extra
        metrics["finite"] = finite.astype(jnp.float32)
        metrics["routing"] = routing
        return state, metrics

    return _CheckedStep(xlora, jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None)))


def make_eval_step(
    xlora: XLora, *, loss_chunk: int = 256, mesh: Mesh | None = None
) -> Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Make the jitted function ``(trainable, frozen, batch) -> (loss, tokens, scalings)``, with dropout off.

    All three are sums over the predicted tokens, so the results of batches can be added. ``loss`` sums the
    cross-entropy, and ``tokens`` is the number of tokens. ``scalings [N]`` sums each expert's scaling, averaged over
    the adapted layers.
    """

    def step(trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        with keep_batch_split(mesh):
            total, _, scalings = batch_loss(xlora, trainable, frozen, batch, loss_chunk=loss_chunk)
        counted = next_token_targets(batch["labels"], batch.get("segment_ids")) != IGNORED_LABEL
        sums = jnp.einsum("btn,bt->n", scalings.astype(jnp.float32).mean(axis=2), counted.astype(jnp.float32))
        return total, counted.sum(), sums

    return _CheckedStep(xlora, jax.jit(step))


def make_scaling_step(xlora: XLora, *, mesh: Mesh | None = None) -> Callable[[Params, Batch], jax.Array]:
    """Make the jitted function ``(frozen, batch) -> hidden [B, T, D]``: the scaling pass alone.

    Its result does not change in training, so it can be cached (:mod:`xlora_jax.training.scaling_cache`).

    Raises:
        ValueError: the pass depends on trainable parameters or on random numbers.
    """
    config = xlora.config
    if config.use_trainable_adapters and (config.scaling_pass_gate(xlora.num_experts) != 0 or xlora.layers.with_bias):
        raise ValueError(
            "the scaling pass runs through experts that learn, so its result can't be kept: expected frozen experts "
            "(use_trainable_adapters=False) or scaling_pass_value=0 without lora_bias"
        )

    def step(frozen: Params, batch: Batch) -> jax.Array:
        inputs: dict[str, Any] = {key: batch[key] for key in _INPUTS if key in batch}
        with keep_batch_split(mesh):
            return scaling_pass(xlora, frozen, **inputs)[0]

    return jax.jit(step)
