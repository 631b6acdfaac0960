"""Meshes: rules checked, the same losses on 1 and 8 devices, and which collectives the compiled step has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers.synthetic import synthetic
from xlora_jax.sharding import RULES, check_rules, make_mesh, param_shardings, spec_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "sharded_training.py"


def test_rules_cover_a_model_and_split_most_of_it():
    _, params = synthetic(head=True)
    check_rules(RULES, params)
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    shared = split = 0
    for path, leaf in [(("base", "layers", "mlp", "up_proj", "kernel"), jnp.ones((2, 32, 48)))]:
        assert spec_of(path, leaf.shape, mesh) == P(None, "fsdp", "tensor")
    for (path, leaf), (_, sharding) in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves_with_path(param_shardings(params, mesh)), strict=True
    ):
        if sharding.spec == P():
            assert leaf.ndim <= 2 or "columns" in jax.tree_util.keystr(path), jax.tree_util.keystr(path)
            shared += leaf.size
        else:
            split += leaf.size
    assert shared < 0.1 * split


def test_unsound_rules_are_refused():
    _, params = synthetic()
    with pytest.raises(ValueError, match="no sharding rule matches base/"):
        check_rules([("^experts/", P()), ("^classifier/", P())], params)
    with pytest.raises(ValueError, match="uses an axis twice"):
        check_rules([("kernel", P("fsdp", "fsdp")), ("", P())], params)
    with pytest.raises(ValueError, match="uses an axis twice"):
        check_rules([("kernel", P(("fsdp", "tensor"), "tensor")), ("", P())], params)
    with pytest.raises(ValueError, match=r"expected axes among data, fsdp, tensor, got 'model'"):
        check_rules([("kernel", P("model"))], params)
    with pytest.raises(ValueError, match="has 2 axes, but base/norm/scale has the shape"):
        check_rules([("scale", P("fsdp", "tensor")), ("", P())], params)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    assert spec_of(("classifier", "dense_0", "kernel"), (32, 3), mesh) == P("fsdp")
    assert spec_of(("classifier", "dense_0", "kernel"), (30, 4), mesh) == P(None, "tensor")


def test_mesh_sizes():
    assert make_mesh().shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="product is the number of devices"):
        make_mesh(data=jax.device_count() + 1)
    with pytest.raises(ValueError, match="at most once"):
        make_mesh(data=-1, fsdp=-1)


def run(arguments, devices, **more):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_same_losses_on_eight_devices():
    results = finished(run(["meshes"], 8))
    single = results["1x1x1"]["losses"]
    assert single[0] != single[-1]
    for name, result in results.items():
        assert result["losses"] == pytest.approx(single, rel=1e-5), name

    # Pure data parallelism moves gradients of what learns, and nothing else.
    kinds = {name: {kind for kind, *_ in result["collectives"]} for name, result in results.items()}
    assert kinds["8x1x1"] == {"all-reduce"}
    # Under fsdp weights are gathered one block at a time: no gather gives a whole stack of blocks.
    assert "all-gather" in kinds["1x8x1"]
    for name, result in results.items():
        for kind, shape in result["collectives"]:
            if kind == "all-gather":
                assert tuple(shape) not in {tuple(stack) for stack in result["stacks"]}, (name, shape)
    # Under fsdp activations stay where they are: nothing with all rows of the batch and the width is gathered.
    assert not [
        s
        for kind, s in results["1x8x1"]["collectives"]
        if kind == "all-gather" and s[:2] == [8, 12] and len(s) > 2 and s[2] > 1
    ]


@pytest.mark.slow
def test_two_processes_give_the_same_losses():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [run(["process", 2, rank, port], 2) for rank in (0, 1)]
    first, second = [finished(process) for process in pair]
    single = finished(run(["process", 1, 0, port], 1))
    assert first == second
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-5)
