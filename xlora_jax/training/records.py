"""Records from files: JSON lines, JSON, CSV, plain text, Parquet, HF datasets. Errors name a record's file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["BadRecords", "Record", "RecordError", "Records", "is_data", "read_records"]

Record = Mapping[str, Any]

_COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# CSV columns that contain JSON. An empty cell means that the record has no such field.
_JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")
_LISTED = 5


# Longest message of an error: names in a file can be of any length.
_MOST = 4000


class RecordError(ValueError):
    """A record that cannot be learned.

    The message begins with its file and line, or its index, and names the field. An overlong message is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _MOST else message[:_MOST] + "...")


@dataclass
class BadRecords:
    """Counter of a run's bad records, which are left out up to a limit.

    Attributes:
        allowed: number of bad records to leave out; the next one is an error.
        count: number of records left out so far.
        messages: texts of the first few errors.
    """

    allowed: int = 0
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Validate the limit."""
        if self.allowed < 0:
            raise ValueError(f"--skip-bad-records: expected 0 or more, got {self.allowed}")

    def add(self, error: RecordError) -> None:
        """Count a bad record.

        Raises:
            RecordError: there are more than ``allowed``.
        """
        if self.count >= self.allowed:
            if not self.allowed:
                raise error
            raise RecordError(
                f"{error} (before it {self.count} bad records were left out, as many as --skip-bad-records allows)"
            ) from error
        self.count += 1
        if len(self.messages) < _LISTED:
            self.messages.append(str(error))

    def warn(self) -> None:
        """Give one warning for all bad records so far, with their number and the first few."""
        if self.count:
            more = self.count - len(self.messages)
            warnings.warn(
                f"{self.count} bad records were left out: {'; '.join(self.messages)}"
                + (f"; and {more} more" if more else ""),
                stacklevel=2,
            )


class Records(list[Record]):
    """A list of records that knows where each came from."""

    def __init__(
        self,
        records: Iterable[Record] = (),
        *,
        source: str | None = None,
        unit: str = "record",
        numbers: list[int] | None = None,
    ) -> None:
        """Keep the records.

        Args:
            records: iterable of records.
            source: name of the file or data set; None if the records did not come from one.
            unit: noun before a record's number, such as "line".
            numbers: number of each record; default its index, from 0.
        """
        super().__init__(records)
        self._source, self._unit, self._numbers = source, unit, numbers

    def place(self, index: int) -> str:
        """Return the place of a record, for errors: ``data.jsonl, line 3``."""
        number = index if self._numbers is None else self._numbers[index]
        at = f"{self._unit} {number}"
        return at if self._source is None else f"{self._source}, {at}"

    def select(self, indices: Sequence[int]) -> Records:
        """Return the records with these indices."""
        numbers = [index if self._numbers is None else self._numbers[index] for index in indices]
        return Records((self[index] for index in indices), source=self._source, unit=self._unit, numbers=numbers)


def is_data(path: str | Path) -> bool:
    """Return whether a path has the name of a data file, or is a directory that HF ``datasets`` wrote."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    return _kind(path)[0] in _READERS and path.name not in ("config.json", "adapter_config.json", "xlora_config.json")


def read_records(source: str | Path | Iterable[Record], bad: BadRecords | None = None) -> Records:
    """Read records.

    Args:
        source: one of these:

            - a file: ``.jsonl`` or ``.ndjson`` (one JSON object per line), ``.json`` (an array, one object, or one
              object per line), ``.csv`` or ``.tsv`` (with a header), ``.txt`` (one document), ``.parquet`` or
              ``.arrow``; a text file may also be compressed, with the added ending ``.gz``, ``.bz2`` or ``.xz``
            - a directory: written by ``save_to_disk`` of HF ``datasets``, or with data files
            - a data set on the hub: ``NAME`` or ``NAME:SPLIT``
            - the records themselves: a list, or a ``datasets.Dataset``
        bad: counter of bad lines; by default the first one is an error.

    Raises:
        RecordError: a line is not a JSON object.
        ValueError: the source is empty, damaged, of an unknown kind, or neither UTF-8 nor UTF-16.
        ImportError: the source needs the ``datasets`` library, which is missing.
    """
    bad = BadRecords() if bad is None else bad
    if not isinstance(source, str | Path):
        records = Records(source)
        if type(source).__module__.partition(".")[0] == "datasets":
            records = Records(_without_nulls(records), unit="index")
    else:
        records = _read(str(source), bad)
    if not records:
        raise ValueError(f"{source if isinstance(source, str | Path) else 'the data'}: expected records, got none")
    return records


def _read(source: str, bad: BadRecords) -> Records:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_directory(path)
    kind, _ = _kind(path)
    if path.exists():
        if kind not in _READERS:
            raise ValueError(
                f"{path}: expected a file named {', '.join(_READERS)} (text files also with {', '.join(_COMPRESSED)} "
                f"behind it), or a directory written by datasets' save_to_disk; got the ending {kind!r}"
            )
        return _READERS[kind](path, bad)
    if kind not in _READERS and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.\[\]%+-]+)?", source):
        return _read_named(source)
    raise ValueError(f"{path}: expected a file or directory of records; there is nothing of this name")


def _kind(path: Path) -> tuple[str, str]:
    """Return a file name's ending for the kind of data, and its ending for the compression or ''."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed; errors inside the block become errors that name the file."""
    _, compression = _kind(path)
    try:
        with _COMPRESSED.get(compression, open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole {compression} file, got a damaged one ({error})") from error
    except OSError as error:
        if compression and error.errno is None:
            raise ValueError(f"{path}: expected a {compression} file, got other bytes ({error})") from error
        raise


def _encoding(file: Any) -> str:
    """Detect the encoding from the first bytes: UTF-8 with or without a byte order mark, UTF-16, UTF-32."""
    head: bytes = file.peek(4)[:4]
    return json.detect_encoding(head)


def _decode(data: bytes, encoding: str, path: Path, line: int = 1) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise RecordError(
            f"{path}, line {line}: expected UTF-8 (or UTF-16 with a byte order mark), got bytes that are not "
            f"{encoding.upper()} ({error.reason}); convert the file to UTF-8"
        ) from error
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise RecordError(
            f"{path}, line {line}: expected text, got a NUL character; if the file is UTF-16, convert it to UTF-8"
        )
    return text


def _text_of(path: Path) -> str:
    with _opened(path) as file:
        encoding = _encoding(file)
        return _decode(file.read(), encoding, path)


def _lines(path: Path) -> Iterator[tuple[int, str | RecordError]]:
    """Yield each line that is not blank, with its number; only line feeds end lines, as in the JSON Lines format."""
    with _opened(path) as file:
        encoding = _encoding(file)
        if not encoding.startswith("utf-8"):
            yield from enumerate(_decode(file.read(), encoding, path).split("\n"), 1)
            return
        for number, line in enumerate(file, 1):
            try:
                yield number, _decode(line, encoding if number == 1 else "utf-8", path, number)
            except RecordError as error:
                yield number, error


def _read_lines(path: Path, bad: BadRecords) -> Records:
    found: list[Record] = []
    numbers: list[int] = []
    for number, line in _lines(path):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            if isinstance(line, RecordError):
                raise line
            found.append(_object(line, f"{path}, line {number}", "one JSON object per line"))
            numbers.append(number)
        except RecordError as error:
            bad.add(error)
    return Records(found, source=str(path), unit="line", numbers=numbers)


def _object(text: str, place: str, expected: str) -> Record:
    return _checked(_parse(text, place, expected), place)


def _parse(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise RecordError(f"{place}: expected {expected}, got JSON that is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise RecordError(f"{place}: expected {expected}, got {error}") from error
    except ValueError:
        # The number has more digits than Python reads. As infinity it is an error if its field is used.
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else math.inf)


def _checked(record: Any, place: str) -> Record:
    if not isinstance(record, dict):
        raise RecordError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return record


def _read_json(path: Path, bad: BadRecords) -> Records:
    """Read an array of records, one record, or one record per line, since such files are often named ``.json`` too."""
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        try:
            return Records([_checked(json.loads(text), str(path))], source=str(path), unit="index")
        except (ValueError, RecursionError):
            return _read_lines(path, bad)
    found: list[Record] = []
    numbers: list[int] = []
    for number, record in enumerate(_parse(text, str(path), "a JSON array of objects")):
        try:
            found.append(_checked(record, f"{path}, index {number}"))
            numbers.append(number)
        except RecordError as error:
            bad.add(error)
    return Records(found, source=str(path), unit="index", numbers=numbers)


def _read_text(path: Path, bad: BadRecords) -> Records:
    return Records(
        [{"text": _text_of(path).replace("\r\n", "\n").replace("\r", "\n")}], source=str(path), unit="document"
    )


_FIELD_LIMIT = threading.Lock()


def _read_csv(path: Path, bad: BadRecords) -> Records:
    """Read a table with a header. Every cell is text, even if it looks like a number."""
    found: list[Record] = []
    numbers: list[int] = []
    delimiter = "\t" if _kind(path)[0] == ".tsv" else ","
    with _FIELD_LIMIT:
        limit = csv.field_size_limit(2**31 - 1)
        line = 1
        try:
            rows = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True, delimiter=delimiter)
            line = 2
            for row in rows:
                try:
                    found.append(_checked_row(row, f"{path}, line {line}"))
                    numbers.append(line)
                except RecordError as error:
                    bad.add(error)
                line = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: expected a table in CSV, got {error}") from error
        finally:
            csv.field_size_limit(limit)
    return Records(found, source=str(path), unit="line", numbers=numbers)


def _checked_row(row: dict[Any, Any], place: str) -> Record:
    if None in row or None in row.values():
        filled = sum(value is not None for name, value in row.items() if name is not None) + len(row.get(None) or ())
        raise RecordError(f"{place}: expected {len([n for n in row if n is not None])} cells, got {filled}")
    return {name: None if value == "" and name in _JSON_COLUMNS else value for name, value in row.items()}


def _datasets(source: str | Path) -> Any:
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"{source}: needs the datasets library: pip install 'xlora-jax[data]', or export the data as JSON lines"
        ) from error
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_parquet(path: Path, bad: BadRecords) -> Records:
    datasets = _datasets(path)
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            if path.suffix.lower() == ".arrow":
                found = datasets.Dataset.from_file(str(path))
            else:
                found = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return Records(_without_nulls(found), source=str(path), unit="index")
        except Exception as error:  # the libraries have many error classes of their own
            cause = error.__cause__ or error
            raise ValueError(f"{path}: expected a {path.suffix} file, got {type(cause).__name__}: {cause}") from error


def _read_directory(path: Path) -> Records:
    datasets = _datasets(path)
    if is_data(path):
        with _quiet(datasets):
            return _one_split(datasets, datasets.load_from_disk(str(path)), str(path), "/")
    return _load(datasets, str(path), None)


def _read_named(source: str) -> Records:
    name, _, split = source.partition(":")
    return _load(_datasets(source), name, split or None)


def _load(datasets: Any, name: str, split: str | None) -> Records:
    try:
        with _quiet(datasets):
            found = datasets.load_dataset(name, split=split)
    except Exception as error:  # errors of the network, the hub or any file format
        raise ValueError(
            f"{name}: expected a file or directory of records, or a data set on the hub; there is no such file, and "
            f"datasets.load_dataset says: {type(error).__name__}: {error}"
        ) from error
    return _one_split(datasets, found, name, ":")


def _one_split(datasets: Any, found: Any, source: str, separator: str) -> Records:
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1:
            choices = ", ".join(f"{source}{separator}{split}" for split in found)
            raise ValueError(f"{source}: expected one dataset, got the splits {', '.join(found)}; give {choices}")
        (found,) = found.values()
    return Records(_without_nulls(found), source=source, unit="index")


def _without_nulls(records: Iterable[Record]) -> Iterator[Record]:
    """Leave out nulls inside records: Arrow gives every object the keys of all others, with null for those it lacks."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [kept(inner) for inner in value]
        return value

    return ({name: kept(value) for name, value in record.items()} for record in records)


_READERS: Mapping[str, Callable[[Path, BadRecords], Records]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_parquet,
}
