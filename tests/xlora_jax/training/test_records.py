"""Records from files of every kind, with the places that errors name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys

import datasets
import pytest

from xlora_jax.training.data import Codec, encode_records
from xlora_jax.training.records import BadRecords, RecordError, is_data, read_records

CHAT = [{"role": "user", "content": "grüß, 日本 \u2028 \x85 x"}, {"role": "assistant", "content": "\n\nyes"}]
RECORDS = [{"text": 'a, "b"\nc'}, {"prompt": "", "completion": "5"}, {"messages": CHAT}]


def lines(records=RECORDS, ascii_only=False):
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)


def plain(records):
    return [{name: value for name, value in record.items() if value is not None} for record in records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL", "array.json", "array.json.gz", "a.jsonl.gz"]
)
def test_json_in_any_unicode(tmp_path, name, encoding):
    text = json.dumps(RECORDS, ensure_ascii=False, indent=1) if name.startswith("array") else lines()
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_records(tmp_path / name) == RECORDS


@pytest.mark.parametrize("compress", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files_and_damaged_ones(tmp_path, compress):
    ending, function = compress
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(function(lines().encode()))
    assert read_records(str(path)) == RECORDS
    path.write_bytes(function(lines(RECORDS * 5000).encode())[:-9])
    with pytest.raises(ValueError, match=rf"a\.jsonl\{ending}: expected a whole \{ending} file, got a damaged one"):
        read_records(path)
    path.write_bytes(lines().encode())
    with pytest.raises(ValueError, match=rf"a\.jsonl\{ending}: expected a"):
        read_records(path)


def test_line_ends(tmp_path):
    """Only line feeds end lines: U+2028, U+0085 and form feeds stand in texts."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\r\n\n" + lines().replace("\n", "\r\n") + "  \n").encode())
    records = read_records(path)
    assert records == RECORDS
    assert [records.place(number) for number in range(3)] == [f"{path}, line {line}" for line in (3, 4, 5)]
    text = tmp_path / "b.txt"
    text.write_bytes("a\r\nb\u2028c\x0c\x85\rd".encode("utf-8-sig"))
    assert read_records(text) == [{"text": "a\nb\u2028c\x0c\x85\nd"}]
    text.write_bytes("a\r\nb".encode("utf-16"))
    assert read_records(text) == [{"text": "a\nb"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_tables(tmp_path, name):
    """Cells are text, whatever they look like, and may have any length."""
    path = tmp_path / name
    long = "x" * 200_000
    rows = [
        {"prompt": "5", "completion": "NA", "messages": ""},
        {"prompt": "", "completion": 'a "b", c\nd\te', "messages": ""},
        {"prompt": "1e5", "completion": long, "messages": json.dumps(CHAT)},
    ]
    limit = csv.field_size_limit()
    with (gzip.open if name.endswith(".gz") else open)(path, "wt", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
    records = read_records(path)
    assert plain(records) == [{n: v for n, v in row.items() if v or n != "messages"} for row in rows]
    assert [records.place(number).rpartition(", ")[2] for number in range(3)] == ["line 2", "line 3", "line 5"]
    assert csv.field_size_limit() == limit


def test_tables_with_wrong_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nc\nd,e,f\ng,h\n")
    for line, got in ((3, 1), (4, 3)):
        bad = BadRecords(line - 3)
        with pytest.raises(RecordError, match=rf"a\.csv, line {line}: expected 2 cells, got {got}"):
            read_records(path, bad)
    bad = BadRecords(2)
    records = read_records(path, bad)
    assert [record["prompt"] for record in records] == ["a", "g"]
    assert [records.place(number) for number in range(2)] == [f"{path}, line 2", f"{path}, line 5"]
    path.write_text('prompt,completion\na,"b\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 2: expected a table in CSV"):
        read_records(path)


# What Arrow adds to each object, the keys of the others with null, is not in the records.
ARROW = [
    {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{"function": {"a": 1, "b": None}}]}]},
    {"messages": CHAT},
]
PRUNED = [
    {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"a": 1}}]}]},
    {"messages": CHAT},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "disk", "dict", "dataset", "folder"])
def test_hf_datasets(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = datasets.Dataset.from_list(ARROW)
    source = tmp_path / "set"
    if kind == "parquet":
        source = tmp_path / "a.parquet"
        dataset.to_parquet(source)
    elif kind == "arrow":
        dataset.save_to_disk(source)
        source = next(source.glob("*.arrow"))
    elif kind == "disk":
        dataset.save_to_disk(source)
    elif kind == "dict":
        datasets.DatasetDict({"only": dataset}).save_to_disk(source)
    elif kind == "folder":
        source.mkdir()
        dataset.to_parquet(source / "part-0.parquet")
    else:
        source = dataset
    records = read_records(source)
    assert plain(records) == PRUNED
    assert records.place(1).endswith("index 1")
    if kind != "dataset":
        assert records.place(1).startswith(str(source))


def test_several_splits(tmp_path):
    dataset = datasets.Dataset.from_list(ARROW)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set: expected one dataset, got the splits train, test; give \S*set/train, "):
        read_records(tmp_path / "set")
    assert len(read_records(tmp_path / "set" / "train")) == 2


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a \.parquet file, got"):
        read_records(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    for source, reason in (
        (tmp_path / "none.jsonl", "there is nothing of this name"),
        ("nobody/nothing", "nobody/nothing: expected .* data set on the hub; .*load_dataset says"),
        (tmp_path / "empty", "empty: expected a file or directory of records"),
        ([], "the data: expected records, got none"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_records(source)


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert read_records(tmp_path / "a.jsonl") == RECORDS
    assert read_records(tmp_path / "a.csv") == [{"text": "x"}]
    assert read_records(RECORDS) == RECORDS
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in (tmp_path / "a.parquet", tmp_path, "org/name", "org/name:test"):
        with pytest.raises(ImportError, match=r"needs the datasets library: pip install 'xlora-jax\[data\]'"):
            read_records(source)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "expected one JSON object per line, got Expecting value"),
        (b'{"text": "a"} x', "expected one JSON object per line, got Extra data"),
        (b"[" * 100_000, "expected one JSON object per line, got JSON that is nested too deeply"),
        (b'["text"]', "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"text": "gr\xfc\xdf"}', "expected UTF-8 .*, got bytes that are not UTF-8"),
        (b'{"text": "a\0b"}', "expected text, got a NUL character"),
        (b"\xef\xbb\xbf{}", "expected one JSON object per line, got Unexpected UTF-8 BOM"),
    ],
)
def test_bad_lines(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(RecordError, match=rf"a\.jsonl, line 2: {reason}"):
        read_records(path)
    bad = BadRecords(1)
    records = read_records(path, bad)
    assert [record["text"] for record in records] == ["one", "three"]
    assert records.place(1) == f"{path}, line 3"
    assert bad.count == 1
    path.write_bytes(b" \n" + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: expected records, got none"):
        read_records(path, BadRecords(1))


def test_numbers_beyond_measure(tmp_path):
    """They are no error of the line, but of the field that is read."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": ' + "9" * 5000 + ', "text": "one"}\n{"text": ' + "9" * 5000 + "}\n")
    records = read_records(path)
    assert records[0]["text"] == "one"
    with pytest.raises(RecordError, match=r"a\.jsonl, line 2: text: expected text, got 'inf' \(float\)"):
        encode_records(records, Codec(lambda text, start: ([], 0)))


def test_bad_arrays_and_texts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 5, {"text": "b"}]')
    with pytest.raises(RecordError, match=r"a\.json, index 1: expected a JSON object, got int"):
        read_records(path)
    records = read_records(path, BadRecords(1))
    assert (len(records), records.place(1)) == (2, f"{path}, index 2")
    for text, reason in (
        ('[{"text": "a"},\n {"text": ]', "expected a JSON array of objects, got Expecting value: line 2"),
        ("[" * 100_000, "expected a JSON array of objects, got JSON that is nested too deeply"),
        ('{"text": "a"}\n{"text": \n', "line 2: expected one JSON object per line"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=rf"a\.json(:|,) {reason}"):
            read_records(path)
    for data, reason in ((b"a\nb\n\xff", "line 3: expected UTF-8"), (b"ab\nc\0d", "line 2: expected text, got a NUL")):
        (tmp_path / "b.txt").write_bytes(data)
        with pytest.raises(ValueError, match=rf"b\.txt, {reason}"):
            read_records(tmp_path / "b.txt")


def test_paths_that_are_data(tmp_path):
    datasets.Dataset.from_list(ARROW).save_to_disk(tmp_path / "set")
    for name in ("a.jsonl", "a.json.gz", "A.CSV", "b.txt", "c.parquet", tmp_path / "set"):
        assert is_data(name)
    for name in (tmp_path, "org/name", "base/config.json", "x/adapter_config.json", "model.safetensors", "a.gz"):
        assert not is_data(name)
