"""Generation beside transformers: processors, generation_config.json, and the command line on real files."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig as TheirConfig
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from interop import FormatError, load_base, load_generation_config, load_xlora, save_xlora
from tests.helpers.ours import our_xlora
from tests.helpers.reference import VOCAB, prompt, torch_base
from xlora_jax.cli.main import app
from xlora_jax.generation.generate import GenerationConfig
from xlora_jax.generation.sampling import Sampler

SETTINGS = (
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.4},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(settings):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 50)) * 3).astype(np.float32)
    tokens = rng.integers(0, 50, (4, 7))
    theirs = TheirConfig(do_sample=True, **{"top_k": 0, **settings})
    model = torch_stub()
    processors = model._get_logits_processor(theirs, input_ids_seq_length=7, device="cpu")
    wanted = processors(torch.as_tensor(tokens), torch.as_tensor(logits.copy())).softmax(-1).numpy()
    ours = Sampler.of(do_sample=True, **settings).process(
        jnp.asarray(logits), jnp.asarray(np.pad(tokens, ((0, 0), (0, 3)))), jnp.full(4, 7)
    )
    got = torch.as_tensor(np.array(ours)).softmax(-1).numpy()
    np.testing.assert_array_equal(got > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    plain = torch.as_tensor(logits).softmax(-1).numpy()
    assert np.abs(plain - wanted).max() > 1e-2


def torch_stub():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_draws_follow_the_warped_distribution():
    logits = np.random.default_rng(1).normal(size=(1, 12)).astype(np.float32) * 2
    settings = {"temperature": 0.8, "top_k": 6, "top_p": 0.95}
    sampler = Sampler.of(do_sample=True, **settings)
    rows = 20000
    import jax

    drawn = sampler(
        jax.random.key(0), jnp.tile(logits, (rows, 1)), jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)
    )
    processors = torch_stub()._get_logits_processor(TheirConfig(do_sample=True, **settings), 1, device="cpu")
    expected = processors(torch.zeros((1, 1), dtype=torch.long), torch.as_tensor(logits)).softmax(-1).numpy()[0]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi = ((counts - rows * expected)[kept] ** 2 / (rows * expected[kept])).sum()
    assert chi < kept.sum() - 1 + 4 * np.sqrt(2 * (kept.sum() - 1))


def test_the_base_alone_is_transformers_cached_generate(base):
    base_dir = base("llama")
    inputs = prompt(2, 7)
    with torch.no_grad():
        wanted = torch_base(base_dir).generate(
            torch.as_tensor(inputs["input_ids"].astype(np.int64)),
            max_new_tokens=24,
            do_sample=False,
            use_cache=True,
            repetition_penalty=1.3,
            pad_token_id=0,
        )
    got = load_base(base_dir).generate(inputs["input_ids"], max_new_tokens=24, repetition_penalty=1.3)
    np.testing.assert_array_equal(got, wanted.numpy())


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 4], "bos_token_id": 1},
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [3, 4]},
        ),
        ({"max_new_tokens": 7, "num_beams": 1, "pad_token_id": 2}, {"max_new_tokens": 7, "pad_token_id": 2}),
        ({"do_sample": True, "top_k": 3, "min_p": 0.1}, {"do_sample": True, "top_k": 3, "min_p": 0.1}),
    ],
)
def test_generation_config(tmp_path, fields, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **fields}))
    assert load_generation_config(tmp_path) == GenerationConfig(**wanted)


def test_generation_config_without_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    assert load_generation_config(tmp_path) == GenerationConfig(eos_token_id=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 4}, "field 'num_beams': expected it absent or 1.*got 4"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected > 0"),
    ],
)
def test_generation_config_refusals(tmp_path, fields, message):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(FormatError, match=message):
        load_generation_config(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def files(base, experts, tmp_path_factory):
    """A base with a tokenizer of one word per token, and a trained X-LoRA."""
    base_dir = tmp_path_factory.mktemp("cli") / "base"
    shutil.copytree(base("llama"), base_dir)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    fast.chat_template = (
        "{% for m in messages %}{{ 'w11 ' if m['role'] == 'system' else 'w10 ' }}{{ m['content'] }} {% endfor %}w9"
    )
    fast.save_pretrained(base_dir)
    checkpoint = tmp_path_factory.mktemp("cli") / "xlora"
    save_xlora(our_xlora(base_dir, experts(base("llama"), "unequal"), layerwise_scalings=True), checkpoint)
    return base_dir, checkpoint


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def words(row):
    return " ".join(f"w{token}" for token in row)


def test_command_line(files, tmp_path):
    base_dir, checkpoint = files
    model = load_xlora(base_dir, checkpoint=checkpoint)
    tokens = np.asarray(model.generate(np.array([[5, 6, 7]]), max_new_tokens=12))[0, 3:].tolist()
    common = ("--base", base_dir, "--checkpoint", checkpoint, "--max-new-tokens", 12)
    streamed = call("generate", *common, "-p", "w5 w6 w7", "--stats")
    assert streamed.exit_code == 0, streamed.output
    assert words(tokens) in streamed.stdout
    for text in ("reads of the weights per token", "bytes per token and row"):
        assert text in streamed.stderr
    whole = call("generate", *common, "-p", "w5 w6 w7", "--no-stream", "--no-draft")
    assert whole.stdout.strip() == words(tokens)
    stopped = call("generate", *common, "-p", "w5 w6 w7", "--stop", f"w{tokens[4]}")
    assert stopped.stdout.strip() == words(tokens[: tokens.index(tokens[4])])
    several = tmp_path / "prompts.jsonl"
    several.write_text('"w5 w6 w7"\n"w8"\n')
    out = call("generate", *common, "--prompts", several)
    assert out.exit_code == 0, out.output
    assert words(tokens) in out.stdout
    assert out.stdout.count("---") == 2
    chat = call("generate", *common, "-p", "w5 w6", "--chat", "--system", "w3", "--no-stream")
    ids = np.array([[11, 3, 10, 5, 6, 9]])
    assert chat.stdout.strip() == words(np.asarray(model.generate(ids, max_new_tokens=12))[0, 6:].tolist())
    name = model.expert_names[1]
    gated = call("generate", *common, "-p", "w5 w6 w7", "--gate", f"{name}=1.5")
    constant = np.asarray(model.generate(np.array([[5, 6, 7]]), max_new_tokens=12, experts={name: 1.5}))[0, 3:].tolist()
    assert gated.stdout.strip() == words(constant) != words(tokens)
    alone = call("generate", "--base", base_dir, "-p", "w5 w6 w7", "--max-new-tokens", 12, "--no-stream")
    base_tokens = np.asarray(load_base(base_dir).generate(np.array([[5, 6, 7]]), max_new_tokens=12))[0, 3:].tolist()
    assert alone.stdout.strip() == words(base_tokens) != words(tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --prompt or --prompts"),
        (("-p", "w1", "--system", "w2"), "--system needs --chat"),
        (("-p", "w1", "--adapter", "a=b"), "--adapter needs --checkpoint or --gate"),
        (("-p", "w1", "--gate", "a=1"), "--gate needs --checkpoint or --adapter"),
        (("-p", "w1", "--gate", "a=b"), "--gate: a: expected a number, got 'b'"),
        (("-p", "w1", "--checkpoint", "x", "--adapter", "a=b", "--adapter", "a=c"), "the name 'a' is given twice"),
        (("-p", "w1", "--checkpoint", "x", "--adapter", "b"), "--adapter: expected NAME=PATH, got 'b'"),
        (("-p", "w1", "--temperature", "0"), "temperature: expected > 0"),
        (("-p", "w1", "--stream", "--n", "2"), "--stream prints one text"),
        (("-p", ""), "has no tokens"),
    ],
)
def test_command_line_refusals(files, arguments, message):
    result = call("generate", "--base", files[0], *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": False, "temperature": 0.0},
        {"temperature": 0.0, "top_p": 1.5},
        {"do_sample": False, "top_k": -1, "min_p": -0.5},
    ],
)
def test_settings_of_a_draw_that_is_not_made_mean_nothing(tmp_path, fields):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    config = load_generation_config(tmp_path)
    assert not config.do_sample
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (1.0, None, None, None)
    with pytest.raises(FormatError, match="temperature"):
        load_generation_config(tmp_path, changes={"temperature": 0.0, "do_sample": True})


def test_changes_come_before_the_check_of_the_file(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3, "top_k": 7}))
    with pytest.raises(FormatError, match=r"no_repeat_ngram_size.*Set it to 0 in the file, or by changes="):
        load_generation_config(tmp_path)
    changes = {"no_repeat_ngram_size": 0, "do_sample": True, "draft": False, "max_new_tokens": 5}
    config = load_generation_config(tmp_path, changes=changes)
    assert (config.do_sample, config.top_k, config.draft, config.max_new_tokens) == (True, 7, False, 5)
    with pytest.raises(FormatError, match="unknown settings of generation: 'no_such_thing'"):
        load_generation_config(tmp_path, changes={"no_such_thing": 1})
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"do_sample": True, "top_p": 0.5}))
    assert load_generation_config(tmp_path, file=other).top_p == 0.5


def test_prompts_are_split_at_newlines_only(tmp_path):
    from xlora_jax.cli.generate import _read_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\r\ntwo\x0cstill two\x85\n\nthree".encode())
    assert _read_prompts(None, file) == ["one\u2028still one", "two\x0cstill two\x85", "three"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('\ufeff"a\u2028b"\n\n5\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 3: expected a JSON string"):
        _read_prompts(None, lines)
    lines.write_text('"\\ud800"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected a JSON string of whole characters"):
        _read_prompts(None, lines)
    file.write_bytes(b"\xff\xfea\x00")
    with pytest.raises(ValueError, match=r"prompts\.txt: expected UTF-8"):
        _read_prompts(None, file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", float("inf")),
        ("eos_token_id", [1, None]),
        ("max_new_tokens", "5"),
        ("do_sample", 1),
        ("top_p", "x"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(tmp_path, field, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}).replace("Infinity", "1e400"))
    with pytest.raises(FormatError, match=rf"generation_config\.json.*{field}"):
        load_generation_config(tmp_path)
