"""The handle: PEFT's method names, state that is visible, errors that say what to do."""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.small_arrays import N, decoder, make_model, tokens
from xlora_jax import BaseModel


def test_disabled_is_the_base_model_and_enable_brings_the_experts_back() -> None:
    model = make_model()
    ids = tokens(0, 2, 6)
    base = BaseModel(model.module, model.params["base"])(ids).logits
    mixed = model(ids).logits
    with model.disable_adapter():
        np.testing.assert_array_equal(model(ids).logits, base)
        assert model(ids).scalings is None
    np.testing.assert_array_equal(model(ids).logits, mixed)
    model.disable_adapter_layers()
    np.testing.assert_array_equal(model(ids).logits, base)
    with model.disable_adapter():
        pass
    np.testing.assert_array_equal(model(ids).logits, base)
    model.enable_adapter_layers()
    np.testing.assert_array_equal(model(ids).logits, mixed)
    assert jnp.abs(mixed - base).max() > 0.1


def test_a_thread_does_not_switch_off_the_experts_of_another() -> None:
    model = make_model()
    ids = tokens(0, 2, 6)
    mixed, base = model(ids).logits, BaseModel(model.module, model.params["base"])(ids).logits
    inside, done = threading.Event(), threading.Event()
    found = []

    def without_experts() -> None:
        with model.disable_adapter():
            inside.set()
            done.wait(60)
            found.append(model(ids).logits)
        found.append(model(ids).logits)

    thread = threading.Thread(target=without_experts)
    thread.start()
    assert inside.wait(60)
    np.testing.assert_array_equal(model(ids).logits, mixed)
    with model.disable_adapter():
        model.enable_adapter_layers()  # acts in this block alone
        np.testing.assert_array_equal(model(ids).logits, mixed)
        with model.disable_adapter():
            np.testing.assert_array_equal(model(ids).logits, base)
        np.testing.assert_array_equal(model(ids).logits, mixed)
    done.set()
    thread.join()
    np.testing.assert_array_equal(found[0], base)
    np.testing.assert_array_equal(found[1], mixed)


def test_setters_change_config_and_result() -> None:
    model = make_model()
    ids = tokens(0, 2, 6)
    seen = [model(ids).logits]
    for change in (
        lambda: model.set_topk_lora(1),
        lambda: model.set_global_scaling_weight(0.3),
        lambda: model.set_scaling_pass_value(0.5),
        lambda: model.set_scaling_pass_value(None),
    ):
        change()
        seen.append(model(ids).logits)
        assert jnp.abs(seen[-1] - seen[-2]).max() > 1e-3
    assert model.config.top_k_lora == 1
    assert model.get_global_scaling_weight() == 0.3
    assert model.config.scaling_pass_value == pytest.approx(1 / N)
    with pytest.raises(ValueError, match="top_k_lora must be at most the number of experts"):
        model.set_topk_lora(4)
    assert model.config.top_k_lora == 1


def test_scalings_log_and_buckets() -> None:
    model = make_model(layerwise_scalings=True)
    assert model.get_latest_scalings() is None
    model(tokens(0, 2, 6))
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    outs = [model(tokens(seed, 2, length)) for seed, length in ((1, 6), (2, 4), (3, 6))]
    np.testing.assert_array_equal(model.get_latest_scalings(), outs[-1].scalings)
    buckets = model.get_bucketed_scalings_log()
    assert {length: places for length, (places, _) in buckets.items()} == {6: [0, 2], 4: [1]}
    np.testing.assert_array_equal(buckets[4][1][0], outs[1].scalings)
    copy = model.get_scalings_log()
    copy.clear()
    assert len(model.get_scalings_log()) == 3
    model.disable_scalings_logging()
    model(tokens(0, 2, 6))
    assert len(model.get_scalings_log()) == 3
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


def test_replace_leaves_the_original_alone() -> None:
    model = make_model()
    ids = tokens(0, 2, 6)
    before = model(ids).logits
    other = model.replace(config=dataclasses.replace(model.config, global_scaling_weight=0.0))
    assert jnp.abs(other(ids).logits - before).max() > 0.1
    np.testing.assert_array_equal(model(ids).logits, before)


def test_inputs_embeds_are_the_embedded_tokens() -> None:
    """With an expert on the embedding the two differ by that expert's part, which is then not there to add."""
    model = make_model()
    ids = tokens(0, 2, 6)
    embeds = model.params["base"]["embed_tokens"]["embedding"][ids]
    with model.disable_adapter():
        np.testing.assert_allclose(model(inputs_embeds=embeds).logits, model(ids).logits, atol=1e-6)
    assert jnp.abs(model(inputs_embeds=embeds).logits - model(ids).logits).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"input_ids": tokens(0, 2, 6), "inputs_embeds": np.zeros((2, 6, 16))}, "exactly one of"),
        ({"input_ids": tokens(0, 6)}, r"expected int \[batch, tokens\]"),
        ({"input_ids": np.zeros((2, 6))}, "expected int"),
        ({"inputs_embeds": np.zeros((2, 6))}, r"\[batch, tokens, width\]"),
        ({"input_ids": tokens(0, 2, 6), "attention_mask": np.ones((2, 5))}, r"attention_mask: expected shape \[2, 6\]"),
    ],
)
def test_calls_refuse_what_does_not_fit(arguments: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**arguments)


def test_names() -> None:
    model = make_model(decoder())
    assert model.expert_names == ("x", "y", "z")
    assert model.layer_names[0] == "a.embed"
