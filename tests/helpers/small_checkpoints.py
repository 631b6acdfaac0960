"""Small X-LoRA models as plain arrays, for tests of files, without torch or a base model."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from interop.peft.adapter import LoraAdapter, LoraLayer
from xlora_jax.config import XLoraConfig

NAMES = ("math", "code", "prose")


def small_adapter(name, ranks, value=None, inputs=3, outputs=2, **config):
    """Return an adapter of linear layers with these ranks, with random or constant factors."""
    rng = np.random.default_rng(abs(hash(name)) % 2**32)
    layers = {}
    for path, r in ranks.items():
        a, b = rng.normal(size=(inputs, r)).astype("f4"), rng.normal(size=(r, outputs)).astype("f4")
        if value is not None:
            a[:], b[:] = value, value
        layers[path] = LoraLayer("linear", a, b, None, r, 2 * r, 2.0, 0.0)
    first = next(iter(ranks.values()))
    ranks_pattern = {"^" + re.escape(path): r for path, r in ranks.items() if r != first}
    alphas = {"^" + re.escape(path): 2 * r for path, r in ranks.items() if r != first}
    settings = {"peft_type": "LORA", "r": first, "lora_alpha": 2 * first, "target_modules": ["q_proj"]}
    return LoraAdapter(
        name, Path(), settings | {"rank_pattern": ranks_pattern, "alpha_pattern": alphas} | config, layers
    )


BLOCKS = [f"model.layers.{i}.{module}" for i in range(2) for module in ("self_attn.q_proj", "mlp.up_proj")]


def small_model(depth=2, layerwise=True, names=NAMES, value=None, dtype="f4", size=4, **options):
    """Return the arguments of `write_xlora` for a small random model."""
    config = XLoraConfig(
        hidden_size=5, adapters=dict.fromkeys(names, ""), xlora_depth=depth, xlora_size=size,
        layerwise_scalings=layerwise, **options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    widths = [5] + [size] * (depth - 1) + [len(names) * (len(BLOCKS) if layerwise else 1)]
    shapes = list(pairwise(widths))
    fill = rng.normal if value is None else lambda size: np.full(size, value)
    classifier = [tuple(fill(size=s).astype(dtype) for s in (shape, shape[1:])) for shape in shapes]
    adapters = [small_adapter(name, dict.fromkeys(BLOCKS, 2), value) for name in names]
    return {
        "config": config,
        "classifier": classifier,
        "adapters": adapters,
        "base_model": "org/base",
        "layer_names": BLOCKS,
    }
