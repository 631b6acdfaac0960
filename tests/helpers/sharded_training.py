"""A script that trains on meshes, with as many devices as XLA_FLAGS sets, and prints the results as a line of JSON."""

from __future__ import annotations

import json
import re
import sys

import jax
import optax

from tests.helpers.synthetic import batch, synthetic
from xlora_jax.sharding import make_mesh, put_batch, shard_params, state_shardings
from xlora_jax.training.step import init_train_state, make_train_step

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def train(mesh, rows=slice(None), **config):
    """Return the losses of three steps, the collectives of a step as (kind, shape), and the shapes of whole stacks."""
    model, params = synthetic(layers=4, **config)
    optimizer = optax.adamw(1e-2)
    params = shard_params(params, mesh)
    state, frozen = init_train_state(params, model.config, optimizer)
    shardings = state_shardings(jax.eval_shape(lambda s: s, state), optimizer, mesh)
    state = jax.jit(lambda s: s, out_shardings=shardings)(state)
    step = make_train_step(model, optimizer, mesh=mesh, state_shardings=shardings)
    data = [put_batch({k: v[rows] for k, v in batch(8, seed=seed).items()}, mesh) for seed in range(3)]
    text = step.lower(state, frozen, data[0]).compile().as_text()
    losses = []
    for one in data:
        state, metrics = step(state, frozen, one)
        losses.append(float(metrics["loss"]))
    stacks = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 3}
    return {"losses": losses, "collectives": sorted(collectives(text)), "stacks": sorted(stacks)}


def collectives(text):
    found = set()
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
        if match:
            for shape in re.findall(r"\w\[([\d,]*)\]", match.group(1)):
                found.add((match.group(2), tuple(int(n) for n in shape.split(",") if n)))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "meshes":
        results = {}
        for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
            devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
            name = "x".join(map(str, sizes))
            results[name] = train(make_mesh(*sizes, devices=devices), use_trainable_adapters=True)
    else:
        count, rank, port = map(int, sys.argv[2:])
        if count > 1:
            jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=rank)
        share = 8 // count
        mesh = make_mesh(data=-1, fsdp=count)
        results = {"losses": train(mesh, slice(rank * share, (rank + 1) * share))["losses"]}
    sys.stdout.write(json.dumps(results) + "\n")
