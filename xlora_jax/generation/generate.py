"""Text from prompts: settings, batches, streams, statistics. :mod:`xlora_jax.generation.decoding` makes the tokens."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax.generation.decoding import decode
from xlora_jax.generation.sampling import LogitsProcessor, Sampler
from xlora_jax.generation.state import (
    UNBOUNDED,
    Draft,
    Ints,
    Settings,
    State,
    StopAt,
    new_tokens,
    row_bytes,
    start,
)
from xlora_jax.memory import check_fits, in_gib
from xlora_jax.models import Decoder
from xlora_jax.passes import Params, XLora
from xlora_jax.token_ids import check_token_ids, warn_beyond_context

__all__ = ["Generated", "GenerationConfig", "GenerationStats", "generate", "stream"]


@dataclass(frozen=True)
class GenerationConfig:
    """What can be asked of a generation. Names and meaning are those of transformers where it has them.

    Attributes:
        max_new_tokens: at least 1.
        do_sample: draw (True) or take the most probable token (False).
        temperature: positive; divides the logits of a draw.
        top_k: draw among the k most probable tokens; None or 0 for all.
        top_p: draw among the fewest most probable tokens that together reach this probability.
        min_p: draw among tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 1 makes what has occurred in the row less probable, greedy or drawn.
        logits_processors: your own, see :class:`~xlora_jax.generation.sampling.LogitsProcessor`.
        num_return_sequences: rows for each prompt, one behind the other, each with draws of its own.
        eos_token_id: token or tokens that end a row; None runs every row to the end.
        pad_token_id: fills a row after its end; None takes the first ``eos_token_id``.
        seed: of the draws. What is drawn depends on seed, row and position only.
        stop_at: from the new tokens of a row to how many of them stay if they end it, else None; asked every few steps.
            See :class:`~xlora_jax.generation.text.StopStrings`.
        draft: True drafts tokens in the way that is likely to be fastest for this text, or not at all; "gates" and
            "lookup" always draft in that way, False never does. The tokens are the same. See
            :mod:`xlora_jax.generation.decoding`.
        frozen_after: keep the gates as they are after so many new tokens, and run one pass per token from then on.
            APPROXIMATE: from there on the tokens are not those of the model. Nothing is drafted then.
        cache_dtype: of keys and values; None takes the model's.
        prefill_chunk: the most tokens of a prompt that run at once; bounds the memory of long prompts.
        beyond_context: allow ``max_new_tokens`` above the positions that the model was made for.
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
        """All tokens that end a row."""
        return () if self.eos_token_id is None else tuple(int(token) for token in np.ravel(self.eos_token_id))

    @property
    def pad(self) -> int:
        """The token that fills a row after its end."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos, 0)[0]

    def settings(self, *, record: bool = False) -> Settings:
        """The static part, from which functions are compiled.

        Args:
            record: keep the scalings of all positions.

        Raises:
            ValueError: a setting of the sampler without meaning.
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
        # The gates that stay would depend on whether the last token before was drafted.
        draft = self.draft if self.frozen_after is None else False
        dtype = None if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return Settings(sampler, self.eos, dtype, self.prefill_chunk, draft, self.frozen_after, record)


@dataclass(frozen=True)
class GenerationStats:
    """What a generation cost.

    Attributes:
        rows: sequences generated.
        prompt_tokens: without padding, all rows together.
        new_tokens: likewise.
        prefill_seconds: until the first token of every row, compilation included if there was any.
        decode_seconds: from there to the end.
        reads_per_token: reads of the weights per token of a row, first tokens aside: 1 is the base model alone, 2 plain
            decoding with two passes.
        acceptance: share of drafts from stale gates that were right; None if there were none.
        guessed: share of new tokens that were guessed from the text before.
        cache_bytes: of both caches.
        cache_bytes_per_token: of a row, in layers that do not keep a ring: what one more token needs.
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
    """What :func:`generate` gives.

    Attributes:
        tokens: int32 ``[B, T + new]``, NumPy: the prompts as given, then what was generated, then padding.
        scalings: ``[B, T + new - 1, L or 1, N]`` by column, zero where there is no token; None if not recorded. The
            last token generated has none: nothing was predicted from it.
        stats: what it cost.
    """

    tokens: Ints
    scalings: jax.Array | None
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
) -> Generated:
    """Generate from a batch of prompts.

    Args:
        xlora: static description.
        params: of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, zero at padding, which may stand anywhere; None for none.
        config: what is asked for.
        experts: False runs the base model alone.
        record: also return the scalings.

    Raises:
        ValueError: shapes that do not fit, a prompt without tokens, or a setting without meaning.
    """
    run = _Run.of(xlora, params, input_ids, attention_mask, config, experts=experts, record=record)
    *_, state = run.states(None)
    width = run.input_ids.shape[1]
    tokens = np.full((len(run.input_ids), width + config.max_new_tokens), config.pad, np.int32)
    tokens[:, :width] = run.input_ids
    for row, new in enumerate(new_tokens(state, run.lengths)):
        tokens[row, width : width + len(new)] = new
    scalings = _by_column(state, run.attention_mask, run.lengths, config.max_new_tokens)
    return Generated(tokens, scalings, run.stats(state))


def stream(
    xlora: XLora,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    *,
    experts: bool = True,
    steps: int = 4,
) -> Generator[list[Ints], None, GenerationStats]:
    """Generate piece by piece; the tokens are those of :func:`generate`, whose arguments these are.

    Args:
        xlora: static description.
        params: of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, or None.
        config: what is asked for.
        experts: False runs the base model alone.
        steps: between two pieces.

    Yields:
        For each row its new tokens since the last piece, int32; rows go on at their own pace.

    Returns:
        What it cost: the value of ``yield from``.
    """
    run = _Run.of(xlora, params, input_ids, attention_mask, config, experts=experts)
    given = np.zeros_like(run.lengths)
    state = None
    for state in run.states(steps):
        new = new_tokens(state, run.lengths)
        piece = [tokens[count:] for tokens, count in zip(new, given, strict=True)]
        if any(map(len, piece)):
            yield piece
        # A stop can take tokens back that were given; they are not given again.
        given = np.maximum(given, [len(tokens) for tokens in new])
    assert state is not None
    return run.stats(state)


@dataclass
class _Run:
    """One generation under way: its prompts, and when what happened.

    Attributes:
        input_ids: int32 ``[B, T]`` as given, a row for each sequence to be returned.
        attention_mask: ``[B, T]``.
        lengths: int32 ``[B]``, tokens of the prompts.
    """

    model: XLora
    params: Params
    config: GenerationConfig
    settings: Settings
    experts: bool
    input_ids: Ints
    attention_mask: Ints
    lengths: Ints
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
    ) -> _Run:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids: expected int [batch, tokens], got {ids.dtype} {list(ids.shape)}")
        vocab_size = getattr(xlora.module.config, "vocab_size", None)
        check_token_ids(ids, vocab_size, "input_ids")
        check_token_ids(np.asarray(config.eos, np.int64), vocab_size, "eos_token_id")
        check_token_ids(np.asarray([config.pad], np.int64), vocab_size, "pad_token_id")
        mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}"
            )
        lengths = (mask != 0).sum(axis=1).astype(np.int32)
        if not lengths.all():
            raise ValueError(f"prompt {int(np.argmin(lengths))} has no tokens: its attention_mask is all zero")
        if not isinstance(xlora.module, Decoder):
            raise NotImplementedError(
                f"generate: expected a causal language model of xlora_jax.models (Decoder), got "
                f"{type(xlora.module).__name__}, which keeps no cache"
            )
        most = xlora.module.config.max_positions
        if most is not None and lengths.max() + config.max_new_tokens > most:
            raise ValueError(
                f"this model has {most} positions, got a prompt of {lengths.max()} tokens and max_new_tokens "
                f"{config.max_new_tokens}: shorten one of them"
            )
        context = xlora.module.config.context_length
        settings = config.settings(record=record and experts)
        longest = int(lengths.max())
        rows = len(ids) * config.num_return_sequences
        size = row_bytes(xlora, longest, config.max_new_tokens, settings, experts) * rows
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
        return cls(xlora, params, config, settings, experts, ids.astype(np.int32), mask, lengths)

    def states(self, steps: int | None) -> Iterator[State]:
        self.started = time.perf_counter()
        # Slots are positions: tokens move together at the row's start, in order, and padding behind them.
        order = np.argsort(self.attention_mask == 0, axis=1, kind="stable")
        state = start(
            self.model,
            np.take_along_axis(self.input_ids, order, axis=1),
            self.lengths,
            max_new_tokens=self.config.max_new_tokens,
            settings=self.settings,
            rng=jax.random.key(self.config.seed),
            experts=self.experts,
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


def _by_column(state: State, attention_mask: Ints, first: Ints, new: int) -> jax.Array | None:
    """Scalings by column of the prompts as given, from scalings by position."""
    if state.recorded is None:
        return None
    columns = first[:, None] + np.arange(new - 1)
    position = np.concatenate([np.maximum(np.cumsum(attention_mask != 0, axis=1) - 1, 0), columns], axis=1)
    there = np.concatenate([attention_mask != 0, columns < np.array(state.length)[:, None]], axis=1)
    scalings = jnp.take_along_axis(state.recorded, jnp.asarray(position)[:, :, None, None], axis=1)
    return jnp.where(jnp.asarray(there)[:, :, None, None], scalings, 0)
