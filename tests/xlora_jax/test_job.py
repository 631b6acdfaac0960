"""A whole job: what can't end well is refused before the first step, and what changed since then by name."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from xlora_jax.job import Job, run_training
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.run_lock import RunLockedError, run_lock

TRAIN = TrainConfig(steps=1, batch_size=2, log_every=1, tensorboard=False)


@pytest.fixture
def job(text_files, tmp_path):
    folder, base_dir, adapters = text_files

    def make(**changes):
        named = {"one": str(adapters[0]), "two": str(adapters[1])}
        values = {
            "base": str(base_dir),
            "adapters": named,
            "data": str(folder / "train.jsonl"),
            "length": 32,
            "output": str(tmp_path / "run"),
            "xlora": {"xlora_depth": 1},
            "train": TRAIN,
        }
        return Job(**{**values, **changes})

    return make


def refused(job, kind, message):
    with pytest.raises(kind, match=message):
        run_training(job)
    for name in ("metrics.jsonl", "train_config.json", "checkpoints"):
        assert not os.path.exists(os.path.join(job.output, name)), "training has begun"


def test_an_output_that_is_a_file(job, tmp_path):
    (tmp_path / "run").write_text("a file")
    refused(job(), OSError, "run is not a directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model").write_text("a file")
    refused(job(output=str(tmp_path / "other")), OSError, "model: a file stands there")
    refused(job(output=str(tmp_path / "run" / "deep" / "er")), OSError, "run is not a directory")


def test_an_output_with_files_of_others(job, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    refused(job(), OSError, r"model: .* holds what this save doesn't write: notes\.txt")


def test_an_output_that_can_not_be_written(job):
    refused(job(output="/proc/run"), OSError, "/proc")  # not even by root


def test_a_layout_that_can_not_express_the_model(job):
    refused(job(layout="nonsense"), ValueError, "layout 'nonsense'; expected one of peft, xlora, mistralrs")
    refused(job(layout="mistralrs"), ValueError, "layout 'mistralrs'")
    settings = {"enable_softmax_topk": True, "top_k_lora": 1, "enable_softmax": False}
    refused(job(layout="mistralrs", xlora=settings), ValueError, "enable_softmax_topk")


def test_a_classifier_beyond_all_memory(job):
    refused(job(xlora={"xlora_depth": 3, "xlora_size": 10**9}), ValueError, "xlora_size 1000000000 would take .* GiB")
    refused(job(xlora={"xlora_depth": 10**9}), ValueError, "xlora_depth: expected at most 1000")


def test_changes_are_refused_by_name_and_the_export_is_in_the_lock(job, tmp_path, monkeypatch, text_files):
    folder, _, adapters = text_files
    seen = []

    def locked(*arguments, **options):
        with pytest.raises(RunLockedError), run_lock(tmp_path / "run"):
            pass
        seen.append(arguments)
        return saved(*arguments, **options)

    import interop

    saved = interop.save_xlora
    monkeypatch.setattr(interop, "save_xlora", locked)
    assert run_training(job()).finished
    assert len(seen) == 1
    assert json.loads((tmp_path / "run" / "job.json").read_text())["length"] == 32

    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(lines[::-1]))
    (tmp_path / "cut.jsonl").write_text("".join(lines[:-3]))

    def named(message, **changes):
        with pytest.raises(ValueError, match=message):
            run_training(job(**changes))

    named("rows: .* now", data=str(tmp_path / "cut.jsonl"))
    named("rows: ", data=str(tmp_path / "reversed.jsonl"))
    named(r"rows: \d+ of 32 tokens there, \d+ of 40 tokens now", length=40)
    named("rows: ", pack=False)
    named("config: dtype float32 there, bfloat16 now", dtype="bfloat16")
    named("config: expert_dtype float32 there, bfloat16 now", expert_dtype="bfloat16")
    other = {"one": str(adapters[0]), "two": str(adapters[2])}
    named("expert 'two': other weights", adapters=other)
    named("experts: one, two there, one, three now", adapters={"one": other["one"], "three": str(adapters[1])})
    assert run_training(job()).finished  # unchanged


def test_a_name_that_no_file_can_hold(job, text_files):
    _, _, adapters = text_files
    named = {"one": str(adapters[0]), "\ud800": str(adapters[1])}
    refused(job(adapters=named), ValueError, "half of a surrogate pair")


def test_requests_beyond_all_memory_say_so():
    from tests.helpers.small_arrays import decoder, make_model

    model = make_model(decoder())
    with pytest.raises(ValueError, match=r"num_return_sequences 10{12}\b.* would take .* GiB, and there are"):
        model.generate(np.ones((1, 3), np.int32), num_return_sequences=10**12)
