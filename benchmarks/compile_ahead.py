"""Memory and copies of decoding and training, compiled for an accelerator that the machine does not have.

    pip install 'jax[tpu]'                                # libtpu compiles without a TPU
    JAX_PLATFORMS=cpu python benchmarks/compile_ahead.py --tpu v6e:2x4 --mesh 1,8,1 --batch 8
    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12    # of jax's version
    JAX_PLATFORMS=cpu python benchmarks/compile_ahead.py --gpu h100_sxm.txtpb --batch 4 --attention cudnn

XLA's directory `xla/backends/gpu/target_config/specs/` has a file for each GPU; fields that the installed version does
not know must be deleted from it. Nothing runs, so there are no times. The output has

- temporaries: memory of the program besides arguments and results. More than a few activations in a decoding step mean
  that weights or caches are copied.
- written (GPUs only): bytes of all results of one decoding step (the loop's body), without updates in place. A step has
  to write a few activations. More bytes mean that weights or caches are copied for every token.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import generate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlora_jax import XLoraModel, init_train_state, make_train_step
from xlora_jax.backend import compile_for, target_backend
from xlora_jax.generation import decoding
from xlora_jax.generation.drafting import GUESSES
from xlora_jax.generation.generate import GenerationConfig
from xlora_jax.generation.state import State
from xlora_jax.generation.state import start as start_state
from xlora_jax.generation.steps import Base, Lookup, Mode, Plain, StaleGates
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.sharding import batch_sharding, make_mesh, param_shardings, state_shardings

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
MODES: dict[str, Mode] = {
    "base": Base(),
    "plain": Plain(),
    "stale gates": StaleGates(),
    "lookup": Lookup(),
}


def abstract_model(shape: str) -> XLoraModel:
    """Return a model in bfloat16, with shapes in place of parameters, and one set of arrays per block."""
    made: list[XLoraModel] = []

    def make() -> Any:
        made.append(generate.random_model(shape, jnp.bfloat16))
        return made[0].params

    params = jax.eval_shape(make)
    return made[0].replace(params=params)


def stacked(model: XLoraModel) -> XLoraModel:
    """Return the model with its blocks under ``nn.scan``."""
    group = model.module.config.groups[0].name
    count = model.module.config.num_layers

    def stack(tree: Any) -> dict[str, Any]:
        rest = {name: part for name, part in tree.items() if not name.startswith("layers_")}
        # All blocks of these models have the same shapes.
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree["layers_0"])
        return {**rest, group: whole}

    numbers: dict[tuple[str, ...], list[int]] = {}
    for slot in model.layers.slots:
        numbers.setdefault((group, *slot.path[1:]), []).append(int(np.asarray(slot.numbers)))
    slots = tuple(Slot(path, tuple(found)) for path, found in numbers.items())
    params = {**model.params, **{part: stack(model.params[part]) for part in ("base", "experts")}}
    return dataclasses.replace(
        model.replace(params=params),
        module=model.module.clone(scan_layers=True),
        layers=AdaptedLayers(model.layers.names, slots),
    )


def written(text: str) -> int:
    """Return the bytes that the largest loop body of an optimized HLO module writes, without updates in place."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = [0]
    for head, lines in re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S):
        if head not in bodies:
            continue
        total = 0
        for name, result, kind in re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", lines, re.M):
            if kind in ("get-tuple-element", "tuple", "bitcast", "parameter", "constant", "while"):
                continue
            if any(part in name for part in ("dynamic_update_slice", "dynamic-update-slice", "scatter")):
                continue
            sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
            total += sum(BYTES.get(dtype, 4) * math.prod(map(int, filter(None, s.split(",")))) for dtype, s in sizes)
        found.append(total)
    return max(found)


def show(name: str, lowered: Any, *, loop: bool = False) -> None:
    """Compile and print one line."""
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"  {name:34s} does not fit: {str(error).splitlines()[0][:120]}", flush=True)
        return
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    line = (
        f"  {name:34s} arguments {memory.argument_size_in_bytes / 1e9:6.2f} GB   temporaries "
        f"{memory.temp_size_in_bytes / 1e6:8.1f} MB"
    )
    if loop and target_backend() == "gpu":
        line += f"   written {written(compiled.as_text()) / 1e6:7.1f} MB"
    print(f"{line}   compiled in {seconds:.0f} s", flush=True)


def placed(tree: Any, shardings: Any) -> Any:
    """Return shapes with shardings; ``shardings`` is a tree, or one sharding for all leaves."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def show_decoding(model: XLoraModel, device: Any, batch: int, context: int) -> None:
    """Compile a chunk of the prompt, and a step of every mode."""
    there = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    settings = GenerationConfig().settings()
    params = placed(model.params, there)
    prompts = np.ones((batch, context // 2), np.int32)
    lengths = np.full(batch, context // 2, np.int32)
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    stop, steps = placed(integers, there)

    def start(experts: bool) -> State:
        rng, new = jax.random.key(0), context - context // 2 - GUESSES
        return start_state(
            model.xlora, prompts, lengths, max_new_tokens=new, settings=settings, rng=rng, experts=experts
        )

    for experts, modes in ((False, ("base",)), (True, ("plain", "stale gates", "lookup"))):
        state = placed(jax.eval_shape(partial(start, experts)), there)
        caches = jax.tree.leaves([state.scaling, state.real])
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in caches)
        print(f" batch {batch}, {context} tokens per row, caches {size / 1e6:.1f} MB")
        prompt = decoding.prefill.lower(model.xlora, settings, params, state, steps, chunk=512)
        show(f"512 tokens of a prompt, {modes[0]}", prompt)
        for name in modes:
            step = decoding.advance.lower(model.xlora, settings, MODES[name], params, state, stop, steps)
            show(f"decoding, {name}", step, loop=True)


def show_training(model: XLoraModel, devices: Any, options: argparse.Namespace) -> None:
    """Compile a training step under every rematerialization policy."""
    data, fsdp, tensor = map(int, options.mesh.split(","))
    mesh = make_mesh(data, fsdp, tensor, devices=devices[: data * fsdp * tensor])
    optimizer = optax.adamw(1e-3)
    state, frozen = jax.eval_shape(
        lambda p: init_train_state(p, model.config, optimizer, dtype=jnp.float32), model.params
    )
    states = state_shardings(state, optimizer, mesh)
    tokens = jax.ShapeDtypeStruct((options.batch, options.tokens), jnp.int32)
    batch = placed({"input_ids": tokens, "labels": tokens}, batch_sharding(mesh))
    state, frozen = placed(state, states), placed(frozen, param_shardings(frozen, mesh))
    print(f" {options.batch} x {options.tokens} tokens, mesh (data, fsdp, tensor) {data}, {fsdp}, {tensor}; per device")
    for remat in ("full", "dots", None):
        static = dataclasses.replace(model.xlora, module=model.module.clone(remat=remat, attention=options.attention))
        step: Any = make_train_step(static, optimizer, mesh=mesh, state_shardings=states)
        show(f"training, remat {remat}", step.lower(state, frozen, batch))


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--tpu", help="topology, such as v5e:2x4")
    target.add_argument("--gpu", type=Path, help="file that describes the GPU")
    parser.add_argument("--shape", choices=generate.SHAPES, default="mistral-7b")
    parser.add_argument("--context", type=int, default=4096, help="tokens per row while decoding")
    parser.add_argument("--mesh", default="1,1,1", help="data,fsdp,tensor of the training step")
    parser.add_argument("--batch", type=int, default=1, help="rows of a training step, all devices together")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--attention", choices=["xla", "cudnn"], help="of the training step")
    options = parser.parse_args()

    if options.tpu:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        devices: Any = topologies.get_topology_desc(options.tpu, "tpu").devices
    else:
        described = options.gpu.read_text(encoding="utf-8")
        devices = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=described).devices
    print(
        f"{options.shape}, bfloat16; for {devices[0].device_kind}; jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    # The form of matrix products depends on the backend, so set it to the target's.
    with compile_for("tpu" if options.tpu else "gpu"):
        model = abstract_model(options.shape)
        for batch in (1, 8):
            show_decoding(model, devices[0], batch, options.context)
        show_training(stacked(model), devices, options)


if __name__ == "__main__":
    main()
