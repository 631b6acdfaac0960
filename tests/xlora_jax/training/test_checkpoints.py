"""Checkpoints: complete or absent, and runs that are killed and resumed end where the undisturbed run ends."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.helpers.resumable_training import CONFIG, model_and_rows
from tests.helpers.synthetic import batch, synthetic
from xlora_jax.training.checkpoints import CheckpointError, Checkpoints
from xlora_jax.training.step import init_train_state, make_train_step
from xlora_jax.training.trainer import train

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "helpers" / "resumable_training.py"


def equal(a, b):
    a, b = (jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype.name.startswith("key") else x, t) for t in (a, b))
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_values_changed_while_a_checkpoint_is_written_are_not_in_it(tmp_path):
    model, params = synthetic()
    state, _ = init_train_state(params, model.config, optax.sgd(0.1))
    losses = [1.0] + [2.0] * 1000
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"log": {"losses": losses}})
        losses.clear()
    with Checkpoints(tmp_path) as checkpoints:
        _, data = checkpoints.restore(state)
    assert data["log"]["losses"] == [1.0] + [2.0] * 1000


def test_a_state_comes_back_as_it_was(tmp_path):
    model, params = synthetic(use_trainable_adapters=True)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state, frozen = init_train_state(params, model.config, optimizer, seed=5)
    step = make_train_step(model, optimizer)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.restore(state) is None
        for number in range(3):
            state, _ = step(state, frozen, batch(seed=number))
            checkpoints.save(state, {"loader": {"next_index": number}})
    like, _ = init_train_state(params, model.config, optimizer)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest == 3
        restored, data = checkpoints.restore(like)
    assert data == {"loader": {"next_index": 2}}
    assert equal(restored, state)
    assert not equal(restored, like)
    kept = [entry for entry in (tmp_path / "run").iterdir() if entry.name.isdigit()]
    assert sorted(entry.name for entry in kept) == ["2", "3"]
    again, _ = step(restored, frozen, batch(seed=9))
    assert int(again.step) == 4


def test_the_frozen_base_is_not_saved(tmp_path):
    model, params = synthetic(layers=6)
    state, _ = init_train_state(params, model.config, optax.sgd(1e-2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    learned = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(params["base"]))
    assert size < learned + 40_000 < base


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="no checkpoints can be written here"):
        Checkpoints(tmp_path / "file" / "run")


def test_another_model_is_refused(tmp_path):
    model, params = synthetic()
    state, _ = init_train_state(params, model.config, optax.sgd(1e-2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    model, params = synthetic(xlora_size=20)
    other, _ = init_train_state(params, model.config, optax.sgd(1e-2))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="another output directory"):
        checkpoints.restore(other)


def test_other_settings_are_refused(tmp_path):
    model, rows = model_and_rows()
    config = dataclasses.replace(CONFIG, steps=2, checkpoint_every=0)
    train(model, rows, config, output=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.1 now"):
        train(model, rows, dataclasses.replace(config, learning_rate=0.1), output=tmp_path)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2, both states, and a state to restore into."""
    model, params = synthetic(use_trainable_adapters=True)
    optimizer = optax.adamw(1e-2)
    state, frozen = init_train_state(params, model.config, optimizer, seed=5)
    step = make_train_step(model, optimizer)
    directory = tmp_path_factory.mktemp("two") / "run"
    states = {}
    with Checkpoints(directory) as checkpoints:
        for number in (1, 2):
            state, _ = step(state, frozen, batch(seed=number))
            states[number] = jax.tree.map(lambda leaf: leaf.copy(), state)
            checkpoints.save(state, {"loader": {"next_index": number}})
    like, _ = init_train_state(params, model.config, optimizer)
    return directory, states, like


def restored(directory, like):
    """State, data and warnings; or the error."""
    with Checkpoints(directory) as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.restore(like)
    return *found, [str(warning.message) for warning in caught if "damaged" in str(warning.message)]


def flips():
    """Derandomized: which file, which part of it, which bit."""
    random = np.random.default_rng(0)
    return [(int(random.integers(1000)), float(random.random()), int(random.integers(8))) for _ in range(40)]


@pytest.fixture
def unfinished_reads():
    """Let go of the reads that Orbax leaves unfinished when one fails, before another test is blamed for them."""
    yield
    gc.collect()


@pytest.mark.usefixtures("unfinished_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_flipped_bit_gives_another_state(two_steps, tmp_path):
    source, states, like = two_steps
    fell_back = 0
    for number, (which, place, bit) in enumerate(flips()):
        directory = shutil.copytree(source, tmp_path / str(number))
        files = sorted(file for file in (directory / "2").rglob("*") if file.is_file() and file.stat().st_size)
        file = files[which % len(files)]
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)
        state, data, warned = restored(directory, like)
        step = data["loader"]["next_index"]
        assert equal(state, states[step]), file
        assert bool(warned) == (step == 1), file
        fell_back += step == 1
        shutil.rmtree(directory)
    assert fell_back > 10


@pytest.mark.usefixtures("unfinished_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda step: next(step.glob("state/d/*")).write_bytes(b""),
        lambda step: shutil.rmtree(step / "state"),
        lambda step: shutil.rmtree(step / "data"),
        lambda step: (step / "data/metadata").write_text("{}"),
        lambda step: (step / "data/metadata").write_text("[]"),
        lambda step: (step / "data/metadata").write_text(""),
        lambda step: (step / "data/metadata").write_text(
            (step / "data/metadata").read_text().replace('"next_index": 2', '"next_index": 7')
        ),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(two_steps, tmp_path, damage):
    source, states, like = two_steps
    directory = shutil.copytree(source, tmp_path / "run")
    damage(directory / "2")
    state, data, warned = restored(directory, like)
    assert data == {"loader": {"next_index": 1}}
    assert equal(state, states[1])
    assert len(warned) == 1
    assert str(directory / "2") in warned[0]
    assert "goes on from step 1" in warned[0]
    assert len(list(directory.glob("damaged-2-*"))) == 1
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(states[2], {"loader": {"next_index": 2}})  # the step is free again
    state, data, warned = restored(directory, like)
    assert equal(state, states[2])
    assert not warned


@pytest.mark.usefixtures("unfinished_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_checkpoint_left_is_an_error(two_steps, tmp_path):
    source, _, like = two_steps
    directory = shutil.copytree(source, tmp_path / "run")
    for step in (1, 2):
        (directory / str(step) / "data/metadata").write_text("{}")
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(like)
    for step in (1, 2):
        assert f"step {step}: ValueError: {directory / str(step)}/data/metadata: expected objects" in str(caught.value)
    assert (directory / "2").is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": 3, "nonsense": 1}', '{"steps": "many"}', "[" * 10**5])
def test_damaged_settings_are_named(tmp_path, content):
    model, rows = model_and_rows()
    config = dataclasses.replace(CONFIG, steps=1, checkpoint_every=0)
    (tmp_path / "train_config.json").write_text(content)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"train_config\.json"):
        train(model, rows, config, output=tmp_path)


def start(output, *arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(output), *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    out, _ = process.communicate(timeout=280)
    assert process.returncode == code, out[-3000:]
    return out


def logged(output):
    path = Path(output) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for(output, step, process):
    while step not in logged(output):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)


def learned(output):
    with np.load(f"{output}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(output))
    return learned(output)


@pytest.mark.slow
def test_sigkill_at_a_random_moment_then_resume_is_bit_exact(tmp_path, undisturbed):
    output = tmp_path / "run"
    for moment in (random.randint(6, 15), random.randint(20, 32)):
        process = start(output, 0.05)
        wait_for(output, moment, process)
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not Path(f"{output}.npz").exists()
    finish(start(output))
    after = learned(output)
    assert after.keys() == undisturbed.keys()
    for name, value in after.items():
        assert np.array_equal(value, undisturbed[name]), name
    # Metrics have each step once.
    assert logged(output) == list(range(1, 41))


@pytest.mark.slow
def test_sigkill_right_after_a_checkpoint_loses_no_entry_of_the_metrics(tmp_path, undisturbed):
    output = tmp_path / "run"
    for step in (8, 20):
        process = start(output, 0.01)
        while not (output / "checkpoints" / str(step)).is_dir():
            assert process.poll() is None, process.communicate()[0][-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        latest = max(int(entry.name) for entry in (output / "checkpoints").iterdir() if entry.name.isdigit())
        assert latest >= step
        assert logged(output)[:latest] == list(range(1, latest + 1))
    finish(start(output))
    assert logged(output) == list(range(1, 41))
    assert all(np.array_equal(value, undisturbed[name]) for name, value in learned(output).items())


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tmp_path, undisturbed):
    output = tmp_path / "run"
    process = start(output, 0.05)
    wait_for(output, 9, process)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert "finished=False" in out
    stopped = int(out.split("step=")[1].split()[0])
    assert stopped < 40
    assert (output / "checkpoints" / str(stopped)).is_dir()
    assert "step=40" in finish(start(output))
    assert all(np.array_equal(value, undisturbed[name]) for name, value in learned(output).items())


@pytest.mark.slow
def test_sigterm_to_one_of_several_processes_stops_all_at_one_step_and_another_mesh_goes_on(tmp_path, undisturbed):
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(output, 0.1, 2, "none", 2, rank, port) for rank in (0, 1)]
    wait_for(output, 6, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    stopped = {finish(process).split("finished=False step=")[1].split()[0] for process in pair}
    assert len(stopped) == 1
    assert int(*stopped) < 40
    assert (output / "checkpoints" / stopped.pop()).is_dir()
    # One process with eight devices goes on where two with one each stopped.
    assert "step=40" in finish(start(output, 0, 4, devices=8))
    for name, value in learned(output).items():
        assert np.linalg.norm(value - undisturbed[name]) <= 1e-4 * np.linalg.norm(undisturbed[name]), name


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_last_good_checkpoint_stays(tmp_path, undisturbed):
    output = tmp_path / "run"
    out = finish(start(output, 0.05, 1, 16_000), code=3)
    assert "can't be written" in out
    assert "the last good one is of step" in out
    good = int(out.split("the last good one is of step ")[1].split(".")[0])
    assert 4 <= good <= 12
    finish(start(output))
    assert all(np.array_equal(value, undisturbed[name]) for name, value in learned(output).items())
