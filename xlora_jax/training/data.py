"""Convert records to tokens and rows of fixed length, and load them in deterministic, sharded batches.

:mod:`xlora_jax.training.records` reads records, and :mod:`xlora_jax.training.chats` finds their texts and answers.
Tokenizers come in as functions (:class:`Codec`): nothing here depends on a tokenizer library.

Rows are laid out once, before training, so a row is the same in every epoch. Its scaling pass can then be cached, and
the loader's position is one number. Axes: B rows, T tokens.
"""

from __future__ import annotations

import bisect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlora_jax.token_ids import check_token_ids
from xlora_jax.training.chats import REASONING, Chat, Render, answers_of, chat_of, form_of, text_of
from xlora_jax.training.losses import IGNORED_LABEL
from xlora_jax.training.records import BadRecords, Record, RecordError, Records, read_records

__all__ = ["Codec", "Document", "Loader", "Rows", "encode_record", "encode_records", "lay_out", "read_records"]

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Codec:
    """A tokenizer, as functions.

    Attributes:
        encode: function ``(text, start) -> (ids, first)``: token ids without special tokens, and the index of the first
            token with a character, or part of one, at or after ``start``.
        bos: id of the token that starts a document, or None.
        eos: id of the token that ends a document or an answer, or None.
        chat: function that renders the chat template; None if there is no template.
        reads: function that tells whether the chat template reads a variable or key of this name.
        decode: function from token ids to text, special tokens included.
    """

    encode: Callable[[str, int], tuple[Sequence[int], int]]
    bos: int | None = None
    eos: int | None = None
    chat: Render | None = None
    reads: Callable[[str], bool] = lambda name: True
    decode: Callable[[Sequence[int]], str] | None = None


@dataclass(frozen=True)
class Document:
    """Tokens to learn from, all in one context.

    Attributes:
        ids: int32 ``[n]``.
        learned: bool ``[n]``, whether a token is to be predicted.
        divisible: whether a long document continues in the next row (plain text), or is cut off (an answer).
    """

    ids: Ints
    learned: NDArray[np.bool_]
    divisible: bool


def encode_record(record: Record, codec: Codec, place: str = "record") -> list[Document]:
    """Tokenize one record.

    A chat becomes one document if this contains every answer in the context in which the model would generate it.
    Otherwise it becomes several documents, at most one per answer.

    Args:
        record: mapping of field names to values.
        codec: tokenizer functions.
        place: location of the record, for errors.

    Raises:
        RecordError: a field has an unclear meaning, or the chat template cannot write the messages.
    """
    return _documents(record, codec, place, Counter())


def _documents(record: Record, codec: Codec, place: str, unread: Counter[str]) -> list[Document]:
    """Tokenize a record, and count in ``unread`` its variables that the template does not read."""
    try:
        return _documents_of(record, codec, place, unread)
    except RecursionError as error:
        raise RecordError(f"{place}: expected a record, got values that are nested too deeply") from error


def _documents_of(record: Record, codec: Codec, place: str, unread: Counter[str]) -> list[Document]:
    form = form_of(record, place)
    if form == "text":
        return [_with_ends(text_of(record, "text", place), 0, codec, place, divisible=True)]
    if form == "prompt" and isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        prompt, completion = text_of(record, "prompt", place), text_of(record, "completion", place)
        return [_with_ends(prompt + completion, len(prompt), codec, place, divisible=False)]
    chat = chat_of(record, form, place)
    if codec.chat is None:
        raise RecordError(
            f"{place}: {form}: the tokenizer has no chat template; use prompt and completion as text, or a tokenizer "
            f"with a chat_template"
        )
    unread.update(_unread(chat, codec, place))
    documents: list[Document] = []
    for answer in answers_of(chat, codec.chat, place):
        ids, first = _encode(codec, answer.text, answer.start, place)
        document = _document(ids, first, divisible=False)
        for number, earlier in enumerate(documents):
            # This document begins with an earlier one, whose answers have the same context in both.
            size = len(earlier.ids)
            if np.array_equal(document.ids[:size], earlier.ids):
                document.learned[:size] |= earlier.learned
                documents[number] = document
                break
        else:
            documents.append(document)
    return documents or [_document([], 0, divisible=False)]


def _unread(chat: Chat, codec: Codec, place: str) -> set[str]:
    """Return the names of a chat's variables and keys that the template does not read.

    Raises:
        RecordError: part of an answer would be lost.
    """
    unread = {name for name in (*chat.options, *(["tools"] if chat.tools else [])) if not codec.reads(name)}
    for name, message in zip(chat.names, chat.messages, strict=True):
        thoughts = [field for field in REASONING if field in message]
        if thoughts and not any(codec.reads(field) for field in REASONING):
            unread.add(thoughts[0])
        else:
            thoughts = []
        if "tool_calls" in message and not codec.reads("tool_calls"):
            lost = "tool_calls"
        elif thoughts and not message.get("content") and "tool_calls" not in message:
            lost = thoughts[0]
        else:
            continue
        raise RecordError(
            f"{place}: {name}.{lost}: the chat template does not write {lost}; write it into content as the model is "
            f"to generate it, or use a tokenizer whose template does"
        )
    return unread


def _with_ends(text: str, start: int, codec: Codec, place: str, *, divisible: bool) -> Document:
    """Encode a text, and add the tokens that begin and end a document unless it already has them."""
    ids, first = _encode(codec, text, start, place)
    if codec.bos is not None and ids[:1] != [codec.bos]:
        ids, first = [codec.bos, *ids], first + (not divisible)
    if codec.eos is not None and (ids[-1:] != [codec.eos] or len(ids) <= first):
        ids.append(codec.eos)
    return _document(ids, first, divisible=divisible)


def _encode(codec: Codec, text: str, start: int, place: str) -> tuple[list[int], int]:
    try:
        ids, first = codec.encode(text, start)
    except ValueError as error:
        raise RecordError(f"{place}: {error}") from error
    return list(ids), first


def _document(ids: Sequence[int], first: int, *, divisible: bool) -> Document:
    return Document(np.asarray(ids, np.int32), np.arange(len(ids)) >= first, divisible)


def encode_records(records: Iterable[Record], codec: Codec, bad: BadRecords | None = None) -> list[Document]:
    """Tokenize records.

    Args:
        records: iterable of records; those of :func:`read_records` know their files and lines, for errors.
        codec: tokenizer functions.
        bad: counter of bad records; by default the first one is an error.

    Raises:
        RecordError: there are more bad records than ``bad`` allows.
    """
    bad = BadRecords() if bad is None else bad
    documents: list[Document] = []
    unread: Counter[str] = Counter()
    for number, record in enumerate(records):
        place = records.place(number) if isinstance(records, Records) else f"record {number}"
        try:
            documents += _documents(record, codec, place, unread)
        except RecordError as error:
            bad.add(error)
    if unread:
        listed = ", ".join(f"{name} (in {count} records)" for name, count in unread.items())
        warnings.warn(f"the chat template does not read {listed}: as in generation, these have no effect", stacklevel=2)
    return documents


@dataclass(frozen=True)
class Rows:
    """Rows of fixed length, with random access.

    Attributes:
        arrays: mapping with ``input_ids`` and ``labels``, int32 ``[rows, T]``. Packed rows also have ``positions``,
            counted from each document's start, and ``segment_ids``: 1, 2, ... in each row, 0 at padding.
        cut: number of documents whose end did not fit.
        dropped: number of documents left out because they have no token to learn.
        lengths: int32 ``[rows]``, number of tokens in each row; None if all rows are full.
    """

    arrays: Mapping[str, Ints]
    cut: int = 0
    dropped: int = 0
    lengths: Ints | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.arrays["input_ids"])

    def __getitem__(self, row: Any) -> dict[str, Any]:
        """Return one row, and its index as ``row``."""
        return {**{name: array[row] for name, array in self.arrays.items()}, "row": np.int32(row)}

    def count(self, rows: NDArray[np.int32] | None = None) -> int:
        """Return the number of tokens, learned or not, in the rows with these indices, or in all rows."""
        if self.lengths is None:
            return int(self.arrays["input_ids"].shape[1] * (len(self) if rows is None else np.size(rows)))
        return int(self.lengths[slice(None) if rows is None else rows].sum())

    @property
    def fill(self) -> float:
        """Return the share of positions that have a token rather than padding."""
        return self.count() / self.arrays["input_ids"].size

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Check every token id and every label against a vocabulary; None checks nothing.

        Raises:
            ValueError: an id is negative, or ``vocab_size`` or more; the message gives its place.
        """
        check_token_ids(self.arrays["input_ids"], vocab_size, "rows, input_ids")
        check_token_ids(self.arrays["labels"], vocab_size, "rows, labels", ignored=IGNORED_LABEL)

    @classmethod
    def from_tokens(cls, input_ids: NDArray[Any], labels: NDArray[Any] | None = None) -> Rows:
        """Make rows from token ids ``[rows, T]``; without labels every token is learned."""
        ids = np.asarray(input_ids, np.int32)
        return cls({"input_ids": ids, "labels": ids.copy() if labels is None else np.asarray(labels, np.int32)})


def lay_out(documents: Iterable[Document], length: int, *, pack: bool = True) -> Rows:
    """Arrange documents in rows of ``length`` tokens.

    Plain text longer than a row continues in the next row. An answer that does not fit is cut off. With ``pack``,
    several documents share a row (best fit, longest first), and ``segment_ids`` and ``positions`` keep them apart.
    Without ``pack``, each document has its own row, padded on the right; causal attention needs no mask for that.

    Raises:
        ValueError: ``length`` is below 2, or no document has a token to learn.
    """
    if length < 2:
        raise ValueError(f"row length: expected at least 2 tokens, got {length}")
    pieces: list[Document] = []
    cut = dropped = 0
    for document in documents:
        parts = [
            Document(document.ids[at : at + length], document.learned[at : at + length], document.divisible)
            for at in range(0, max(len(document.ids), 1), length)
        ]
        if len(parts) > 1 and not document.divisible:
            cut += 1
            parts = parts[:1]
        # No token precedes the first token of a piece, so it is not predicted.
        kept = [part for part in parts if part.learned[1:].any()]
        dropped += not kept
        pieces += kept
    if not pieces:
        raise ValueError(f"nothing to learn: no document has an answer within the first {length} tokens")
    bins = _best_fit([len(piece.ids) for piece in pieces], length) if pack else [[i] for i in range(len(pieces))]
    shape = (len(bins), length)
    arrays = {
        "input_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORED_LABEL, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    lengths = np.array([sum(len(pieces[member].ids) for member in members) for members in bins], np.int32)
    for row, members in enumerate(bins):
        at = 0
        for segment, member in enumerate(members, 1):
            piece = pieces[member]
            here = (row, slice(at, at + len(piece.ids)))
            arrays["input_ids"][here] = piece.ids
            arrays["labels"][here] = np.where(piece.learned, piece.ids, IGNORED_LABEL)
            arrays["labels"][row, at] = IGNORED_LABEL
            arrays["positions"][here] = np.arange(len(piece.ids))
            arrays["segment_ids"][here] = segment
            at += len(piece.ids)
    if not pack:
        del arrays["positions"], arrays["segment_ids"]
    return Rows(arrays, cut, dropped, lengths)


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sizes over bins, largest first, each into the fullest bin that has room; return indices by bin."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    for member in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(room, (sizes[member], -1))
        if place == len(room):
            bins.append([member])
            left, chosen = capacity - sizes[member], len(bins) - 1
        else:
            left, chosen = room.pop(place)
            left -= sizes[member]
            bins[chosen].append(member)
        if left:
            bisect.insort(room, (left, chosen))
    return bins


class _Share:
    """One process's rows of a sequence that is cut into batches: a contiguous part of each batch.

    So the global batch has the same rows in the same order as with a single process. Random numbers that depend on the
    position in the batch (dropout) stay the same.
    """

    def __init__(self, rows: Any, batch_size: int, process_index: int, process_count: int) -> None:
        self._rows, self._batch = rows, batch_size
        self._own = batch_size // process_count
        self._first = process_index * self._own

    def __len__(self) -> int:
        # The rows repeat forever. grain represents this by the largest possible length, and still adds to it.
        return int(min(len(self._rows), sys.maxsize // 2) // self._batch * self._own)

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, self._own)
        return self._rows[batch * self._batch + self._first + place]


class Loader:
    """Endless batches of rows, shuffled anew every epoch: a ``grain`` pipeline.

    The batches depend on the seed, not on the number of processes. The loader's position is one number, the same on all
    processes. So training can resume on another mesh.

    Attributes:
        rows: source of the batches.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        accumulate: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 1,
    ) -> None:
        """Start at the first batch.

        Args:
            rows: source of the batches.
            batch_size: number of rows per micro-batch, over all processes.
            seed: random seed of the order.
            accumulate: number of micro-batches per step; above 1 every array has a leading A axis of this size.
            process_index: index of this process.
            process_count: number of processes.
            threads: number of threads that read ahead.

        Raises:
            ValueError: the batch can't be divided among the processes, or is larger than the data.
        """
        import grain

        if batch_size % process_count:
            raise ValueError(f"batch of {batch_size} rows: expected a multiple of the {process_count} processes")
        if batch_size * accumulate > len(rows):
            raise ValueError(
                f"a step takes {batch_size} x {accumulate} rows, but the data has {len(rows)}: use a smaller batch or "
                f"shorter rows"
            )
        self._accumulate = accumulate
        self.rows = rows
        shuffled = grain.MapDataset.source(rows).shuffle(seed=seed).repeat()
        dataset = grain.MapDataset.source(_Share(shuffled, batch_size, process_index, process_count))
        dataset = dataset.batch(batch_size // process_count * accumulate)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Return itself."""
        return self

    def __next__(self) -> dict[str, NDArray[Any]]:
        """Return this process's part of the next batch, ``[B, T]`` or ``[A, B, T]``, and ``row [B]`` or ``[A, B]``."""
        batch: dict[str, NDArray[Any]] = next(self._iterator)
        if self._accumulate > 1:
            batch = {k: v.reshape(self._accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the loader's position, as JSON values."""
        return dict(self._iterator.get_state())

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to the position that :meth:`get_state` returned."""
        self._iterator.set_state(dict(state))
