"""From texts to batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xlora_jax.training.data import Codec, Document, Loader, Rows, encode_record, encode_records, lay_out, read_records

BOS, EOS = 1, 2


def encode(text, start=0):
    return [ord(c) for c in text], start


def written(messages, answer_follows):
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + ("<assistant>" if answer_follows else "")


def chat(conversation, prefixes):
    return [written(conversation.messages[:count], answer_follows) for count, answer_follows in prefixes]


CODEC = Codec(encode, BOS, EOS, chat)


def text_of(ids):
    return "".join(chr(i) for i in ids)


def test_answers_alone_are_learned():
    (document,) = encode_record({"prompt": "ab", "completion": "cd"}, CODEC)
    assert text_of(document.ids[1:-1]) == "abcd"
    assert document.ids[[0, -1]].tolist() == [BOS, EOS]
    assert document.learned.tolist() == [False, False, False, True, True, True]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "unanswered"},
    ]
    (document,) = encode_record({"messages": messages}, CODEC)
    assert text_of(document.ids[document.learned]) == "one</>two</>"
    assert text_of(document.ids).endswith("<assistant>two</>")


def test_text_is_learned_whole():
    (document,) = encode_record({"text": "abc"}, CODEC)
    assert document.ids.tolist() == [BOS, *map(ord, "abc"), EOS]
    assert document.learned.all()
    assert document.divisible


def test_what_is_no_record_is_refused():
    with pytest.raises(ValueError, match="record 1: expected messages, or prompt and completion, or text; got body"):
        encode_records([{"text": "x"}, {"body": "y"}], CODEC)
    with pytest.raises(ValueError, match="no chat template"):
        encode_record({"messages": [{"role": "user", "content": "a"}]}, Codec(encode))


def test_the_ends_of_a_text_are_not_doubled():
    (document,) = encode_record({"text": "\x01abc\x02"}, CODEC)
    assert document.ids.tolist() == [BOS, *map(ord, "abc"), EOS]
    (document,) = encode_record({"prompt": "\x01a\x02", "completion": ""}, CODEC)
    assert document.ids.tolist() == [BOS, ord("a"), EOS, EOS]
    assert document.learned.tolist() == [False, False, False, True]


def test_one_document_per_answer_where_a_template_forgets():
    def forgetful(conversation, prefixes):
        return [written(conversation.messages[:n][-1:], answer_follows) for n, answer_follows in prefixes]

    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    documents = encode_record({"messages": messages}, Codec(encode, chat=forgetful))
    assert [text_of(d.ids) for d in documents] == ["<user>a</><assistant>b</>", "<user>c</><assistant>d</>"]
    assert [text_of(d.ids[d.learned]) for d in documents] == ["b</>", "d</>"]


def test_files(tmp_path):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"text": "a"}\n\n{"prompt": "b", "completion": "c"}\n')
    assert len(read_records(jsonl)) == 2
    (tmp_path / "b.txt").write_text("all of it")
    assert read_records(tmp_path / "b.txt") == [{"text": "all of it"}]
    jsonl.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected one JSON object per line"):
        read_records(jsonl)
    jsonl.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        read_records(jsonl)
    jsonl.write_text("")
    with pytest.raises(ValueError, match="expected records, got none"):
        read_records(jsonl)
    with pytest.raises(ValueError, match="nothing of this name"):
        read_records(tmp_path / "c.csv")
    (tmp_path / "d.docx").write_text("")
    with pytest.raises(ValueError, match=r"expected a file named \.jsonl, .*got the ending '\.docx'"):
        read_records(tmp_path / "d.docx")


def test_hf_datasets(tmp_path):
    import datasets

    records = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "ef"}]
    dataset = datasets.Dataset.from_list(records)
    dataset.save_to_disk(str(tmp_path / "set"))
    expected = [document.ids.tolist() for document in encode_records(records, CODEC)]
    for source in (dataset, tmp_path / "set"):
        assert [document.ids.tolist() for document in encode_records(read_records(source), CODEC)] == expected


def documents(sizes, divisible=True):
    return [Document(np.arange(size) + 10, np.ones(size, bool), divisible) for size in sizes]


def test_packed_rows():
    rows = lay_out(documents([5, 3, 7, 2, 4]), 10)
    ids, segments, positions, labels = (rows.arrays[n] for n in ("input_ids", "segment_ids", "positions", "labels"))
    assert len(rows) == 3
    assert (segments != 0).sum() == 21
    assert rows.fill == 21 / 30
    for row in range(len(rows)):
        for segment in range(1, segments[row].max() + 1):
            here = segments[row] == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            assert positions[row][here].tolist() == list(range(here.sum()))
            assert ids[row][here].tolist() == list(range(10, 10 + here.sum()))
            # A document's first token is predicted from nothing, least of all from the document before it.
            assert labels[row][here].tolist() == [-100, *range(11, 10 + here.sum())]
    assert (labels[segments == 0] == -100).all()


def test_long_texts_go_on_and_long_answers_are_cut():
    rows = lay_out(documents([25]), 10)
    assert len(rows) == 3
    assert rows.cut == 0
    rows = lay_out(documents([25], divisible=False), 10)
    assert (len(rows), rows.cut) == (1, 1)
    prompt_only = Document(np.arange(12), np.arange(12) > 10, False)
    rows = lay_out([*documents([4]), prompt_only], 10)
    assert (len(rows), rows.cut, rows.dropped) == (1, 1, 1)
    with pytest.raises(ValueError, match="nothing to learn"):
        lay_out([prompt_only], 10)


def test_without_packing_each_document_has_its_row():
    rows = lay_out(documents([5, 3]), 8, pack=False)
    assert set(rows.arrays) == {"input_ids", "labels"}
    assert len(rows) == 2
    assert (rows.arrays["labels"][1, 3:] == -100).all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_do_not_depend_on_the_number_of_processes(accumulate):
    rows = Rows.from_tokens(np.arange(26 * 3).reshape(26, 3))

    def batches(count, seed=7):
        loaders = [
            Loader(rows, 4, seed=seed, accumulate=accumulate, process_index=i, process_count=count)
            for i in range(count)
        ]
        return [np.concatenate([next(one)["row"] for one in loaders], axis=-1).tolist() for _ in range(9)]

    # The places in a batch count too: what dropout leaves out goes by them.
    assert batches(1) == batches(2) == batches(4)
    epoch = np.ravel(batches(1))[:26]
    assert len(set(epoch.tolist())) >= 24  # every row once an epoch; the seventh batch begins the next
    assert batches(1, seed=8)[0] != batches(1)[0]


def test_a_loader_goes_on_where_it_stood():
    rows = Rows.from_tokens(np.arange(20 * 3).reshape(20, 3))
    loader = Loader(rows, 2, accumulate=3, seed=1)
    for _ in range(4):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(3)]
    again = Loader(rows, 2, accumulate=3, seed=1)
    again.set_state(state)
    for batch in expected:
        got = next(again)
        assert got["input_ids"].shape == (3, 2, 3)
        assert all(np.array_equal(got[name], batch[name]) for name in batch)


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 1), (1, 2), (3, 1), (5, 1)])
def test_batches_of_any_size(batch, accumulate):
    loader = Loader(Rows.from_tokens(np.arange(5 * 3).reshape(5, 3)), batch, accumulate=accumulate)
    drawn = [next(loader)["row"].ravel() for _ in range(5)]
    assert sorted(np.concatenate(drawn)[:5].tolist()) == [0, 1, 2, 3, 4]


def test_tokens_beyond_the_vocabulary_are_refused():
    ids = np.arange(12).reshape(3, 4)
    Rows.from_tokens(ids).check_vocabulary(12)
    Rows.from_tokens(ids, np.where(ids % 2, ids, -100)).check_vocabulary(12)
    with pytest.raises(
        ValueError, match=r"rows, input_ids: expected token ids from 0 to 10, .* got 11 at \[2, 3\].*use the base"
    ):
        Rows.from_tokens(ids).check_vocabulary(11)
    with pytest.raises(ValueError, match=r"rows, input_ids: expected token ids from 0 to 11, .* got -1 at \[0, 0\]"):
        Rows.from_tokens(ids - 1).check_vocabulary(12)
    for label in (-1, 12):
        labels = np.where(ids == 5, label, ids)
        with pytest.raises(
            ValueError, match=rf"rows, labels: expected token ids from 0 to 11.* or -100, got {label} at \[1, 1\]"
        ):
            Rows.from_tokens(ids, labels).check_vocabulary(12)


def test_tokens_are_counted_whether_learned_or_not():
    parts = [Document(np.arange(5) + 10, np.arange(5) > 3, False), Document(np.arange(3) + 10, np.arange(3) > 1, False)]
    for pack in (True, False):
        rows = lay_out(parts, 9, pack=pack)
        assert rows.count() == 8
        assert rows.fill == 8 / (9 * len(rows))
    assert [rows.count(np.array([n])) for n in (0, 1, 1)] == [5, 3, 3]
    assert rows.count(np.array([[1, 1]])) == 6
    assert Rows.from_tokens(np.ones((2, 3), int)).count(np.array([1])) == 3


def test_batches_that_cannot_be_dealt_out_are_refused():
    rows = Rows.from_tokens(np.ones((6, 3), int))
    with pytest.raises(ValueError, match="a multiple of the 2 processes"):
        Loader(rows, 3, process_count=2)
    with pytest.raises(ValueError, match="the data has 6"):
        Loader(rows, 4, accumulate=2)
