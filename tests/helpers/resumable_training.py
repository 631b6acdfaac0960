"""A script that trains forty steps with checkpoints in a given directory; tests kill it and start it again."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time

import jax
import numpy as np

from tests.helpers.synthetic import VOCAB, synthetic
from xlora_jax import XLoraModel
from xlora_jax.training.checkpoints import CheckpointError
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows
from xlora_jax.training.trainer import train

CONFIG = TrainConfig(
    steps=40, batch_size=8, learning_rate=1e-2, checkpoint_every=4, log_every=1, seed=3, tensorboard=False
)


def model_and_rows():
    model, params = synthetic(xlora_dropout_p=0.2, use_trainable_adapters=True)
    handle = XLoraModel(model.module, params, model.config, model.layers, tuple(model.config.adapters))
    return handle, Rows.from_tokens(np.random.default_rng(0).integers(1, VOCAB, (48, 12)))


def main(output, pause="0", fsdp="1", largest_file=None, processes="1", rank="0", port="0"):
    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=int(processes), process_id=int(rank))
    if largest_file not in (None, "none"):
        # Writing beyond this size fails, as on a full disk, from the tenth step on.
        limit = int(largest_file)
    model, rows = model_and_rows()

    def on_metrics(step, kind, values):
        time.sleep(float(pause))
        if largest_file not in (None, "none") and step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    config = dataclasses.replace(CONFIG, fsdp=int(fsdp))
    try:
        result = train(model, rows, config, output=output, on_metrics=on_metrics)
    except CheckpointError as error:
        sys.stdout.write(f"CheckpointError: {error}\n")
        sys.exit(3)
    if result.finished and jax.process_index() == 0:
        leaves = {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree.leaves_with_path(result.state.trainable)}
        np.savez(output + ".npz", **leaves)
    sys.stdout.write(f"finished={result.finished} step={int(result.state.step)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
