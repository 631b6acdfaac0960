"""Token ids outside the vocabulary, wherever they enter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.small_arrays import VOCAB, make_model
from tests.helpers.synthetic import VOCAB as TRAIN_VOCAB
from tests.helpers.synthetic import batch, synthetic
from xlora_jax import BaseModel, init_train_state, make_eval_step, make_train_step
from xlora_jax.token_ids import check_token_ids

BAD = [VOCAB, -1, -100, 2**31 - 1]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_entries_of_a_model_refuse_them(model: Any, bad: int, kind: Any) -> None:
    ids = kind([[5, 1, 2], [5, bad, 7]])
    alone = BaseModel(model.module, model.params["base"])
    expected = rf"input_ids: expected token ids from 0 to {VOCAB - 1}.* got {bad} at \[1, 1\]"
    for call in (
        lambda: model(ids),
        lambda: alone(ids),
        lambda: model.generate(ids),
        lambda: alone.generate(ids),
        lambda: next(model.stream(ids)),
        lambda: next(alone.stream(ids)),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_special_tokens_of_a_generation(model: Any) -> None:
    with pytest.raises(ValueError, match=rf"eos_token_id: expected token ids from 0 to {VOCAB - 1}"):
        model.generate([[1, 2]], eos_token_id=[3, VOCAB])
    # Padding after the end is written, never read.
    assert model.generate([[1, 2]], max_new_tokens=2, pad_token_id=VOCAB + 5).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "bad"), [("input_ids", TRAIN_VOCAB), ("input_ids", -100), ("labels", -1), ("labels", TRAIN_VOCAB)]
)
def test_steps_refuse_them(name: str, bad: int) -> None:
    xlora, params = synthetic()
    optimizer = optax.sgd(0.1)
    state, frozen = init_train_state(params, xlora.config, optimizer)
    data = batch()
    data[name][2, 5] = bad
    with pytest.raises(ValueError, match=rf"{name}: expected token ids .* got {bad} at \[2, 5\]"):
        make_train_step(xlora, optimizer)(state, frozen, data)
    with pytest.raises(ValueError, match=rf"{name}: expected token ids .* got {bad} at \[2, 5\]"):
        make_eval_step(xlora)(state.trainable, frozen, {k: jnp.asarray(v) for k, v in data.items()})


def test_ignored_labels_and_tracers_pass() -> None:
    check_token_ids(np.array([-100, 0, 4]), 5, "labels", ignored=-100)
    check_token_ids(np.array([7]), None, "input_ids")
    jax.jit(lambda ids: check_token_ids(ids, 5, "input_ids"))(jnp.array([9]))


def test_lengths_beyond_the_context() -> None:
    import dataclasses

    model = make_model()
    module = model.module.clone(config=dataclasses.replace(model.module.config, context_length=6))
    model = dataclasses.replace(model, module=module)
    with pytest.warns(UserWarning, match="8 tokens, but the model was made for 6 positions"):
        model(np.ones((1, 8), np.int32))
    with pytest.raises(ValueError, match=r"max_new_tokens: expected at most 6.*GiB.*beyond_context"):
        model.generate([[1, 2]], max_new_tokens=10**8)
    with pytest.warns(UserWarning, match="7 tokens, but"):
        model.generate(np.ones((1, 7), np.int32), max_new_tokens=2)
    assert model.generate([[1, 2]], max_new_tokens=7, beyond_context=True).shape == (1, 9)
