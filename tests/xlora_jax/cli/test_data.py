"""`xlora-jax inspect` of training data, and `train` and `report` on data with bad records."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from interop.hf.tokenizer import codec_of
from tests.helpers.chat_templates import make_tokenizer
from tests.helpers.cli import arguments, invoke
from xlora_jax.cli.data_view import escaped, show_data
from xlora_jax.cli.main import app
from xlora_jax.training.data import encode_records


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, "qwen3")
    return folder


def turn(*contents):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]}


RECORDS = [
    turn("one?", "first \x1b[31m\u202e⟧", "two?", "second"),
    {"prompt": "p", "completion": "c" * 50},
    {"text": "all"},
]


def inspect(*given):
    done = CliRunner().invoke(app, ["inspect", *map(str, given)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_data_as_it_is_learned(tokenizer_dir, tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    code, text = inspect(path, "--base", tokenizer_dir, "--length", 40)
    assert code == 0, text
    documents = encode_records(RECORDS, codec_of(AutoTokenizer.from_pretrained(tokenizer_dir)))
    assert len(documents) == 4
    tokens, learned = sum(len(d.ids) for d in documents), sum(d.learned.sum() for d in documents)
    words = " ".join(text.split())
    assert "3 (1 of messages, 1 of prompt and completion, 1 of text)" in words
    assert f"{tokens:,}" in words
    assert f"{learned} ({learned / tokens:.1%})" in words
    lost = sum(d.learned[40:].sum() for d in documents)
    assert lost > 0
    cut = sum(len(d.ids) > 40 for d in documents if not d.divisible)
    words = "".join(character for character in text if character not in " \n│")
    dropped = sum(not d.learned[1:40].any() for d in documents if not d.divisible)
    assert dropped == 1
    assert f"documentscutoff:{cut}({lost}learnedtokenslost);dropped:{dropped}(" in words
    # Learned tokens between brackets, and nothing in them that a terminal would obey.
    assert (
        "<|im_start|>assistant\\n\n⟦<think>\\n\n\\n\n</think>\\n\n\\n\nfirst \\x1b[31m\\u202e\\u27e7<|im_end|>\\n\n⟧"
        in text
    )
    assert "\x1b" not in text
    assert text.count("example ") == 3
    assert "first" in text.split("example 2")[1]
    assert "⟦<think>" not in text.split("example 2")[1].split("second")[0].split("two?")[0]


def test_in_a_terminal_a_style_marks_what_is_learned(tokenizer_dir, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([turn("q", "answer")]))
    console = Console(force_terminal=True, width=100, color_system="standard")
    with console.capture() as captured:
        assert show_data(console, str(path), str(tokenizer_dir), 64)
    text = captured.get()
    assert "⟦" not in text
    assert "\x1b[32m<think>" in text


def test_bad_records_are_listed(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(turn("q", "answer")) + '\n{"text": 5}\n{"text": \n' + '{"body": ""}\n' * 8)
    code, text = inspect(path, "--base", tokenizer_dir)
    assert code == 1
    words = "".join(character for character in text if character not in " \n│")
    assert "11(8ofnoknownform,1ofmessages,1oftext)" in words
    assert "badrecords10,thefirstofthem:" in words
    assert "data.jsonl,line2:text:expectedtext,got'5'(int)" in words
    assert "line3:expectedoneJSONobject" in words
    assert "example1" in words


def test_data_that_is_refused(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a long one " * 9, "completion": "x"}))
    for given, reason in (
        ((path,), "istrainingdata:give--base"),
        ((path, "--base", tokenizer_dir, "--length", 5), "nothingtolearn:nodocumenthasananswerwithinthefirst5tokens"),
        ((tmp_path / "none.jsonl", "--base", tokenizer_dir), "thereisnothingofthisname"),
    ):
        code, text = inspect(*given)
        assert code == 1
        assert reason in "".join(character for character in text if character not in " \n│")


def test_escapes():
    assert escaped("a\tb\r\n\x00\x7f\x9b\u200b\u2028\U000e0001\U000f0000é日") == (
        "a\\tb\\r\\n\n\\x00\\x7f\\x9b\\u200b\\u2028\\U000e0001\\U000f0000é日"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_on_rows_one_by_one_and_around_bad_records(text_files, tmp_path):
    folder, base_dir, adapters = text_files
    lines = (folder / "train.jsonl").read_text().splitlines()[:6]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*lines, '{"text": 5}', "{"]) + "\n")
    given = arguments((folder, base_dir, adapters), tmp_path / "run", "--batch-size", 1, "--steps", 2)
    given[given.index("--data") + 1] = path
    del given[(at := given.index("--eval")) : at + 2]
    refused = invoke(given)
    assert refused.exit_code == 1
    assert "data.jsonl, line 8: expected one JSON object per line" in refused.output
    refused = invoke([*given, "--skip-bad-records", 1])
    assert refused.exit_code == 1
    assert "data.jsonl, line 7: text: expected text, got '5' (int) (before it 1 bad records" in refused.output
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"^2 bad records were left out: .*line 8.*; .*line 7"):
        done = invoke([*given, "--skip-bad-records", 2])
    assert done.exit_code == 0, done.output
    assert "learned tokens per second" in done.output
    (entry,) = [
        e
        for e in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if e["kind"] == "train"
    ]
    assert entry["step"] == 2
    assert 0 < entry["learned_tokens_per_second"] < entry["tokens_per_second"]
