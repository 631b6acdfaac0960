"""Generation with constant scalings of some rows or all: the tokens are those of recomputing everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.small_arrays import NAMES, N, make_model, tokens
from xlora_jax import XLoraModel
from xlora_jax.generation.given import read_given

NEW = 10
ONE = {"y": 1.0}
BY_LAYER = np.random.default_rng(0).uniform(-1, 2, (len(NAMES), N)).astype(np.float32)
INPUTS = {"input_ids": tokens(5, 3, 9), "attention_mask": np.ones((3, 9), np.int32)}
INPUTS["attention_mask"][1, :3] = INPUTS["attention_mask"][2, :8] = 0


@pytest.fixture(scope="module")
def model() -> XLoraModel:
    return make_model(layerwise_scalings=True, top_k_lora=2, global_scaling_weight=0.7)


def run(model: XLoraModel, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(model.generate(**INPUTS, **{"max_new_tokens": NEW, **options}))[:, 9:]


def recomputed(model: XLoraModel, scalings: list[Any], new: int = NEW) -> np.ndarray[Any, Any]:
    """Greedy continuation of each row alone with its scalings, or with the gate's for None."""
    out = []
    for row, there, own in zip(*INPUTS.values(), scalings, strict=True):
        text = np.zeros(9 + new, np.int32)
        length = int(there.sum())
        text[:length] = row[there != 0]
        for at in range(length, length + new):
            # Of one shape, so that given scalings compile once.
            own = None if own is None else np.broadcast_to(np.asarray(own, np.float32), (1, 1, len(NAMES), N))
            text[at] = int(np.argmax(model(text[None], scalings=own).logits[0, at - 1]))
        out.append(text[length : length + new])
    return np.stack(out)


@pytest.mark.parametrize("draft", [False, "gates", "lookup"])
def test_given_and_gated_rows_in_one_batch(model: XLoraModel, draft: Any) -> None:
    wanted = recomputed(model, [[0, 1, 0], None, BY_LAYER])
    gated = run(model)
    assert (wanted != gated).any(axis=1).tolist() == [True, False, True]
    np.testing.assert_array_equal(run(model, scalings=[[0, 1, 0], None, BY_LAYER], draft=draft), wanted)


def test_scalings_by_layer_of_a_model_whose_layers_share_theirs() -> None:
    model = make_model(layerwise_scalings=False)
    np.testing.assert_array_equal(run(model, scalings=[BY_LAYER, None, None])[0], recomputed(model, [BY_LAYER] * 3)[0])
    np.testing.assert_array_equal(run(model, scalings=[BY_LAYER, None, None])[1:], run(model)[1:])


def test_all_rows_given_takes_one_pass_per_token(model: XLoraModel) -> None:
    wanted = recomputed(model, [[0, 1, 0]] * 3)
    np.testing.assert_array_equal(run(model, experts=ONE), wanted)
    stats = model.get_generation_stats()
    assert stats is not None
    assert stats.reads_per_token == 1
    one_cache = stats.cache_bytes_per_token
    run(model, experts=[ONE, None, ONE])
    stats = model.get_generation_stats()
    assert stats is not None
    assert stats.cache_bytes_per_token == 2 * one_cache
    mixed = [{"x": 0.5, "z": -1.0}, ONE, {}]
    wanted = recomputed(model, [[0.5, 0, -1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(run(model, experts=mixed), wanted)
    pieces = [*model.stream(**INPUTS, max_new_tokens=NEW, experts=mixed)]
    np.testing.assert_array_equal([np.concatenate(row) for row in zip(*pieces, strict=True)], wanted)


def test_several_texts_for_a_prompt_and_the_log(model: XLoraModel) -> None:
    model = model.replace()
    model.enable_scalings_logging()
    out = run(model, scalings=[None, BY_LAYER, None], num_return_sequences=2, draft=False)
    np.testing.assert_array_equal(out[2], out[3])
    (log,) = model.get_scalings_log()
    np.testing.assert_allclose(log[2, 3:], np.broadcast_to(BY_LAYER, log[2, 3:].shape), rtol=1e-6)
    assert not np.allclose(log[0, 0], BY_LAYER)
    with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        run(model, experts=ONE)


def test_unstacked_and_frozen(model: XLoraModel) -> None:
    wanted = recomputed(model, [BY_LAYER, None, [0, 1, 0]])
    ours = run(model.unstacked(), scalings=[BY_LAYER, None, [0, 1, 0]], frozen_after=4)
    np.testing.assert_array_equal(ours[[0, 2]], wanted[[0, 2]])
    np.testing.assert_array_equal(ours[1, :4], wanted[1, :4])


@pytest.mark.parametrize(
    ("scalings", "experts", "message"),
    [
        ([1, 0, 0], ONE, "not both"),
        (None, {"w": 1.0}, r"no expert 'w'; the experts are x, y, z"),
        (None, [ONE], "one entry for each of the 3 prompts, got 1"),
        (None, {"x": float("nan")}, "finite"),
        (None, {"x": "1"}, "'x': expected a number, got '1'"),
        (None, "x", "expected a mapping, or a list"),
        (None, [ONE, 1.0, None], r"experts\[1\]: expected a mapping"),
        ([1, 0], None, r"\[rows, 1, adapted layers, experts\] = \[3, 1, 6, 3\]"),
        ([[1, 0, 0], None], None, "one entry for each of the 3 prompts, got 2"),
        ([[1, 0], None, None], None, r"scalings\[0\]: expected numbers"),
        (np.zeros((3, 9, 6, 3)), None, "shape"),
    ],
)
def test_refusals(scalings: Any, experts: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_given(scalings, experts, 3, len(NAMES), ("x", "y", "z"))


def test_nothing_given() -> None:
    assert read_given(None, None, 3, len(NAMES), ("x", "y", "z")) is None
    assert read_given([None] * 3, None, 3, len(NAMES), ("x", "y", "z")) is None
