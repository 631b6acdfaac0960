"""Generation: whatever the way, the tokens are those of recomputing everything for every token."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.small_arrays import VOCAB, decoder, make_model, tokens
from xlora_jax import BaseModel, XLoraModel
from xlora_jax.generation import decoding
from xlora_jax.generation.drafting import Chooser
from xlora_jax.generation.generate import GenerationConfig
from xlora_jax.generation.state import bucket
from xlora_jax.generation.text import StopStrings, TextStream

NEW = 24
SLIDING = {"window": 5, "sliding": (True, False, True)}


@pytest.fixture(scope="module")
def model() -> XLoraModel:
    return make_model(layerwise_scalings=True, top_k_lora=2, scaling_pass_value=0.7)


def padded(batch: int = 3, length: int = 9) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of 9, 6 and 1 tokens, padded on the left."""
    ids, mask = tokens(5, batch, length), np.ones((batch, length), np.int32)
    mask[1, :3] = mask[2, : length - 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def uncached(model: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], new: int = NEW) -> np.ndarray[Any, Any]:
    """Greedy continuation of each row alone, everything recomputed; the length stays, so that it compiles once."""
    out = []
    for row, there in zip(ids, mask, strict=True):
        text = np.zeros(ids.shape[1] + new, np.int32)
        length = int(there.sum())
        text[:length] = row[there != 0]
        for at in range(length, length + new):
            text[at] = int(np.argmax(model(text[None]).logits[0, at - 1]))
        out.append(text[length : length + new])
    return np.stack(out)


def run(model: Any, inputs: dict[str, Any] | None = None, **options: Any) -> np.ndarray[Any, Any]:
    inputs = inputs or padded()
    out = np.asarray(model.generate(**inputs, **{"max_new_tokens": NEW, **options}))
    assert out.dtype == np.int32
    np.testing.assert_array_equal(
        out[:, : inputs["input_ids"].shape[1]],
        np.repeat(inputs["input_ids"], len(out) // len(inputs["input_ids"]), axis=0),
    )
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def wavering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes ``draft=True`` take all ways in turn, two steps each; gives the list of those that were taken."""
    order, taken = itertools.cycle(("gates", "lookup", "plain", "gates", "plain", "lookup")), []

    def choose(self: Chooser) -> Any:
        taken.append(next(order))
        return taken[-1]

    monkeypatch.setattr(Chooser, "choose", choose)
    monkeypatch.setattr(Chooser, "pays", lambda _: True)
    monkeypatch.setattr(decoding, "_STEPS", 2)
    monkeypatch.setattr(decoding, "_LOOKUP_STEPS", 2)
    return taken


@pytest.mark.parametrize("draft", [False, "gates", "lookup", True])
@pytest.mark.parametrize("unstack", [False, True])
def test_tokens_are_those_of_recomputation(model: XLoraModel, draft: Any, unstack: bool, wavering: list[str]) -> None:
    wanted = uncached(model, *padded().values())
    assert len(np.unique(wanted)) > 3
    ours = model.unstacked() if unstack else model
    np.testing.assert_array_equal(run(ours, draft=draft), wanted)
    stats = ours.get_generation_stats()
    assert stats is not None
    assert stats.new_tokens == 3 * NEW
    if draft == "gates":
        assert stats.acceptance is not None
        assert 0 < stats.acceptance < 1
        # A token costs 2 - a reads, and the first step of a row is lost.
        assert stats.reads_per_token == pytest.approx(2 - stats.acceptance, abs=0.1)
    elif draft == "lookup":
        assert 0 < stats.guessed < 1
        # Two reads for each token that was not guessed; the first of a row comes with the prompt.
        assert stats.reads_per_token == pytest.approx(2 * (1 - stats.guessed * NEW / (NEW - 1)))
    elif draft:
        assert stats.acceptance is not None
        assert set(wavering) == {"gates", "lookup", "plain"}
    else:
        assert (stats.reads_per_token, stats.acceptance, stats.guessed) == (2, None, 0)


def test_base_alone(model: XLoraModel) -> None:
    base = BaseModel(model.module, model.params["base"])
    wanted = uncached(base, *padded().values())
    np.testing.assert_array_equal(run(base), wanted)
    np.testing.assert_array_equal(run(base.unstacked()), wanted)
    stats = base.get_generation_stats()
    assert stats is not None
    assert (stats.reads_per_token, stats.acceptance) == (1, None)
    with model.disable_adapter():
        np.testing.assert_array_equal(run(model), wanted)
    assert not np.array_equal(run(model), wanted)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("sliding", [(True, False, True), (True, True, True)])
def test_sliding_layers_keep_a_ring(scan: bool, sliding: tuple[bool, ...]) -> None:
    model = make_model(decoder(window=5, sliding=sliding), layerwise_scalings=True)
    ours = model if scan else model.unstacked()
    wanted = uncached(model, *padded().values())
    for chunk, draft in ((2, "lookup"), (3, "gates"), (512, False)):
        np.testing.assert_array_equal(run(ours, prefill_chunk=chunk, draft=draft), wanted)
    cache = ours.module.empty_cache(2, 64, chunk=3)
    ring = not scan or all(sliding)
    slots = {x.shape[-2] for x in jax.tree.leaves(cache.v)} | {x.shape[-1] for x in jax.tree.leaves(cache.k)}
    assert slots == ({8} if all(sliding) else {8, 64} if ring else {64})


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(("scan", "rows"), [(False, 3), (True, 1)])
def test_what_other_backends_are_given(monkeypatch: Any, backend: str, scan: bool, rows: int) -> None:
    """The order of the caches' axes and the form of small products; the CPU computes them as well."""
    # Settings that no other test has: else what was compiled for the CPU would be found.
    settings = {"layerwise_scalings": True, "softmax_temperature": 0.9 if backend == "gpu" else 0.8}
    model = make_model(decoder(**SLIDING), **settings)
    ours = model if scan else model.unstacked()
    inputs = {name: value[:rows] for name, value in padded().items()}
    wanted = uncached(model, *inputs.values())
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    assert ours.module.empty_cache(1, 64).keys_as_rows == (backend == "tpu")
    for draft in (False, "gates", "lookup"):
        np.testing.assert_array_equal(run(ours, inputs, prefill_chunk=4, draft=draft), wanted)


@pytest.mark.parametrize("draft", [False, "gates"])
def test_prompts_in_chunks(model: XLoraModel, draft: Any) -> None:
    wanted = run(model, draft=draft)
    for chunk in (1, 4, 9):
        np.testing.assert_array_equal(run(model, draft=draft, prefill_chunk=chunk), wanted)


def test_draws_do_not_depend_on_the_way(model: XLoraModel, wavering: list[str]) -> None:
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 3,
    }
    wanted = run(model, draft=False, **options)
    np.testing.assert_array_equal(run(model, draft="gates", **options), wanted)
    stats = model.get_generation_stats()
    assert stats is not None
    assert stats.acceptance is not None
    assert stats.acceptance < 1
    np.testing.assert_array_equal(run(model, draft="lookup", **options), wanted)
    pieces = list(model.stream(**padded(), max_new_tokens=NEW, steps=5, **options))
    assert set(wavering) == {"gates", "lookup", "plain"}
    streamed = np.stack([np.concatenate(row) for row in zip(*pieces, strict=True)])
    np.testing.assert_array_equal(streamed, wanted)
    assert not np.array_equal(run(model, **{**options, "seed": 4}), wanted)


@pytest.mark.parametrize("draft", ["gates", "lookup"])
def test_drafted_draws_have_the_distribution(draft: Any) -> None:
    """The second and third new tokens, which are the first to be checked, against their exact joint distribution."""
    model = make_model()
    prompt, rows = tokens(1, 1, 4), 4000
    out = run(model, {"input_ids": prompt}, max_new_tokens=3, do_sample=True, num_return_sequences=rows, draft=draft)
    stats = model.get_generation_stats()
    assert stats is not None
    if draft == "gates":
        assert stats.acceptance is not None
        assert 0.2 < stats.acceptance < 0.98
    else:
        assert stats.guessed * stats.new_tokens > 50

    def after(texts: Any) -> Any:
        return np.asarray(jax.nn.softmax(model(texts).logits[:, -1], axis=-1), np.float64)

    first = after(prompt)[0]
    likely = int(first.argmax())
    second = after(np.concatenate([prompt, [[likely]]], axis=1))[0]
    texts = np.concatenate(
        [np.tile(prompt, (VOCAB, 1)), np.full((VOCAB, 1), likely), np.arange(VOCAB)[:, None]], axis=1
    )
    third = second @ after(texts)
    for seen, expected in (
        (out[:, 0], first),
        (out[out[:, 0] == likely][:, 1], second),
        (out[out[:, 0] == likely][:, 2], third),
    ):
        counts = np.bincount(seen, minlength=VOCAB)
        chi = ((counts - len(seen) * expected) ** 2 / (len(seen) * expected)).sum()
        # Chi-squared with V - 1 degrees of freedom: mean V - 1, deviation sqrt(2 (V - 1)); the seed is fixed.
        assert chi < VOCAB - 1 + 4 * np.sqrt(2 * (VOCAB - 1))


@pytest.mark.parametrize("draft", [False, "gates", "lookup"])
def test_rows_end_at_their_own_end_of_sequence(model: XLoraModel, draft: Any) -> None:
    free = run(model, draft=draft)
    ends = [int(free[0, 7]), int(free[1, 3])]
    out = run(model, draft=draft, eos_token_id=ends, pad_token_id=99)
    for row, wanted in zip(out, free, strict=True):
        stop = next((i + 1 for i, token in enumerate(wanted) if token in ends), NEW)
        np.testing.assert_array_equal(row[:stop], wanted[:stop])
        assert (row[stop:] == 99).all()


def test_frozen_gates_are_one_read_per_token(model: XLoraModel) -> None:
    exact = run(model)
    out = run(model, frozen_after=6, draft=False)
    np.testing.assert_array_equal(out[:, :6], exact[:, :6])
    assert not np.array_equal(out, exact)
    stats = model.get_generation_stats()
    assert stats is not None
    assert stats.reads_per_token == pytest.approx((5 * 2 + 18) / 23)
    np.testing.assert_array_equal(run(model, frozen_after=6, draft="gates"), out)


def test_a_stop_ends_a_row_exactly(model: XLoraModel) -> None:
    free = run(model)
    at = 10
    pair = free[0, at : at + 2].tolist()

    def stop(new: Any) -> int | None:
        return next((n for n in range(2, len(new) + 1) if list(new[n - 2 : n]) == pair), None)

    out = run(model, stop_at=stop, pad_token_id=99)
    kept = stop(free[0].tolist())
    np.testing.assert_array_equal(out[0, :kept], free[0, :kept])
    assert (out[0, kept:] == 99).all()


def test_scalings_are_recorded_by_column(model: XLoraModel) -> None:
    records = []
    for draft in (False, "gates", "lookup"):
        model = model.replace()
        model.enable_scalings_logging()
        inputs = padded()
        text = np.asarray(model.generate(**inputs, max_new_tokens=NEW, draft=draft))
        (log,) = model.get_scalings_log()
        assert log.shape[:2] == (3, 9 + NEW - 1)
        records.append(log)
        for row in range(3):
            there = inputs["attention_mask"][row] != 0
            assert not log[row, :9][~there].any()
            whole = model(np.concatenate([text[row, :9][there], text[row, 9:-1]])[None]).scalings
            np.testing.assert_allclose(np.concatenate([log[row, :9][there], log[row, 9:]]), whole[0], atol=1e-5)
    np.testing.assert_allclose(records[0], records[1], atol=1e-5)
    np.testing.assert_allclose(records[0], records[2], atol=1e-5)


def test_returned_sequences_stand_behind_one_another(model: XLoraModel) -> None:
    out = run(model, do_sample=True, temperature=2.0, num_return_sequences=2)
    assert out.shape == (6, NEW)
    assert not np.array_equal(out[0], out[1])
    np.testing.assert_array_equal(run(model, num_return_sequences=2), np.repeat(run(model), 2, axis=0))


def test_a_cache_of_another_dtype(model: XLoraModel) -> None:
    exact, rough = run(model), run(model, cache_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(exact[:, 0], rough[:, 0])
    stats = model.get_generation_stats()
    assert stats is not None
    # Two passes, keys and values, three layers, two heads of six features, two bytes each.
    assert stats.cache_bytes_per_token == 2 * 2 * 3 * 2 * 6 * 2


def test_few_lengths_are_compiled_for() -> None:
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 97)] == [16, 16, 24, 24, 32, 48, 64, 128]
    assert len({bucket(n) for n in range(1, 2049)}) == 15


def test_unstacking_can_delete_what_it_takes_apart() -> None:
    model = make_model(layerwise_scalings=True)
    wanted = run(model)
    stacked = model.params["base"]["layers"]["mlp"]["up_proj"]["kernel"]
    apart = model.unstacked(donate=True)
    assert stacked.is_deleted()
    np.testing.assert_array_equal(run(apart), wanted)
    assert apart.unstacked() is apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected > 0"),
        ({"frozen_after": 0}, "frozen_after: expected at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"attention_mask": np.zeros((1, 4))}, "prompt 0 has no tokens"),
        ({"attention_mask": np.ones((1, 3))}, r"expected the shape of input_ids \[1, 4\], got \[1, 3\]"),
        ({"draft": "beams"}, "draft: expected one of False, True, 'gates', 'lookup', got 'beams'"),
        ({"draft": "gates", "input_ids": np.ones((1, 4))}, "input_ids: expected int"),
    ],
)
def test_refusals(model: XLoraModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": tokens(0, 1, 4), **options})


def test_an_unknown_option_is_refused(model: XLoraModel) -> None:
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(tokens(0, 1, 4), num_beams=4)


def test_settings_are_kept_in_a_config(model: XLoraModel) -> None:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, seed=7)
    out = model.generate(**padded(), config=config)
    np.testing.assert_array_equal(out[:, 9:], run(model, do_sample=True, seed=7))
    np.testing.assert_array_equal(
        model.generate(**padded(), config=dataclasses.replace(config, seed=8)),
        model.generate(**padded(), config=config, seed=8),
    )


def spell(new: Any) -> str:
    """A tokenizer of two bytes a token, so that characters and stop strings do not keep to tokens."""
    return b"".join(bytes(divmod(int(token), 256)) for token in new).decode("utf-8", errors="replace")


def test_stop_strings_and_streams_of_text() -> None:
    text = "één twee \u2014 STOP drie "
    raw = text.encode() + b" " * (len(text.encode()) % 2)
    new = [256 * a + b for a, b in zip(raw[::2], raw[1::2], strict=True)]
    stop = StopStrings(("STOP", "nooit"), spell)
    keep = stop(new)
    assert keep is not None
    assert "STOP" in spell(new[:keep])
    assert "STOP" not in spell(new[: keep - 1])
    assert stop(new[: keep - 1]) is None
    for size in (1, 2, 5):
        pieces = [new[i : i + size] for i in range(0, len(new), size)]
        stream, free = TextStream(spell, stop), TextStream(spell)
        given = [stream.push(piece) for piece in pieces]
        assert "".join(given) + stream.close() == "één twee \u2014 "
        assert not any("\ufffd" in piece for piece in given)
        assert "".join(map(free.push, pieces)) + free.close() == spell(new)
    # What could have become a stop string, and did not, comes at the end.
    stream = TextStream(spell, stop)
    assert stream.push([256 * ord("a") + ord("S")]) == "a"
    assert stream.close() == "S"
    with pytest.raises(ValueError, match="none empty"):
        StopStrings(("",), spell)
