"""transformers' `Auto*` classes: no code of a model's directory runs, and broken files of tokenizers are named."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from interop import FormatError
from interop.hf.auto import load_hf_config, load_tokenizer, warn_of_added_tokens
from interop.hf.templates import renderer_of
from interop.hf.tokenizer import load_codec
from xlora_jax.training.chats import Chat, TemplateError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def base_dir(text_files, tmp_path):
    return shutil.copytree(text_files[1], tmp_path / "base")


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
class OwnConfig(PretrainedConfig): model_type = "own"
"""


@pytest.mark.parametrize("answer", ["y\n" * 5, "n\n" * 5, ""])
@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}, {}),
        ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}, {}),
        ({"tokenizer_class": "Own", "auto_map": ["own.Own", None]}, {}),
        ({"tokenizer_class": "RagTokenizer"}, {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}),
    ],
)
def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(
    base_dir, monkeypatch, capsys, tmp_path, answer, tokenizer, config
):
    trace = tmp_path / "it-ran"
    (base_dir / "own.py").write_text(CODE.format(trace=str(trace)))
    edit(base_dir / "tokenizer_config.json", **tokenizer)
    edit(base_dir / "config.json", **config)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(FormatError, match=str(base_dir)):
        load_codec(base_dir)
    assert not trace.exists()
    assert sys.stdin.read() == answer
    assert "[y/N]" not in capsys.readouterr().out


def test_code_beside_a_config_is_neither_run_nor_asked_about(base_dir, monkeypatch, tmp_path):
    trace = tmp_path / "it-ran"
    (base_dir / "own.py").write_text(CODE.format(trace=str(trace)))
    edit(base_dir / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_hf_config(base_dir)
    assert load_tokenizer(base_dir).encode("a")  # that of its own files
    assert not trace.exists()


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            yield node


@pytest.mark.parametrize("path", sorted([*ROOT.glob("xlora_jax/**/*.py"), *ROOT.glob("interop/**/*.py")]), ids=str)
def test_one_function_alone_calls_from_pretrained(path):
    text = path.read_text(encoding="utf-8")
    found = list(calls(path))
    if path == ROOT / "interop/hf/auto.py":
        (only,) = found
        keywords = {keyword.arg: keyword.value for keyword in only.keywords}
        assert isinstance(keywords["trust_remote_code"], ast.Constant)
        assert keywords["trust_remote_code"].value is False
        return
    assert not found, f"{path}, line {found[0].lineno}: use interop.auto"
    imported = [
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "peft")
        for alias in node.names
    ]
    assert not [name for name in imported if name.startswith(("Auto", "Peft", "Lora")) or name == "pipeline"]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=str)
def test_examples_trust_no_code_either(path):
    for call in calls(path):
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "AutoTokenizer":
            assert any(keyword.arg == "trust_remote_code" for keyword in call.keywords), f"line {call.lineno}"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_that_leaves_the_directory(base_dir, tmp_path, name):
    real = tmp_path / f"secret-{name}"
    if (base_dir / name).exists():
        shutil.move(base_dir / name, real)
    else:
        real.write_text("{}")
    (base_dir / name).symlink_to(real)
    with pytest.raises(FormatError, match=rf"{name}: a link that leaves the directory"):
        load_tokenizer(base_dir)


def test_a_link_within_the_directory(base_dir):
    shutil.move(base_dir / "tokenizer.json", base_dir / "real.json")
    (base_dir / "tokenizer.json").symlink_to("real.json")
    assert load_tokenizer(base_dir).encode("a")


def test_a_folder_of_templates_that_is_a_link(base_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (base_dir / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="additional_chat_templates: a link"):
        load_tokenizer(base_dir)


@pytest.mark.parametrize("field", ["vocab_file", "tokenizer_file", "merges_file"])
def test_a_path_that_leaves_the_directory(base_dir, tmp_path, field):
    (tmp_path / "secret.json").write_text("{}")
    for given in (str(tmp_path / "secret.json"), "../secret.json"):
        edit(base_dir / "tokenizer_config.json", **{field: given})
        with pytest.raises(FormatError, match=f"tokenizer_config.json: {field} is .*outside"):
            load_tokenizer(base_dir)
    edit(base_dir / "tokenizer_config.json", **{field: "/not/there/any/more.json"})  # of who saved it
    assert load_tokenizer(base_dir).encode("a")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": 3}'])
def test_damaged_files_are_named(base_dir, name, content):
    if name == "tokenizer_config.json" and content.startswith(b'{"model'):
        return
    (base_dir / name).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name}\b"):
        load_tokenizer(base_dir)


def test_a_cut_tokenizer(base_dir):
    content = (base_dir / "tokenizer.json").read_bytes()
    for part in (1, 3, 7):
        (base_dir / "tokenizer.json").write_bytes(content[: len(content) * part // 8])
        with pytest.raises(FormatError, match=r"tokenizer\.json: broken"):
            load_tokenizer(base_dir)


def test_no_tokenizer_at_all(base_dir):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; expected tokenizer\.json"):
        load_tokenizer(base_dir)


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}", "{{ unclosed", "{% endif %}", "{% nothing %}", "{{ a | no }}"]
)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_broken_templates_are_named(base_dir, place, text):
    (base_dir / "chat_template.jinja").unlink(missing_ok=True)
    if place == "chat_template.jinja":
        (base_dir / place).write_text(text)
    else:
        edit(base_dir / place, chat_template=text)
    with pytest.raises(FormatError, match=rf"{place}: the chat template"):
        load_tokenizer(base_dir)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_templates_that_fail_are_named(base_dir, text):
    (base_dir / "chat_template.jinja").write_text(text)
    tokenizer = load_tokenizer(base_dir)
    (text,) = renderer_of(tokenizer)(Chat([{"role": "user", "content": "x"}]), [(1, True)])
    assert isinstance(text, TemplateError)
    assert f"chat template of {base_dir}" in str(text)


def test_tokens_that_the_base_has_no_rows_for_are_named(base_dir):
    tokenizer = load_tokenizer(base_dir)
    warn_of_added_tokens(tokenizer, len(tokenizer))
    with pytest.warns(UserWarning, match=r"1 tokens have no row .*resize_token_embeddings"):
        warn_of_added_tokens(tokenizer, len(tokenizer) - 1)
