"""Warnings of dead experts and of collapse, and the routing in a run's log."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

from tests.helpers.synthetic import VOCAB, synthetic
from xlora_jax import XLoraModel
from xlora_jax.training.balance import Balance
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows
from xlora_jax.training.run_log import routing_line
from xlora_jax.training.trainer import train

NAMES = ("code", "law", "math")
CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, log_every=2, checkpoint_every=1, keep_checkpoints=4)
ROWS = Rows.from_tokens(np.random.default_rng(0).integers(1, VOCAB, (12, 10)))


def test_a_dead_expert_gives_one_warning():
    balance = Balance(NAMES, 3)
    shares = np.array([0.6, 0.005, 0.395])
    balance.step(1, shares)
    balance.step(2, shares)
    balance.step(3, np.array([0.6, 0.02, 0.38]))  # alive again: the count starts anew
    for step in (4, 5):
        balance.step(step, shares)
    with pytest.warns(UserWarning, match=r"step 6: expert 'law' has had under 1% .* 3 steps.*load_balance"):
        balance.step(6, shares)
    balance.step(7, shares)


def test_an_expert_that_takes_all_gives_one_warning_and_not_one_for_each_other():
    balance = Balance(NAMES, 2)
    shares = np.array([0.002, 0.995, 0.003])
    balance.step(1, shares)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 9):
            balance.step(step, shares)
    assert len(caught) == 1
    assert "expert 'law' has had over 99% of the gates for 2 steps" in str(caught[0].message)


def test_no_warning_if_it_is_off_or_there_is_one_expert():
    for balance, shares in ((Balance(NAMES, 0), [0.0, 1.0, 0.0]), (Balance(("only",), 1), [1.0])):
        for step in range(5):
            balance.step(step, np.array(shares))


def test_counts_go_on_after_a_resumption():
    balance, shares = Balance(NAMES, 3), np.array([0.5, 0.0, 0.5])
    balance.step(1, shares)
    balance.step(2, shares)
    resumed = Balance(NAMES, 3)
    resumed.set_state(json.loads(json.dumps(balance.get_state())))
    with pytest.warns(UserWarning, match="'law'"):
        resumed.step(3, shares)


def test_the_log_of_a_run_has_its_routing(tmp_path):
    model, params = synthetic(layerwise_scalings=True, top_k_lora=2)
    model = XLoraModel(model.module, params, model.config, model.layers, tuple(model.config.adapters))
    config = dataclasses.replace(CONFIG, accumulate=2)
    result = train(model, ROWS, config, output=tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in logged if entry["kind"] == "train"]
    for entry in entries:
        assert sum(entry[f"selected/{name}"] for name in model.expert_names) == pytest.approx(2, rel=1e-5)
        assert sum(entry[f"top1/{name}"] for name in model.expert_names) == pytest.approx(1, rel=1e-5)
        assert 1 <= entry["experts_per_token"] <= 2
        assert 1 <= entry["experts_in_use"] <= 3
        assert 0 < entry["change"] < 1
        assert 0 < entry["layer_agreement"] < 1
        assert 0 < entry["co_use"] < 1
        top = max(model.expert_names, key=lambda name: entry[f"gate/{name}"])
        assert routing_line(entry) == f"{top} {entry[f'gate/{top}']:.0%}, {entry['experts_per_token']:.1f} experts"
    assert (tmp_path / "tensorboard").exists()
    assert routing_line({"loss": 1.0}) == ""
    # Resumed between two entries, the second is the same: it is about all its steps.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again = train(model, ROWS, config, output=tmp_path)
    (entry,) = (entry for entry in again.history if entry["kind"] == "train")
    for name, value in entries[-1].items():
        if "second" not in name and name != "data_share":
            assert entry[name] == value, name
    # At a learning rate of zero the log has what the model does with the rows.
    frozen = dataclasses.replace(config, learning_rate=0.0, tensorboard=False, log_every=3, steps=3, accumulate=1)
    (entry,) = (entry for entry in train(model, ROWS, frozen).history if entry["kind"] == "train")
    gates = model.gates_of(ROWS.arrays["input_ids"])[:, :-1]
    for number, name in enumerate(model.expert_names):
        assert entry[f"gate/{name}"] == pytest.approx(gates[..., number].mean(), rel=1e-4)
    assert result.finished
