"""Training step of this library and of PEFT on this machine: time, tokens per second, memory.

    python benchmarks/train.py                        # 12 layers, width 576, 8 and 32 experts, float32
    python benchmarks/train.py --threads 1 --clock cpu
    python benchmarks/train.py --shape 7b             # a GPU: bfloat16, sequence 2048, 9 experts, best batch of each

Every measurement runs in its own process. Both sides read the same base and adapter files (`--shape 7b`: random weights
of the same shape) and take the same batches, and their first losses are compared.

Model FLOP utilization counts only the operations that a gate's training step needs. Per token these are 2 x parameters
each for the scaling pass, the real pass and the gradient with respect to activations, and 4 x the experts' parameters.
Recomputation under gradient checkpointing, and PEFT's experts in the scaling pass, don't count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A base model and a batch, with width, heads and other sizes as in a Llama config."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int  # 0: the largest power of two that fits
    tokens: int
    experts: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        """Return the number of weights in the blocks that a token passes through."""
        kv = self.width // self.heads * self.kv_heads
        return self.layers * (2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.intermediate)

    @property
    def expert_parameters(self) -> int:
        """Return the number of weights of one expert."""
        kv = self.width // self.heads * self.kv_heads
        attention = 4 * self.width + 2 * (self.width + kv)
        return self.layers * RANK * (attention + 3 * (self.width + self.intermediate))


SHAPES = {
    "small": Shape(12, 576, 1536, 9, 3, 8192, 2, 128, (8, 32), "float32"),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000, 0, 2048, (9,), "bfloat16"),
    "tiny": Shape(2, 64, 96, 4, 2, 128, 0, 32, (3,), "float32"),
}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}


def prepare(shape: Shape, directory: Path) -> None:
    """Write the base (only its config if it is large) and one adapter, with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.tokens),
        use_cache=False,
        dtype=shape.dtype,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    if shape.batch:
        base: Any = LlamaForCausalLM(config)
        base.save_pretrained(directory / "base")
    else:
        config.save_pretrained(directory / "base")
        with torch.device("meta"):
            base = LlamaForCausalLM(config)
    model: Any = get_peft_model(base, lora)
    if not shape.batch:
        model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(str(directory / "adapter"))


def tokens_of(shape: Shape, batch: int) -> Any:
    """Return the batch of every step, int32 [batch, tokens]."""
    import numpy as np

    return np.random.default_rng(0).integers(1, shape.vocab, (batch, shape.tokens)).astype(np.int32)


def clock(name: str) -> float:
    """Return the seconds of the named clock."""
    return time.process_time() if name == "cpu" else time.perf_counter()


def measure(step: Callable[[], float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the time of ``step``, which returns its loss."""
    first = step()
    step()
    times = []
    for _ in range(arguments.steps):
        start = clock(arguments.clock)
        step()
        times.append(clock(arguments.clock) - start)
    times.sort()
    return {
        "first_loss": first,
        "best": times[0],
        "median": times[len(times) // 2],
        "peak_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peft_side(shape: Shape, directory: Path, experts: int, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure PEFT's X-LoRA with torch's AdamW."""
    import warnings

    import torch
    import transformers
    from peft import XLoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, shape.dtype)
    base: Any
    if shape.batch:
        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)
    else:
        hf_config = AutoConfig.from_pretrained(directory / "base")
        make: Callable[..., Any] = AutoModelForCausalLM.from_config
        with torch.device(device):
            base = make(hf_config, dtype=dtype, attn_implementation="sdpa")
    base = base.to(device)
    base.config.use_cache = False
    adapters = {str(i): str(directory / "adapter") for i in range(experts)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=shape.width, adapters=adapters, xlora_dropout_p=0.0)
    model: Any = get_peft_model(base, config).to(device).train()
    if arguments.remat != "none":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.as_tensor(tokens_of(shape, batch)).long().to(device)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.item())

    found = measure(step, arguments)
    if device == "cuda":
        found["peak_device"] = torch.cuda.max_memory_allocated()
        found["device"] = torch.cuda.get_device_name()
    return found


def our_side(
    shape: Shape, directory: Path, experts: int, batch: int, arguments: argparse.Namespace, *, cached: bool
) -> dict[str, Any]:
    """Measure this library with optax's AdamW; ``cached`` keeps the scaling pass."""
    import dataclasses

    # This library needs no torch, but transformers imports it if it is installed, which takes 200 MB.
    sys.modules["torch"] = None  # type: ignore[assignment]

    import jax
    import jax.numpy as jnp
    import optax

    from interop import load_xlora
    from interop.hf.base import BaseOrigin
    from interop.hf.families.registry import decoder_config, family_of
    from interop.storage.files import read_json
    from xlora_jax import BaseModel, XLoraConfig, init_train_state, make_train_step
    from xlora_jax.models import Decoder
    from xlora_jax.training.metrics import peak_memory
    from xlora_jax.training.step import make_scaling_step

    jax.config.update("jax_default_matmul_precision", "highest" if shape.dtype == "float32" else "default")
    base: Any = directory / "base"
    if not shape.batch:
        from transformers import AutoConfig

        family = family_of(read_json(base / "config.json")["model_type"], "the benchmark")
        values = AutoConfig.from_pretrained(base).to_dict()
        dtype = jnp.dtype(shape.dtype)
        module = Decoder(decoder_config(family, values, "the benchmark")[0], dtype=dtype, param_dtype=dtype)
        variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
        base = BaseModel(module, variables["params"], BaseOrigin("random", base, family, values))
    adapters = {str(i): str(directory / "adapter") for i in range(experts)}
    config = XLoraConfig(hidden_size=shape.width, adapters=adapters, xlora_dropout_p=0.0)
    scan: dict[str, Any] = {} if isinstance(base, BaseModel) else {"scan_layers": not arguments.unrolled}
    model = load_xlora(base, adapters=adapters, config=config, dtype=shape.dtype, expert_dtype=shape.dtype, **scan)
    on_gpu = jax.default_backend() == "gpu"
    static = dataclasses.replace(
        model.xlora,
        module=model.module.clone(
            remat=None if arguments.remat == "none" else arguments.remat,
            attention="cudnn" if on_gpu and shape.dtype != "float32" else None,
        ),
    )
    params = {**model.params, "classifier": jax.tree.map(jnp.zeros_like, model.params["classifier"])}
    optimizer = optax.adamw(1e-3, weight_decay=1e-2)
    state, frozen = init_train_state(params, config, optimizer)
    del params, model
    train_step = make_train_step(static, optimizer)
    ids = tokens_of(shape, batch)
    data = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids)}
    if cached:
        data["scaling_hidden"] = make_scaling_step(static)(frozen, data)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, data)
        return float(metrics["loss"])

    found = measure(step, arguments)
    if on_gpu:
        found["peak_device"] = peak_memory()["peak_device_gib"] * 2**30
        found["device"] = jax.devices()[0].device_kind
    return found


def run(side: str, shape: str, directory: Path, experts: int, batch: int, arguments: argparse.Namespace) -> Any:
    """Measure in a separate process; return None if it runs out of memory."""
    environment = dict(os.environ)
    if arguments.threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
            environment[name] = str(arguments.threads)
    job = json.dumps([side, shape, str(directory), experts, batch, vars(arguments)])
    done = subprocess.run(
        [sys.executable, __file__, "--job", job],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "out of memory" in done.stderr.lower() or "RESOURCE_EXHAUSTED" in done.stderr:
        return None
    sys.exit(done.stderr[-4000:])


def best(side: str, name: str, directory: Path, experts: int, arguments: argparse.Namespace) -> tuple[int, Any]:
    """Measure the given batch, or return the power of two that fits with the most tokens per second."""
    shape = SHAPES[name]
    if shape.batch:
        return shape.batch, run(side, name, directory, experts, shape.batch, arguments)
    chosen: tuple[int, Any] = (0, None)
    batch = 1
    while batch <= arguments.largest_batch:
        found = run(side, name, directory, experts, batch, arguments)
        if found is None:
            break
        if chosen[1] is None or batch / found["median"] > chosen[0] / chosen[1]["median"]:
            chosen = (batch, found)
        batch *= 2
    return chosen


def report(name: str, experts: int, side: str, batch: int, found: Any, reference: Any) -> None:
    """Print one line."""
    shape = SHAPES[name]
    if found is None:
        print(f"{experts:3d} experts  {side:12s} does not fit")
        return
    tokens = batch * shape.tokens
    flops = tokens * (
        6 * (shape.parameters + shape.vocab * shape.width * 2 / 3) + 8 * experts * shape.expert_parameters
    )
    line = (
        f"{experts:3d} experts  {side:12s} batch {batch:3d}  median {found['median'] * 1e3:8.1f} ms"
        f"  best {found['best'] * 1e3:8.1f} ms  {tokens / found['median']:9.0f} tokens/s"
        f"  peak host {found['peak_host'] / 2**30:5.2f} GiB"
    )
    if "peak_device" in found:
        line += f"  device {found['peak_device'] / 2**30:6.2f} GiB"
        peak = next((value for key, value in PEAK_FLOPS.items() if key in found["device"]), None)
        if peak:
            line += f"  MFU {flops / found['median'] / peak:.1%}"
    if reference is not None and reference[1] is not None and side != "peft":
        other = reference[1]["median"] / reference[0]
        line += f"  {other / (found['median'] / batch):.2f}x PEFT"
        if shape.batch:
            difference = abs(found["first_loss"] / reference[1]["first_loss"] - 1)
            line += f"  loss differs by {difference:.1e}"
            assert difference < 1e-5, "the two sides do not compute the same"
    print(line, flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0: as many as there are cores")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine with other load")
    parser.add_argument("--remat", default=None, help="none, full, dots, ...; PEFT: gradient checkpointing unless none")
    parser.add_argument("--unrolled", action="store_true", help="blocks side by side instead of under scan")
    parser.add_argument("--largest-batch", type=int, default=64)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.remat is None:
        arguments.remat = "full" if arguments.shape == "7b" else "none"
    if arguments.job:
        side, name, directory, experts, batch, options = json.loads(arguments.job)
        shape, arguments = SHAPES[name], argparse.Namespace(**options)
        if side == "peft":
            found = peft_side(shape, Path(directory), experts, batch, arguments)
        else:
            found = our_side(shape, Path(directory), experts, batch, arguments, cached=side == "ours, cached")
        print(json.dumps(found))
        return
    print(json.dumps(asdict(SHAPES[arguments.shape])), f"clock {arguments.clock}, threads {arguments.threads or 'all'}")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        prepare(SHAPES[arguments.shape], directory)
        for experts in SHAPES[arguments.shape].experts:
            reference = None
            for side in ("peft", "ours", "ours, cached"):
                batch, found = best(side, arguments.shape, directory, experts, arguments)
                reference = reference or (batch, found)
                report(arguments.shape, experts, side, batch, found, reference)


if __name__ == "__main__":
    main()
