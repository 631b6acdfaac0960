"""Generation from prompts: settings, batches, streams, statistics.

:mod:`xlora_jax.generation.decoding` makes the tokens.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.generation.decoding import decode
from xlora_jax.generation.given import Given
from xlora_jax.generation.sampling import LogitsProcessor, Sampler
from xlora_jax.generation.state import (
    UNBOUNDED,
    Draft,
    Ints,
    Settings,
    State,
    StopAt,
    keeps_cache,
    new_tokens,
    passes,
    row_bytes,
    start,
)
from xlora_jax.memory import check_fits, in_gib
from xlora_jax.passes import Params, XLora
from xlora_jax.token_ids import check_token_ids, warn_beyond_context

__all__ = ["Generated", "GenerationConfig", "GenerationStats", "generate", "stream"]


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of a generation. Those that transformers has too have its names and meaning.

    Attributes:
        max_new_tokens: maximum number of new tokens per row, at least 1.
        do_sample: whether to draw tokens (True) or take the most probable token (False).
        temperature: positive divisor of the logits of a draw.
        top_k: number of most probable tokens to draw from; None or 0 for all.
        top_p: probability that the tokens to draw from reach together; the fewest most probable ones are taken.
        min_p: least probability of the tokens to draw from, relative to the most probable token.
        repetition_penalty: factor above 1 that makes tokens of the row less probable, for greedy and drawn tokens.
        logits_processors: your own processors, see :class:`~xlora_jax.generation.sampling.LogitsProcessor`.
        num_return_sequences: number of rows for each prompt. They are adjacent, and each has its own draws.
        eos_token_id: token or tokens that end a row; None runs every row to ``max_new_tokens``.
        pad_token_id: token that fills a row after its end; None means the first ``eos_token_id``.
        seed: seed of the draws. A draw depends on seed, row and position only.
        stop_at: function from the new tokens of a row to the number of tokens to keep if they end the row, else None.
            Called every few steps. See :class:`~xlora_jax.generation.text.StopStrings`.
        draft: way to draft. True chooses the way that is likely to be fastest for this text, or none; "gates" and
            "lookup" always draft in that way; False never drafts. The tokens are the same. See
            :mod:`xlora_jax.generation.decoding`.
        frozen_after: number of new tokens after which the gates stay constant and each token takes one pass.
            APPROXIMATE: later tokens may differ from the model's. Turns drafting off.
        cache_dtype: dtype of keys and values; defaults to the compute dtype.
        prefill_chunk: maximum number of prompt tokens that run at once; bounds the memory of long prompts.
        beyond_context: whether ``max_new_tokens`` may exceed the positions that the model was made for.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logits_processors: Sequence[LogitsProcessor] = ()
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: int = 0
    stop_at: StopAt | None = None
    draft: Draft = True
    frozen_after: int | None = None
    cache_dtype: jax.typing.DTypeLike | None = None
    prefill_chunk: int = 512
    beyond_context: bool = False

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("max_new_tokens", "num_return_sequences", "prefill_chunk", "frozen_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.frozen_after is not None and self.frozen_after > UNBOUNDED:
            raise ValueError(f"frozen_after: expected at most {UNBOUNDED}, or None, got {self.frozen_after}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number of 64 bits, got {self.seed}")
        if self.draft not in get_args(Draft):
            raise ValueError(f"draft: expected one of {', '.join(map(repr, get_args(Draft)))}, got {self.draft!r}")

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a row."""
        return () if self.eos_token_id is None else tuple(int(token) for token in np.ravel(self.eos_token_id))

    @property
    def pad(self) -> int:
        """Token that fills a row after its end."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos, 0)[0]

    def settings(self, *, record: bool = False) -> Settings:
        """Return the static part, for which functions are compiled.

        Args:
            record: whether to keep the scalings of all positions.

        Raises:
            ValueError: a setting of the sampler is invalid.
        """
        sampler = Sampler.of(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            extra=self.logits_processors,
        )
        # With drafts, the frozen gates would depend on whether the last token was drafted.
        draft = self.draft if self.frozen_after is None else False
        dtype = None if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return Settings(sampler, self.eos, dtype, self.prefill_chunk, draft, self.frozen_after, record)


@dataclass(frozen=True)
class GenerationStats:
    """Cost of a generation.

    Attributes:
        rows: number of sequences generated.
        prompt_tokens: number of prompt tokens of all rows together, without padding.
        new_tokens: number of new tokens of all rows together, without padding.
        prefill_seconds: seconds until the first token of every row, including any compilation.
        decode_seconds: seconds from then to the end.
        reads_per_token: reads of the weights per token of a row, without the first tokens: 1 for the base model alone,
            2 for plain decoding with two passes.
        acceptance: share of drafts from stale gates that were right; None if there were none.
        guessed: share of new tokens that were guessed from earlier text.
        cache_bytes: size of both caches.
        cache_bytes_per_token: bytes that one more token of a row needs, in layers without a sliding window.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    reads_per_token: float
    acceptance: float | None
    guessed: float
    cache_bytes: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Generated:
    """Result of :func:`generate`.

    Attributes:
        tokens: int32 ``[B, T + new]``, NumPy: the prompts as given, then the new tokens, then padding.
        scalings: ``[B, T + new - 1, L or 1, N]`` by column, zero where there is no token; None if not recorded. The
            last new token has no scalings, because no token was predicted from it.
        mask: bool ``[B, T + new - 1]``, whether a column has a token with scalings.
        stats: cost of the generation.
    """

    tokens: Ints
    scalings: jax.Array | None
    mask: NDArray[np.bool_]
    stats: GenerationStats


def generate(
    xlora: XLora,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    *,
    experts: bool = True,
    record: bool = False,
    given: Given | None = None,
) -> Generated:
    """Generate from a batch of prompts.

    Args:
        xlora: static description.
        params: parameters of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, zero at padding, at any position of a row; None if there is no padding.
        config: generation settings.
        experts: whether to run the experts; False runs the base model alone.
        record: whether to return the scalings too.
        given: scalings of rows that do not use the classifier's.

    Raises:
        ValueError: shapes do not fit, a prompt has no tokens, or a setting is invalid.
    """
    run = _Run.of(xlora, params, input_ids, attention_mask, config, experts=experts, record=record, given=given)
    *_, state = run.states(None)
    width = run.input_ids.shape[1]
    tokens = np.full((len(run.input_ids), width + config.max_new_tokens), config.pad, np.int32)
    tokens[:, :width] = run.input_ids
    for row, new in enumerate(new_tokens(state, run.lengths)):
        tokens[row, width : width + len(new)] = new
    scalings, mask = _by_column(state, run.attention_mask, run.lengths, config.max_new_tokens)
    return Generated(tokens, scalings, mask, run.stats(state))


def stream(
    xlora: XLora,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    *,
    experts: bool = True,
    steps: int = 4,
    given: Given | None = None,
) -> Generator[list[Ints], None, GenerationStats]:
    """Generate piece by piece. The tokens are those of :func:`generate`.

    Args:
        xlora: static description.
        params: parameters of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, zero at padding; None if there is no padding.
        config: generation settings.
        experts: whether to run the experts; False runs the base model alone.
        steps: number of decoding steps between two pieces.
        given: scalings of rows that do not use the classifier's.

    Yields:
        One int32 array per row: its new tokens since the last piece. Rows advance at different speeds.

    Returns:
        Cost of the generation, as the value of ``yield from``.
    """
    run = _Run.of(xlora, params, input_ids, attention_mask, config, experts=experts, given=given)
    sent = np.zeros_like(run.lengths)
    state = None
    for state in run.states(steps):
        new = new_tokens(state, run.lengths)
        piece = [tokens[count:] for tokens, count in zip(new, sent, strict=True)]
        if any(map(len, piece)):
            yield piece
        # A stop can remove tokens that were yielded before; they are not yielded again.
        sent = np.maximum(sent, [len(tokens) for tokens in new])
    assert state is not None
    return run.stats(state)


@dataclass
class _Run:
    """A generation in progress: its prompts and its times.

    Attributes:
        input_ids: int32 ``[B, T]`` as given, with one row for each sequence to return.
        attention_mask: ``[B, T]``, zero at padding.
        lengths: int32 ``[B]``, number of tokens of each prompt.
    """

    model: XLora
    params: Params
    config: GenerationConfig
    settings: Settings
    experts: bool
    input_ids: Ints
    attention_mask: Ints
    lengths: Ints
    given: Given | None
    started: float = 0.0
    prefilled: float = 0.0

    @classmethod
    def of(
        cls,
        xlora: XLora,
        params: Params,
        input_ids: Any,
        attention_mask: Any,
        config: GenerationConfig,
        *,
        experts: bool,
        record: bool = False,
        given: Given | None = None,
    ) -> _Run:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids: expected int [batch, tokens], got {ids.dtype} {list(ids.shape)}")
        vocab_size = getattr(xlora.module.config, "vocab_size", None)
        check_token_ids(ids, vocab_size, "input_ids")
        check_token_ids(np.asarray(config.eos, np.int64), vocab_size, "eos_token_id")
        mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}"
            )
        xlora, experts = _routed(xlora, experts, given)
        lengths = (mask != 0).sum(axis=1).astype(np.int32)
        if not lengths.all():
            raise ValueError(f"prompt {int(np.argmin(lengths))} has no tokens: its attention_mask is all zero")
        if not keeps_cache(xlora):
            _check_recomputation(xlora, config)
        most = getattr(xlora.module.config, "max_positions", None)
        if most is not None and lengths.max() + config.max_new_tokens > most:
            raise ValueError(
                f"this model has {most} positions, got a prompt of {lengths.max()} tokens and max_new_tokens "
                f"{config.max_new_tokens}: shorten one of them"
            )
        context = getattr(xlora.module.config, "context_length", None)
        settings = config.settings(record=record and experts)
        if passes(experts, given) == 1:
            settings = dataclasses.replace(settings, draft=False)
        longest = int(lengths.max())
        rows = len(ids) * config.num_return_sequences
        size = row_bytes(xlora, longest, config.max_new_tokens, settings, experts, given) * rows
        if context is not None and config.max_new_tokens > context and not config.beyond_context:
            raise ValueError(
                f"max_new_tokens: expected at most {context}, the positions that the model was made for, got "
                f"{config.max_new_tokens}; the caches alone would take {in_gib(size)}. Set beyond_context to "
                f"ask for it"
            )
        check_fits(
            size,
            f"tokens and caches of {rows} sequences (num_return_sequences {config.num_return_sequences}) with "
            f"{longest} + {config.max_new_tokens} tokens each (max_new_tokens {config.max_new_tokens})",
            "ask for fewer",
        )
        if longest + config.max_new_tokens > UNBOUNDED // 2:  # positions are int32, and slots are rounded up
            raise ValueError(
                f"max_new_tokens: expected at most {UNBOUNDED // 2 - longest}, got {config.max_new_tokens}"
            )
        warn_beyond_context(int(lengths.max()), context, stacklevel=5)
        ids, mask, lengths = (np.repeat(array, config.num_return_sequences, axis=0) for array in (ids, mask, lengths))
        given = None if given is None else given.repeat(config.num_return_sequences)
        return cls(xlora, params, config, settings, experts, ids.astype(np.int32), mask, lengths, given)

    def states(self, steps: int | None) -> Iterator[State]:
        self.started = time.perf_counter()
        # Slots are positions, so tokens are moved to the start of the row, in order, and padding to its end.
        order = np.argsort(self.attention_mask == 0, axis=1, kind="stable")
        state = start(
            self.model,
            np.take_along_axis(self.input_ids, order, axis=1),
            self.lengths,
            max_new_tokens=self.config.max_new_tokens,
            settings=self.settings,
            rng=jax.random.key(self.config.seed),
            experts=self.experts,
            given=self.given,
        )
        stop_at = self.config.stop_at
        for after in decode(self.model, self.settings, self.params, state, steps=steps, stop_at=stop_at):
            if not self.prefilled:
                after.length.block_until_ready()
                self.prefilled = time.perf_counter()
            yield after

    def stats(self, state: State) -> GenerationStats:
        new, checked = int(state.length.sum() - self.lengths.sum()), int(state.checked.sum())
        caches = [cache for cache in (state.scaling, state.real) if cache is not None]
        return GenerationStats(
            rows=len(self.lengths),
            prompt_tokens=int(self.lengths.sum()),
            new_tokens=new,
            prefill_seconds=self.prefilled - self.started,
            decode_seconds=time.perf_counter() - self.prefilled,
            reads_per_token=int(state.reads.sum()) / max(new - len(self.lengths), 1),
            acceptance=int(state.accepted.sum()) / checked if checked else None,
            guessed=int(state.guessed.sum()) / max(new, 1),
            cache_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
            cache_bytes_per_token=sum(cache.bytes_per_token for cache in caches),
        )


def _check_recomputation(xlora: XLora, config: GenerationConfig) -> None:
    """Refuse a model that can't generate without a cache, and say what it costs for one that can."""
    module = xlora.module
    name = type(getattr(module, "module", module)).__name__
    if getattr(module.config, "head", None) != "lm" or getattr(module.config, "two_sequences", False):
        raise NotImplementedError(
            f"generate: expected a causal language model, got {name}, which has an encoder, another head, or a head "
            f"that is unknown here"
        )
    if config.frozen_after is not None or isinstance(config.draft, str):
        raise ValueError(f"frozen_after and draft need a cache, which {name} does not keep here; leave them out")
    warnings.warn(
        f"{name} keeps no cache here: every token runs both passes over the whole text, so a text of T tokens costs "
        f"T times as many as with a cache.",
        UserWarning,
        stacklevel=6,
    )


def _routed(xlora: XLora, experts: bool, given: Given | None) -> tuple[XLora, bool]:
    """Return the model to run, and whether it has scalings. With the router ``arrow`` it has none of its own."""
    if xlora.arrow is None:
        return xlora, experts
    if experts and given is None:
        return xlora, False
    if given is not None and not given.rows.all():
        raise ValueError("scalings: expected some for every row, or none at all: this model's layers gate themselves")
    return dataclasses.replace(xlora, router="classifier"), experts


def _by_column(state: State, attention_mask: Ints, first: Ints, new: int) -> tuple[jax.Array | None, NDArray[np.bool_]]:
    """Return scalings by column of the prompts as given, from scalings by position, and the columns with a token."""
    columns = first[:, None] + np.arange(new - 1)
    there = np.concatenate([attention_mask != 0, columns < np.array(state.length)[:, None]], axis=1)
    if state.recorded is None:
        return None, there
    position = np.concatenate([np.maximum(np.cumsum(attention_mask != 0, axis=1) - 1, 0), columns], axis=1)
    scalings = jnp.take_along_axis(state.recorded, jnp.asarray(position)[:, :, None, None], axis=1)
    return jnp.where(jnp.asarray(there)[:, :, None, None], scalings, 0), there
