"""Small X-LoRA models of random arrays, without files, for tests of training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax import XLora, XLoraConfig
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.models import Decoder, DecoderConfig, Rope
from xlora_jax.trees import flatten, unflatten

VOCAB, WIDTH = 96, 32
_ADAPTED = ("q_proj", "o_proj", "up_proj", "down_proj")


def synthetic(
    experts: int = 3, layers: int = 2, rank: int = 4, head: bool = False, dtype: Any = jnp.float32, **config: Any
) -> tuple[XLora, dict[str, Any]]:
    """Return a model and its parameters: random arrays, experts on four projections (and on `lm_head`)."""
    decoder = DecoderConfig(VOCAB, WIDTH, 48, layers, 4, 2, 8, Rope(8))
    module = Decoder(decoder, dtype=dtype, param_dtype=dtype)
    base = module.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    kernels = {path[:-1]: leaf.shape for path, leaf in flatten(base).items() if path[-1] == "kernel"}
    targets = [path for path in kernels if path[-1] in _ADAPTED] + ([("lm_head",)] if head else [])
    slots, leaves, names = [], {}, []
    random = np.random.default_rng(1)
    columns = np.repeat(np.eye(experts, dtype=np.float32), rank, axis=1) * 2
    for path in targets:
        stack = () if path == ("lm_head",) else (layers,)
        numbers = tuple(range(len(names), len(names) + layers)) if stack else len(names)
        names += ["/".join(path)] * (layers if stack else 1)
        slots.append(Slot(path, numbers))
        width_in, width_out = kernels[path][-2:]
        r = rank * experts
        leaves[(*path, "lora_a")] = random.normal(size=(*stack, width_in, r)) * width_in**-0.5
        leaves[(*path, "lora_b")] = random.normal(size=(*stack, r, width_out)) * 0.3
        leaves[(*path, "columns")] = np.broadcast_to(columns, (*stack, experts, r))
    settings = {"xlora_depth": 2, "xlora_size": 24, "xlora_dropout_p": 0.0, **config}
    adapters = {f"expert {i}": "none" for i in range(experts)}
    model = XLora(
        module,
        AdaptedLayers(tuple(names), tuple(slots)),
        experts,
        XLoraConfig(hidden_size=WIDTH, adapters=adapters, **settings),
    )
    classifier = model.classifier.init(jax.random.key(2), jnp.ones((1, 1, WIDTH)))["params"]
    classifier = jax.tree.map(lambda leaf: leaf * 3, classifier)
    stacked = unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    return model, {"base": base, "experts": stacked, "classifier": classifier}


def batch(rows: int = 4, tokens: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Return `input_ids` and `labels`, int32 [B, T]; the first tokens of each row are not learned."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (rows, tokens)).astype(np.int32)
    labels = ids.copy()
    for row in range(rows):
        labels[row, : 1 + row % 4] = -100
    return {"input_ids": ids, "labels": labels}
