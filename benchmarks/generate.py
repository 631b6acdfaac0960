"""Generation time of this library, PEFT and transformers, measured in turns in one run.

    python benchmarks/generate.py                          # the CPU table: 12-layer Llama of width 576
    python benchmarks/generate.py --new 256 --repeats 5
    python benchmarks/generate.py --shape mistral-7b --dtype bfloat16 --no-torch --batch 1 --batch 8     # on a GPU

Weights are random, so the acceptance of drafts has no meaning here; `generate_trained.py` measures it on a trained
gate. The table has medians of whole calls, prompt included. The first call, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax import BaseModel, XLora, XLoraConfig, XLoraModel
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.models import Decoder, DecoderConfig, Rope

# vocabulary, width, feed-forward, layers, heads, kv heads, adapted projections, experts, rank
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAPER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
SHAPES: dict[str, tuple[int, int, int, int, int, int, tuple[str, ...], int, int]] = {
    "llama-12": (32000, 576, 1536, 12, 9, 3, ALL, 8, 16),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8, PAPER, 9, 16),
    "tiny": (512, 64, 96, 2, 4, 2, ALL, 3, 4),
}


def random_model(shape: str, dtype: Any, seed: int = 0) -> XLoraModel:
    """Return an X-LoRA model with random weights and one set of arrays per block."""
    vocab, width, inner, blocks, heads, kv_heads, targets, experts, rank = SHAPES[shape]
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=blocks,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope=Rope(width // heads),
    )
    module = Decoder(config, dtype=dtype, param_dtype=dtype, scan_layers=False)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    keys = iter(jax.random.split(jax.random.key(seed), 10_000))

    def draw(size: tuple[int, ...], scale: float, kind: Any) -> jax.Array:
        values: jax.Array = (jax.random.normal(next(keys), size, jnp.float32) * scale).astype(kind)
        return values

    def fill(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        return draw(leaf.shape, leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 1.0, leaf.dtype)

    base = jax.tree_util.tree_map_with_path(fill, shapes)
    columns = jnp.repeat(jnp.eye(experts), rank, axis=1)
    adapted: dict[str, Any] = {}
    names: list[str] = []
    slots: list[Slot] = []
    for block in range(blocks):
        parts: dict[str, Any] = {}
        for part, modules in (("self_attn", ALL[:4]), ("mlp", ALL[4:])):
            for name in (name for name in modules if name in targets):
                into, out = base[f"layers_{block}"][part][name]["kernel"].shape
                parts.setdefault(part, {})[name] = {
                    "lora_a": draw((into, experts * rank), into**-0.5, dtype),
                    "lora_b": draw((experts * rank, out), 0.3 * rank**-0.5, dtype),
                    "columns": columns,
                }
                slots.append(Slot((f"layers_{block}", part, name), len(names)))
                names.append(f"model.layers.{block}.{part}.{name}")
        adapted[f"layers_{block}"] = parts
    layers = AdaptedLayers(tuple(names), tuple(slots))
    settings = XLoraConfig(hidden_size=width, adapters={str(i): "" for i in range(experts)}, layerwise_scalings=True)
    xlora = XLora(module, layers, experts, settings)
    classifier = jax.jit(xlora.classifier.init)(jax.random.key(1), jnp.zeros((1, 1, width), dtype))["params"]
    params = {"base": base, "experts": adapted, "classifier": classifier}
    return XLoraModel(module, params, settings, layers, tuple(settings.adapters))


def peft_model(model: XLoraModel, directory: Path) -> tuple[Any, Any]:
    """Return a transformers model and a PEFT X-LoRA model of the same shapes, with other random weights."""
    import peft
    import transformers

    config, experts = model.module.config, model.expert_names
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    base: Any = transformers.LlamaForCausalLM(llama)
    targets = sorted({name.rpartition(".")[2] for name in model.layer_names})
    rank = next(iter(jax.tree.leaves(model.params["experts"]))).shape[-1] // len(experts)
    adapters = {}
    for name in experts:
        lora = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(base, lora)
        wrapped.save_pretrained(str(directory / name))
        base = wrapped.unload()
        adapters[name] = str(directory / name)
    alone: Any = transformers.LlamaForCausalLM(llama)
    base.config.use_cache = False
    mixed = peft.get_peft_model(
        base,
        peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=config.hidden_size, adapters=adapters, layerwise_scalings=True
        ),
    ).eval()
    return alone.eval(), mixed


def bandwidth() -> float:
    """Return the device's memory bandwidth in bytes per second: the best of several sums over about 1 GiB."""
    size = 2**28 if jax.default_backend() != "cpu" else 2**26
    array = jnp.ones(size, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return array.nbytes / best


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-12")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, action="append", help="repeatable; default 64 and 256")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; default 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true", help="without PEFT and transformers")
    options = parser.parse_args()

    model = random_model(options.shape, jnp.dtype(options.dtype))
    alone = BaseModel(model.module, model.params["base"])
    theirs: tuple[Any, Any] | None = None
    versions = [f"jax {jax.__version__}"]
    if not options.no_torch:
        import peft
        import torch
        import transformers

        versions += [f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft)]
        with tempfile.TemporaryDirectory() as directory:
            theirs = peft_model(model, Path(directory))

    rate = bandwidth()
    # A step reads only one row of the embedding table.
    head = {name: part for name, part in model.params["base"].items() if name != "embed_tokens"}
    base_bytes, expert_bytes = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (head, model.params["experts"]))
    machine = f"{os.cpu_count()} cores {platform.machine()}, {jax.devices()[0].device_kind}"
    print(f"{options.shape}, {options.dtype}, prompt {options.prompt}; {machine}, ", end="")
    print(f"{', '.join(versions)}, {time.strftime('%Y-%m-%d')}")
    print(f"read per token: base {base_bytes / 1e6:.0f} MB, experts {expert_bytes / 1e6:.0f} MB; ", end="")
    print(f"memory {rate / 1e9:.1f} GB/s; one pass of the base at that rate {base_bytes / rate * 1e3:.2f} ms\n")

    for batch in options.batch or [1]:
        ids = np.random.default_rng(0).integers(1, model.module.config.vocab_size, (batch, options.prompt))
        for new in options.new or [64, 256]:
            ways = _ways(model, alone, theirs, ids, new)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for call in ways.values():
                call()
            for _ in range(options.repeats):
                for name, call in ways.items():
                    started = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - started)
            _table(batch, new, times, base_bytes / rate)


def _ways(
    model: XLoraModel, alone: BaseModel, theirs: tuple[Any, Any] | None, ids: Any, new: int
) -> dict[str, Callable[[], Any]]:
    """Return the calls to compare, by name; each makes ``new`` tokens."""
    ways: dict[str, Callable[[], Any]] = {
        "ours, base": lambda: alone.generate(ids, max_new_tokens=new),
        "ours, X-LoRA, plain": lambda: model.generate(ids, max_new_tokens=new, draft=False),
        "ours, X-LoRA, stale gates": lambda: model.generate(ids, max_new_tokens=new, draft="gates"),
        "ours, X-LoRA, lookup": lambda: model.generate(ids, max_new_tokens=new, draft="lookup"),
        "ours, X-LoRA, default": lambda: model.generate(ids, max_new_tokens=new),
    }
    if theirs is not None:
        import torch

        tensor = torch.as_tensor(ids)

        def generate(which: Any, cache: bool) -> None:
            with torch.no_grad():
                which.generate(
                    input_ids=tensor,
                    attention_mask=torch.ones_like(tensor),
                    max_new_tokens=new,
                    do_sample=False,
                    use_cache=cache,
                )

        ways["transformers, base, cached"] = lambda: generate(theirs[0], True)
        ways["PEFT, X-LoRA"] = lambda: generate(theirs[1], False)
    return ways


def _table(batch: int, new: int, times: dict[str, list[float]], limit: float) -> None:
    """Print medians, tokens per second, the share of the bandwidth limit, and ratios."""
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median["ours, base"]
    print(f"batch {batch}, {new} new tokens" + " " * 12 + "ms/token   tokens/s   of one-pass limit   x ours base")
    for name, value in median.items():
        each = value / new
        print(
            f"  {name:32s} {each * 1e3:10.2f} {batch / each:10.1f} {limit / each:18.0%} {value / base:13.2f}"
            f"   ({min(times[name]) / new * 1e3:.2f} to {max(times[name]) / new * 1e3:.2f})"
        )
    if "PEFT, X-LoRA" in median:
        plain, default = median["ours, X-LoRA, plain"], median["ours, X-LoRA, default"]
        print(f"  PEFT / ours plain {median['PEFT, X-LoRA'] / plain:.1f}, PEFT / ours default ", end="")
        print(f"{median['PEFT, X-LoRA'] / default:.1f}, plain / base {plain / base:.2f}, ", end="")
        print(f"transformers / ours base {median['transformers, base, cached'] / base:.2f}")
    print(flush=True)


if __name__ == "__main__":
    main()
