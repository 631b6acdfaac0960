"""The log of scalings: bounded modes, its file, and 10,000 calls."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.synthetic import synthetic
from xlora_jax import XLoraModel
from xlora_jax.routing.recorder import ScalingsLog, load_scalings_log


def call(number, tokens=2, dtype=jnp.float32):
    return jnp.full((1, tokens, 3, 2), number, dtype)


@pytest.fixture(scope="module")
def model():
    model, params = synthetic(layerwise_scalings=True)
    return XLoraModel(model.module, params, model.config, model.layers, tuple(model.config.adapters))


def test_a_reservoir_holds_every_call_with_the_same_probability():
    counts = np.zeros(20)
    for seed in range(400):
        log = ScalingsLog("reservoir", size=5, seed=seed)
        for number in range(20):
            log.record(np.full((1, 1, 1, 1), number))
        assert log.indices() == sorted(log.indices())
        assert [entry.item() for entry in log] == log.indices()
        counts[log.indices()] += 1
    # Each is kept in a quarter of the runs; six standard deviations.
    assert np.abs(counts - 100).max() < 6 * np.sqrt(400 * 0.25 * 0.75)


def test_every_nth_and_the_mean():
    every, mean = ScalingsLog("every", size=3, every=4), ScalingsLog("mean")
    for number in range(19):
        every.record(call(number))
        mean.record(call(number, tokens=4), np.array([[1, 1, number % 2, 0]]))
    assert every.indices() == [8, 12, 16]
    assert mean.tokens == 19 * 2 + 9
    tokens = [number for number in range(19) for _ in range(2 + number % 2)]
    (entry,) = mean.entries()
    assert entry.shape == (1, 1, 3, 2)
    np.testing.assert_allclose(entry, np.mean(tokens), rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected scalings of \[3, 2\], got \[3, 4\]"):
        mean.record(jnp.ones((1, 1, 3, 4)))


@pytest.mark.parametrize("mode", ["all", "reservoir", "mean", "every"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_file_gives_the_log_back(mode, dtype, tmp_path):
    log = ScalingsLog(mode, size=4, every=2, seed=3)
    for number in range(9):
        log.record(call(number, tokens=1 + number % 3, dtype=dtype) / 3)
    log.save(tmp_path / "log.npz", expert_names=("a", "b"), layer_names=("x", "y", "z"))
    found = load_scalings_log(tmp_path / "log.npz")
    assert found.indices() == log.indices()
    assert (found.mode, found.seen, found.tokens) == (mode, 9, log.tokens)
    for ours, theirs in zip(found, log, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
    found.record(call(9, dtype=dtype))
    assert found.seen == 10


def test_files_that_are_no_logs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a path that ends in \.npz"):
        ScalingsLog().save(tmp_path / "log")
    for name, content in {"empty.npz": b"", "text.npz": b"hello", "cut.npz": None, "other.npz": None}.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        elif name == "cut.npz":
            log = ScalingsLog()
            log.record(call(1))
            log.save(path)
            path.write_bytes(path.read_bytes()[:200])
        else:
            np.savez(path, a=np.ones(3))
        with pytest.raises(ValueError, match=f"{name}: expected a log of scalings"):
            load_scalings_log(path)
    with pytest.raises(ValueError, match="mode: expected all, reservoir, mean, every, got 'some'"):
        ScalingsLog("some")
    with pytest.raises(ValueError, match="size: expected a whole number of at least 1, got 0"):
        ScalingsLog("reservoir", size=0)


def test_a_model_logs_within_bounds(model, tmp_path):
    ids = np.arange(1, 7).reshape(2, 3)
    model = model.replace()
    model.enable_scalings_logging("mean")
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    out = model(ids, mask)
    (mean,) = model.get_scalings_log()
    np.testing.assert_allclose(mean[0, 0], np.asarray(out.scalings)[mask == 1].mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match="log has entries of mode mean"):
        model.enable_scalings_logging()
    model.save_scalings_log(tmp_path / "log.npz")
    with np.load(tmp_path / "log.npz") as stored:
        assert '"expert_names": ["expert 0", "expert 1", "expert 2"]' in str(stored["about"])
    model.clear_scalings_log()
    model.enable_scalings_logging("reservoir", size=2)
    for _ in range(5):
        model(ids)
    assert len(model.get_scalings_log()) == 2
    assert model.get_bucketed_scalings_log()[3][0] == [0, 1]
    copy = model.replace()
    assert (copy._log.mode, copy._log.size, len(copy._log)) == ("reservoir", 2, 0)


@pytest.mark.parametrize("mode", ["reservoir", "mean", "every"])
def test_ten_thousand_logged_generations_do_not_grow(mode, model):
    """Generations of the model, and then as many calls of the log as 10,000 of them make, with the same arrays."""
    model = model.replace()
    model.enable_scalings_logging(mode, size=8, every=3)
    for seed in range(3):
        model.generate(np.array([[1, 2]]), max_new_tokens=3, do_sample=True, seed=seed)
    assert model._log.seen == 3
    latest = model.get_latest_scalings()

    def held():
        gc.collect()
        entries = sum(np.asarray(entry).nbytes for _, entry in model._log._entries)
        return len(model._log), entries, sum(array.nbytes for array in jax.live_arrays())

    for _ in range(100):
        model._record(latest, None)
    before = held()
    while model._log.seen < 10_000:
        model._record(latest, None)
    assert held() == before
    assert before[0] == (1 if mode == "mean" else 8)
