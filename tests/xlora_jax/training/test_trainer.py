"""A whole run: the kept scaling pass, and what happens where the loss is not finite."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.synthetic import VOCAB, synthetic
from xlora_jax import XLoraModel
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows
from xlora_jax.training.trainer import NonFiniteError, train

# Two epochs and a half of twelve rows, four at a time.
CONFIG = TrainConfig(steps=8, batch_size=4, learning_rate=1e-2, log_every=1, tensorboard=False)
ROWS = Rows.from_tokens(np.random.default_rng(0).integers(1, VOCAB, (12, 10)))


def handle(dtype=jnp.float32, **config):
    model, params = synthetic(dtype=dtype, **config)
    return XLoraModel(model.module, params, model.config, model.layers, tuple(model.config.adapters))


def losses(result):
    return [entry["loss"] for entry in result.history if entry["kind"] == "train"]


def difference(a, b):
    """Relative difference of what two runs have learned."""
    pairs = zip(jax.tree.leaves(a.state.trainable), jax.tree.leaves(b.state.trainable), strict=True)
    return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "accumulate"), [("memory", 1), ("disk", 2)])
def test_a_kept_scaling_pass_gives_the_same_run(where, accumulate, tmp_path):
    model, config = handle(layerwise_scalings=True), dataclasses.replace(CONFIG, accumulate=accumulate)
    plain = train(model, ROWS, config)
    kept = train(model, ROWS, dataclasses.replace(config, scaling_cache=where, scaling_cache_directory=str(tmp_path)))
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(plain)[0] != losses(plain)[-1]
    assert difference(kept, plain) < 1e-5
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(files) == (12 if where == "disk" else 0)
    if where == "memory":
        return
    # Another run of this model reads them; another model has its own.
    train(model, ROWS, dataclasses.replace(config, scaling_cache=where, scaling_cache_directory=str(tmp_path)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files
    base = jax.tree.map(lambda leaf: leaf * 1.1, model.params["base"])
    other = model.replace(params={**model.params, "base": base})
    short = dataclasses.replace(config, scaling_cache=where, scaling_cache_directory=str(tmp_path), steps=1)
    train(other, ROWS, short)
    assert len(list(tmp_path.rglob("*.npy"))) == 12 + 4 * accumulate


@pytest.mark.slow
def test_the_kept_scaling_pass_of_a_bfloat16_model_takes_half_the_room(tmp_path):
    model = handle(jnp.bfloat16)
    kept_in = {"scaling_cache": "disk", "scaling_cache_dtype": "bfloat16", "scaling_cache_directory": str(tmp_path)}
    kept = train(model, ROWS, dataclasses.replace(CONFIG, **kept_in))
    # Nothing is lost: the scaling pass gives bfloat16.
    assert losses(kept) == losses(train(model, ROWS, CONFIG))
    assert {path.stat().st_size for path in tmp_path.rglob("*.npy")} == {128 + 10 * 32 * 2}


def test_tokens_that_the_base_has_not_are_refused_before_anything_is_learned(tmp_path):
    beyond = Rows.from_tokens(np.where(ROWS.arrays["input_ids"] == 7, VOCAB, ROWS.arrays["input_ids"]))
    model = handle()
    for rows, held_out in ((beyond, {}), (ROWS, {"held": beyond})):
        with pytest.raises(ValueError, match=rf"expected token ids from 0 to {VOCAB - 1}, .* got {VOCAB}"):
            train(model, rows, CONFIG, eval_rows=held_out, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_many_bad_steps_stop_the_run_with_the_batch_saved(tmp_path):
    model = handle()
    norm = model.params["base"]["norm"]["scale"]
    base = {**model.params["base"], "norm": {"scale": norm.at[0].set(jnp.nan)}}
    broken = model.replace(params={**model.params, "base": base})
    config = dataclasses.replace(CONFIG, max_bad_steps=3, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"step 3: .* not finite for 3 steps in a row.*bad_batch_step_3"):
        train(broken, ROWS, config, output=tmp_path)
    (saved,) = tmp_path.glob("bad_batch_step_3_*.npz")
    with np.load(saved) as batch:
        known = {tuple(row) for row in ROWS.arrays["input_ids"].tolist()}
        assert {tuple(row) for row in batch["input_ids"].tolist()} <= known
        assert batch["labels"].shape == (4, 10)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries
    assert not any(np.isfinite(entry["loss"]) for entry in entries)


def test_a_bad_step_now_and_then_does_not_stop_the_run():
    # A row whose tokens overflow: every epoch meets it, and the run goes on.
    model = handle()
    table = model.params["base"]["embed_tokens"]["embedding"].at[7].set(jnp.inf)
    base = {**model.params["base"], "embed_tokens": {"embedding": table}}
    ids = ROWS.arrays["input_ids"].copy()
    ids[ids == 7] = 8
    ids[0, 3] = 7
    result = train(
        model.replace(params={**model.params, "base": base}),
        Rows.from_tokens(ids),
        dataclasses.replace(CONFIG, max_bad_steps=2, steps=9),
    )
    assert result.finished
    assert int(result.state.skipped) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.trainable))


def test_a_resumed_run_has_the_entries_of_the_undisturbed_run(tmp_path):
    config = dataclasses.replace(CONFIG, steps=6, log_every=3, checkpoint_every=2, keep_checkpoints=3)
    undisturbed = losses(train(handle(), ROWS, config, output=tmp_path))
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    # From step 2 on: the entry of step 3 is about the first two steps too.
    assert losses(train(handle(), ROWS, config, output=tmp_path)) == undisturbed
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == list(zip((3, 6), undisturbed, strict=True))
