"""Metrics of routing, as pure functions of gates and a mask, and their totals over a data set in constant memory.

Axes: B batch, T tokens, L adapted layers (1 if they share their gates), N experts, C labels (such as domains).

All metrics are means over tokens. A token's *shares* at a layer are the sizes of its gates, divided by their sum:
``s_e = |g_e| / sum_j |g_j|``. They are the gates themselves if these sum to one. (PEFT's top-k does not renormalize,
and gates without a softmax may be negative.) A token without any gate has shares of zero, and no leading expert.

| metric | formula | source |
|---|---|---|
| mean gate | mean of g_e | P_e of Switch Transformers, arXiv 2101.03961, equation 6 |
| mean share | mean of s_e | the same, for gates that do not sum to one |
| selected | share of tokens with g_e != 0 | GShard, arXiv 2006.16668, section 2.2 |
| top-1 share | share of tokens with the largest s_e at e | f_e of Switch Transformers, equation 5 |
| entropy | H / log N with H = -sum_e s_e log s_e, between 0 and 1 | Pielou, J. Theor. Biol. 13 (1966) |
| experts per token | exp(H), between 1 and N | Hill, Ecology 54 (1973), order 1 |
| experts in use | exp(H) of the mean shares | Hill, as above |
| co-use | sum s_i s_j / sqrt(sum s_i^2 sum s_j^2), sums over tokens | cosine; Salton and McGill (1983), section 4 |
| change | (1/2) sum_e abs(s_e(t + 1) - s_e(t)), for neighbors t, t + 1 | total variation; Levin and Peres (2017) |
| agreement | share of tokens with the same leading expert at two layers | simple matching; Sokal and Michener (1958) |
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from numpy.typing import NDArray

__all__ = ["RoutingMetrics", "RoutingSums", "Total", "gate_shares", "layer_mean", "log_values", "routing_sums"]


@struct.dataclass
class RoutingSums:
    """Sums over tokens of each label; the sums of several batches can be added. All float32.

    Attributes:
        tokens: ``[C]``, number of tokens.
        neighbors: ``[C]``, number of pairs of neighboring tokens.
        gates: ``[C, L, N]``.
        shares: ``[C, L, N]``.
        selected: ``[C, L, N]``, number of tokens whose gate is not zero.
        leads: ``[C, L, N]``, number of tokens that the expert leads.
        entropy: ``[C, L]``, normalized.
        experts: ``[C, L]``, effective number of experts of each token.
        change: ``[C, L]``, distance of each token's shares to those of the token before.
        products: ``[C, L, N, N]``, products of two experts' shares.
        agreement: ``[C, L, L]``, number of tokens with the same leading expert at two layers.
    """

    tokens: jax.Array
    neighbors: jax.Array
    gates: jax.Array
    shares: jax.Array
    selected: jax.Array
    leads: jax.Array
    entropy: jax.Array
    experts: jax.Array
    change: jax.Array
    products: jax.Array
    agreement: jax.Array


@struct.dataclass
class RoutingMetrics:
    """Metrics of each label, float64 NumPy; NaN for a label without tokens. Formulas are in the module's docstring.

    Attributes:
        tokens: ``[C]``, number of tokens.
        mean_gate: ``[C, L, N]``.
        mean_share: ``[C, L, N]``.
        selected: ``[C, L, N]``.
        top1: ``[C, L, N]``.
        entropy: ``[C, L]``, normalized.
        experts_per_token: ``[C, L]``.
        experts_in_use: ``[C, L]``.
        co_use: ``[C, L, N, N]``; 0 for an expert without weight.
        change: ``[C, L]``; 0 if no two tokens are neighbors.
        agreement: ``[C, L, L]``.
    """

    tokens: NDArray[np.float64]
    mean_gate: NDArray[np.float64]
    mean_share: NDArray[np.float64]
    selected: NDArray[np.float64]
    top1: NDArray[np.float64]
    entropy: NDArray[np.float64]
    experts_per_token: NDArray[np.float64]
    experts_in_use: NDArray[np.float64]
    co_use: NDArray[np.float64]
    change: NDArray[np.float64]
    agreement: NDArray[np.float64]

    @classmethod
    def of(cls, sums: RoutingSums) -> RoutingMetrics:
        """Return the metrics of sums, which may be those of many batches."""
        total: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            by_token = {
                name: value / total.tokens.reshape(-1, *[1] * (value.ndim - 1))
                for name, value in vars(total).items()
                if name not in ("tokens", "neighbors", "change", "products")
            }
        return cls(
            tokens=total.tokens,
            mean_gate=by_token["gates"],
            mean_share=by_token["shares"],
            selected=by_token["selected"],
            top1=by_token["leads"],
            entropy=by_token["entropy"],
            experts_per_token=by_token["experts"],
            experts_in_use=_perplexity(by_token["shares"]),
            co_use=_cosine(total.products),
            change=total.change / np.maximum(total.neighbors, 1)[:, None],
            agreement=by_token["agreement"],
        )


def gate_shares(gates: jax.Array) -> jax.Array:
    """Return each expert's share of its token's gates, float32 ``[..., N]``; zero where all gates are zero."""
    size = jnp.abs(gates.astype(jnp.float32))
    total = size.sum(axis=-1, keepdims=True)
    return size / jnp.where(total == 0, 1, total)


def routing_sums(
    gates: jax.Array,
    mask: jax.Array | None = None,
    *,
    labels: jax.Array | None = None,
    num_labels: int = 1,
    segment_ids: jax.Array | None = None,
) -> RoutingSums:
    """Return the sums of a batch.

    Args:
        gates: ``[B, T, L or 1, N]``, gates or scalings of each token and layer.
        mask: ``[B, T]``, zero where a token does not count; None counts all. The gates of such tokens are not read.
        labels: int ``[B]`` or ``[B, T]``, label of each row or token, from 0. A negative label counts nowhere.
        num_labels: C, number of labels; 1 without ``labels``.
        segment_ids: int ``[B, T]``, number of the document of each token; tokens of two documents are no neighbors.

    Raises:
        ValueError: shapes do not fit.
    """
    if gates.ndim != 4:
        raise ValueError(f"gates: expected [batch, tokens, layers, experts], got shape {list(gates.shape)}")
    shape = gates.shape[:2]
    for name, array in (("mask", mask), ("segment_ids", segment_ids)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    counted = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask) != 0
    if labels is None:
        if num_labels != 1:
            raise ValueError(f"num_labels: expected 1 without labels, got {num_labels}")
        labels = jnp.zeros(shape, jnp.int32)
    elif labels.shape not in (shape, shape[:1]):
        raise ValueError(f"labels: expected shape {list(shape[:1])} or {list(shape)}, got {list(labels.shape)}")
    elif not isinstance(labels, jax.core.Tracer) and np.max(labels, initial=0) >= num_labels:
        raise ValueError(f"labels: expected below {num_labels}, got {np.max(labels)}; give num_labels")
    of_token = jnp.broadcast_to(labels[:, None] if labels.ndim == 1 else labels, shape)

    sums: RoutingSums = _sums(gates, counted, of_token, segment_ids, num_labels)
    return sums


@partial(jax.jit, static_argnums=4)
def _sums(
    gates: jax.Array, counted: jax.Array, of_token: jax.Array, segment_ids: jax.Array | None, num_labels: int
) -> RoutingSums:
    # Not a product: the gates of tokens that don't count may be anything, NaN included.
    gates = jnp.where(counted[:, :, None, None], gates.astype(jnp.float32), 0)
    shares = gate_shares(gates)
    experts = gates.shape[-1]
    entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1))).sum(axis=-1)
    some = shares.sum(axis=-1) > 0
    leads = jax.nn.one_hot(shares.argmax(axis=-1), experts) * some[..., None]
    effective = jnp.where(some, jnp.exp(entropy), 0)
    distance = jnp.abs(shares[:, 1:] - shares[:, :-1]).sum(axis=-1) / 2

    def of_label(label: jax.Array) -> RoutingSums:
        own = counted & (of_token == label)
        beside = own[:, 1:] & own[:, :-1]
        if segment_ids is not None:
            beside &= segment_ids[:, 1:] == segment_ids[:, :-1]
        w, pairs = own.astype(jnp.float32), beside.astype(jnp.float32)
        return RoutingSums(
            tokens=w.sum(),
            neighbors=pairs.sum(),
            gates=jnp.einsum("btln,bt->ln", gates, w),
            shares=jnp.einsum("btln,bt->ln", shares, w),
            selected=jnp.einsum("btln,bt->ln", (gates != 0).astype(jnp.float32), w),
            leads=jnp.einsum("btln,bt->ln", leads, w),
            entropy=jnp.einsum("btl,bt->l", entropy, w) / (np.log(experts) if experts > 1 else 1),
            experts=jnp.einsum("btl,bt->l", effective, w),
            change=jnp.einsum("btl,bt->l", distance, pairs),
            products=jnp.einsum("btli,btlj->lij", shares * w[:, :, None, None], shares),
            agreement=jnp.einsum("btln,btmn->lm", leads * w[:, :, None, None], leads),
        )

    if num_labels == 1:  # the common case compiles faster without a loop
        only: RoutingSums = jax.tree.map(lambda leaf: leaf[None], of_label(jnp.int32(0)))
        return only
    # One label after the other, so that memory does not grow with their number.
    sums: RoutingSums = lax.map(of_label, jnp.arange(num_labels))
    return sums


def layer_mean(sums: RoutingSums) -> dict[str, jax.Array]:
    """Return sums over the tokens of all labels, as means over the layers: small enough to log at every step.

    Returns:
        ``tokens``, ``neighbors``, ``entropy``, ``experts``, ``change`` and ``agreement`` (over pairs of different
        layers) as scalars; ``gates``, ``shares``, ``selected`` and ``leads``, ``[N]``; ``products``, ``[N, N]``.
    """
    whole = jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)
    layers = whole.entropy.shape[0]
    other = whole.agreement.sum() - jnp.trace(whole.agreement)
    names = ("gates", "shares", "selected", "leads", "entropy", "experts", "change", "products")
    return {
        "tokens": whole.tokens,
        "neighbors": whole.neighbors,
        "agreement": other / (layers * (layers - 1)) if layers > 1 else whole.tokens,
        **{name: getattr(whole, name).mean(axis=0) for name in names},
    }


def log_values(total: Any, expert_names: tuple[str, ...]) -> dict[str, float]:
    """Return the metrics of :func:`layer_mean`'s sums as numbers by name, for a log.

    Returns:
        ``gate/NAME``, ``selected/NAME`` and ``top1/NAME`` of each expert; ``entropy``, ``experts_per_token``,
        ``experts_in_use``, ``change``, ``layer_agreement``, and ``co_use``, the mean over pairs of different experts.
    """
    total = {name: np.asarray(value, np.float64) for name, value in total.items()}
    tokens, count = max(float(total["tokens"]), 1.0), len(expert_names)
    values = {
        f"{name}/{expert}": float(value)
        for name, key in (("gate", "gates"), ("selected", "selected"), ("top1", "leads"))
        for expert, value in zip(expert_names, total[key] / tokens, strict=True)
    }
    cosine = _cosine(total["products"])
    values |= {
        "entropy": float(total["entropy"]) / tokens,
        "experts_per_token": float(total["experts"]) / tokens,
        "experts_in_use": float(_perplexity(total["shares"])),
        "change": float(total["change"]) / max(float(total["neighbors"]), 1.0),
        "layer_agreement": float(total["agreement"]) / tokens,
    }
    if count > 1:
        values["co_use"] = float((cosine.sum() - np.trace(cosine)) / (count * (count - 1)))
    return values


def _perplexity(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the effective number of experts ``[...]`` of weights ``[..., N]``; 0 if there is no weight."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = weights / np.where(total == 0, 1, total)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1)
    found: NDArray[np.float64] = np.where(total[..., 0] == 0, 0, np.exp(entropy))
    return found


def _cosine(products: NDArray[np.float64]) -> NDArray[np.float64]:
    size = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    both = size[..., :, None] * size[..., None, :]
    found: NDArray[np.float64] = products / np.where(both == 0, 1, both)
    return found


@struct.dataclass
class Total:
    """Running total of trees of float32 arrays, on their device, in memory that does not grow.

    It keeps what rounding loses (compensated summation: Neumaier, ZAMM 54 (1974)), so it counts beyond the 2^24 at
    which float32 alone stops. Start with ``Total.of(first)``.
    """

    high: Any
    low: Any

    @classmethod
    def of(cls, values: Any) -> Total:
        """Return a total of one tree."""
        return cls(values, jax.tree.map(jnp.zeros_like, values))

    def add(self, values: Any) -> Total:
        """Return the total with another tree of the same shapes."""
        total: Total = _add(self, values)
        return total

    def value(self) -> Any:
        """Return the total as float64 NumPy arrays."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + np.asarray(b, np.float64), self.high, self.low)


@jax.jit
def _add(total: Total, values: Any) -> Total:
    def rounded(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + b

    def lost(a: jax.Array, b: jax.Array) -> jax.Array:
        sum_ = a + b
        return jnp.where(jnp.abs(a) >= jnp.abs(b), (a - sum_) + b, (b - sum_) + a)

    low = jax.tree.map(lambda a, b, c: c + lost(a, b), total.high, values, total.low)
    return Total(jax.tree.map(rounded, total.high, values), low)
