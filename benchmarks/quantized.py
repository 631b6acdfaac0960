"""Cost and quality of a base in 8 and 4 bits, against float32, on this machine.

    python benchmarks/quantized.py             # time of one product, and of its gradient, by number of rows
    python benchmarks/quantized.py --quality   # loss of the quickstart's base, which was trained in float32

Times are medians of whole calls, taken in turns. One product is that of a projection of a 1B model, 2048 x 5632.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax.layers import quantized

EXAMPLES = Path(__file__).parents[1] / "examples"
DEPTH, WIDTH = 2048, 5632


def kernels() -> dict[str, Any]:
    """Return one random kernel in float32 and in each quantized kind."""
    weight = np.random.default_rng(0).normal(size=(DEPTH, WIDTH)).astype(np.float32)
    found: dict[str, Any] = {"float32": jnp.asarray(weight)}
    for kind in quantized.KINDS:
        group = quantized.group_size(DEPTH, kind)
        assert group is not None
        kernel = quantized.empty(weight.shape, kind, group)
        quantized.quantize(weight, kind, kernel)
        found[kind] = jax.tree.map(jnp.asarray, kernel)
    return found


def product(x: jax.Array, kernel: Any) -> jax.Array:
    """Multiply by a kernel of either form."""
    return quantized.matmul(x, kernel) if isinstance(kernel, quantized.QuantizedKernel) else x @ kernel


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median time of each call; the first calls, which compile, don't count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def show_times(rows: list[int], repeats: int) -> None:
    """Print a table of times."""
    found = kernels()
    forward = jax.jit(product)
    gradient = jax.jit(jax.grad(lambda x, kernel: (product(x, kernel) ** 2).sum()))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; ms (times float32)")
    print(f"{'rows':>5} {'':10}" + "".join(f"{name:>20}" for name in found))
    for count in rows:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(count, DEPTH)), jnp.float32)
        for title, function in (("product", forward), ("gradient", gradient)):
            calls: dict[str, Callable[[], Any]] = {name: partial(function, x, kernel) for name, kernel in found.items()}
            times = seconds(calls, repeats)
            cells = [f"{1e3 * taken:.2f} ({taken / times['float32']:.1f})" for taken in times.values()]
            print(f"{count:5} {title:10}" + "".join(f"{cell:>20}" for cell in cells))


def show_quality(cache: Path) -> None:
    """Print the base's loss on held-out text of each domain, in nats per token."""
    from rich.console import Console

    from interop import load_base

    sys.path.insert(0, str(EXAMPLES))
    assets = importlib.import_module("quickstart_assets").prepare(cache, Console(stderr=True))
    batches = {name: rows[:128] for name, rows in assets.held_out.items()}

    @jax.jit
    def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()

    print(f"{'':10}" + "".join(f"{name:>12}" for name in (*batches, "mean")))
    for kind in (None, *quantized.KINDS):
        model = load_base(assets.base, dtype="float32", quantize=kind)
        losses = [float(loss(model(ids).logits, ids)) for ids in map(jnp.asarray, batches.values())]
        print(f"{kind or 'float32':10}" + "".join(f"{value:12.4f}" for value in (*losses, np.mean(losses))))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--cache", type=Path, default=EXAMPLES / ".cache/quickstart")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256, 2048])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.quality:
        show_quality(options.cache)
    else:
        show_times(options.rows, options.repeats)


if __name__ == "__main__":
    main()
