"""From texts to batches: records, tokens, rows of fixed length, and a deterministic, sharded, checkpointable loader.

A record is a mapping with ``messages`` (chat: ``[{"role", "content"}, ...]``), or ``prompt`` and ``completion``, or
``text``. In the first two the answers alone are learnt. Tokenizers come in as functions (:class:`Codec`): nothing here
knows whose they are.

Rows are laid out once, before training, so that a row is the same in every epoch: what the scaling pass gives for it
can be kept, and where the loader stands is one number. Axes: B rows, T tokens.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from xlora_jax.training.losses import IGNORED_LABEL

__all__ = ["Codec", "Document", "Loader", "Rows", "encode_record", "encode_records", "lay_out", "read_records"]

Ints = NDArray[np.int32]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Codec:
    """A tokenizer, as functions.

    Attributes:
        encode: text to token ids, without special tokens.
        bos: token that starts a document, or None.
        eos: token that ends a document or an answer, or None.
        chat: ``(messages, answer_follows) -> ids``, the chat template; with ``answer_follows`` up to where the
            assistant's next answer begins. None where there is no template.
    """

    encode: Callable[[str], Sequence[int]]
    bos: int | None = None
    eos: int | None = None
    chat: Callable[[Sequence[Mapping[str, str]], bool], Sequence[int]] | None = None


@dataclass(frozen=True)
class Document:
    """Tokens of one record.

    Attributes:
        ids: int32 ``[n]``.
        learnt: bool ``[n]``, whether a token is to be predicted.
        divisible: whether a long one may go on in the next row (plain text), or is cut off (an answer).
    """

    ids: Ints
    learnt: NDArray[np.bool_]
    divisible: bool


def read_records(source: str | Path | Iterable[Record]) -> Sequence[Record]:
    """Read records.

    Args:
        source: a ``.jsonl`` file (one record per line), a ``.txt`` file (one document), a directory written by
            ``datasets.Dataset.save_to_disk``, or records: a list, a ``datasets.Dataset``.

    Raises:
        ValueError: a line that is not a JSON object, an empty source, a file of another kind.
    """
    if not isinstance(source, str | Path):
        records = cast(Sequence[Record], source if isinstance(source, Sequence) else list(source))
    else:
        path = Path(source)
        if not path.exists():
            raise ValueError(f"{path}: expected a file or directory of records; there is nothing of this name")
        if path.suffix == ".jsonl":
            records = [_parse(line, path, number) for number, line in enumerate(_lines(path), 1) if line.strip()]
        elif path.suffix == ".txt":
            records = [{"text": path.read_text(encoding="utf-8")}]
        elif path.is_dir() and (path / "dataset_info.json").exists():
            records = _from_disk(path)
        else:
            raise ValueError(
                f"{path}: expected a .jsonl or .txt file, or a directory written by datasets' save_to_disk"
            )
    if not len(records):
        raise ValueError(f"{source if isinstance(source, str | Path) else 'the data'}: expected records, got none")
    return records


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: expected one JSON object per line, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
    return record


def _from_disk(path: Path) -> Sequence[Record]:
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"{path} is a directory of HF datasets: pip install datasets, or export it as JSONL"
        ) from error
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"{path}: expected one dataset, got a {type(found).__name__}; give one of its splits")
    return list(found)


def encode_record(record: Record, codec: Codec, where: str = "record") -> Document:
    """Tokenize one record.

    Raises:
        ValueError: keys that are not those of a record, or a chat template that can't be followed.
    """
    start = [] if codec.bos is None else [codec.bos]
    end = [] if codec.eos is None else [codec.eos]
    if "messages" in record:
        return _encode_chat(record["messages"], codec, where)
    if "prompt" in record and "completion" in record:
        prompt = start + list(codec.encode(record["prompt"]))
        answer = list(codec.encode(record["completion"])) + end
        return _document(prompt + answer, [False] * len(prompt) + [True] * len(answer), divisible=False)
    if "text" in record:
        ids = start + list(codec.encode(record["text"])) + end
        return _document(ids, [True] * len(ids), divisible=True)
    raise ValueError(
        f"{where}: expected messages, or prompt and completion, or text; got {', '.join(record) or 'none'}"
    )


def _document(ids: Sequence[int], learnt: Sequence[bool], divisible: bool) -> Document:
    return Document(np.asarray(ids, np.int32), np.asarray(learnt, bool), divisible)


def _encode_chat(messages: Sequence[Mapping[str, str]], codec: Codec, where: str) -> Document:
    if codec.chat is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template; use prompt and completion")
    ids: list[int] = []
    learnt: list[bool] = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = list(codec.chat(messages[:number], True))
        after = list(codec.chat(messages[: number + 1], False))
        if before[: len(ids)] != ids or after[: len(before)] != before:
            raise ValueError(
                f"{where}: the chat template writes earlier messages differently once message {number} has been added, "
                f"so its answer can't be told from its prompt; use prompt and completion"
            )
        learnt += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
        ids = after
    return _document(ids, learnt, divisible=False)


def encode_records(records: Iterable[Record], codec: Codec) -> list[Document]:
    """Tokenize records; errors name the record by its number, from 0."""
    return [encode_record(record, codec, f"record {number}") for number, record in enumerate(records)]


@dataclass(frozen=True)
class Rows:
    """Rows of fixed length, a random-access source.

    Attributes:
        arrays: ``input_ids`` and ``labels`` int32 ``[rows, T]``; packed ones also have ``positions`` (from each
            document's start) and ``segment_ids`` (1, 2, ... per row, 0 where there is nothing).
        cut: documents whose end did not fit.
        dropped: documents without a token to learn, which are left out.
    """

    arrays: Mapping[str, Ints]
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.arrays["input_ids"])

    def __getitem__(self, row: Any) -> dict[str, Any]:
        """Return one row, with its number as ``row``."""
        return {**{name: array[row] for name, array in self.arrays.items()}, "row": np.int32(row)}

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        if "segment_ids" in self.arrays:
            return float((self.arrays["segment_ids"] != 0).mean())
        return float((self.arrays["labels"] != IGNORED_LABEL).mean())

    @classmethod
    def from_tokens(cls, input_ids: NDArray[Any], labels: NDArray[Any] | None = None) -> Rows:
        """Rows of tokens ``[rows, T]`` that are there already; without labels every token is learnt."""
        ids = np.asarray(input_ids, np.int32)
        return cls({"input_ids": ids, "labels": ids.copy() if labels is None else np.asarray(labels, np.int32)})


def lay_out(documents: Iterable[Document], length: int, *, pack: bool = True) -> Rows:
    """Lay documents out in rows of ``length`` tokens.

    Plain text longer than a row goes on in the next; an answer that does not fit is cut off. With ``pack`` several
    documents share a row (best fit, longest first), and see themselves only, by ``segment_ids`` and ``positions``.
    Without, each has a row, filled up on the right; causal attention needs no mask for that.

    Raises:
        ValueError: ``length`` below 2, or nothing to learn in any document.
    """
    if length < 2:
        raise ValueError(f"row length: expected at least 2 tokens, got {length}")
    pieces: list[Document] = []
    cut = dropped = 0
    for document in documents:
        parts = [
            Document(document.ids[at : at + length], document.learnt[at : at + length], document.divisible)
            for at in range(0, max(len(document.ids), 1), length)
        ]
        if len(parts) > 1 and not document.divisible:
            cut += 1
            parts = parts[:1]
        # The first token of a piece is predicted from nothing.
        kept = [part for part in parts if part.learnt[1:].any()]
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
    for row, members in enumerate(bins):
        at = 0
        for segment, member in enumerate(members, 1):
            piece = pieces[member]
            here = (row, slice(at, at + len(piece.ids)))
            arrays["input_ids"][here] = piece.ids
            arrays["labels"][here] = np.where(piece.learnt, piece.ids, IGNORED_LABEL)
            arrays["labels"][row, at] = IGNORED_LABEL
            arrays["positions"][here] = np.arange(len(piece.ids))
            arrays["segment_ids"][here] = segment
            at += len(piece.ids)
    if not pack:
        del arrays["positions"], arrays["segment_ids"]
    return Rows(arrays, cut, dropped)


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute numbered sizes over bins, longest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), sorted
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
    """One process's rows of a sequence that is cut into batches, its part of each batch in one piece.

    So the batch of all processes has the rows, and the order, that a single process would give it: what is drawn by
    place in the batch (dropout) stays the same.
    """

    def __init__(self, rows: Any, batch_size: int, process_index: int, process_count: int) -> None:
        self._rows, self._batch = rows, batch_size
        self._own = batch_size // process_count
        self._first = process_index * self._own

    def __len__(self) -> int:
        return int(len(self._rows) // self._batch * self._own)

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, self._own)
        return self._rows[batch * self._batch + self._first + place]


class Loader:
    """Endless batches of rows, shuffled anew every epoch: a ``grain`` pipeline.

    The batches depend on the seed alone, not on the number of processes, and where it stands is one number, the same on
    all of them: so training resumes on another mesh.
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
            rows: what to draw from.
            batch_size: rows per micro-batch, of all processes together.
            seed: of the order.
            accumulate: micro-batches per step; above 1 every array has that axis in front.
            process_index: which process this is.
            process_count: of how many.
            threads: that read ahead.

        Raises:
            ValueError: the batch can't be dealt out, or is larger than the data.
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
        """Return where it stands, as JSON values."""
        return dict(self._iterator.get_state())

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where :meth:`get_state` was taken."""
        self._iterator.set_state(dict(state))
