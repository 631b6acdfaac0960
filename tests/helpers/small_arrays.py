"""A small X-LoRA model without files, with experts of unequal ranks and a layer without experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax import XLora, XLoraConfig, XLoraModel
from xlora_jax.layers.adapted import ABSENT, AdaptedLayers, Slot
from xlora_jax.models import Decoder, DecoderConfig, Rope

VOCAB, WIDTH, N, LAYERS = 31, 16, 3, 3
NAMES = ("a.embed", "a.0.q", "a.0.up", "a.2.q", "a.2.up", "a.head")
SLOTS = (
    Slot(("embed_tokens",), 0),
    Slot(("layers", "self_attn", "q_proj"), (1, ABSENT, 3)),
    Slot(("layers", "mlp", "up_proj"), (2, ABSENT, 4)),
    Slot(("lm_head",), 5),
)


def decoder(**changes: Any) -> Decoder:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_layers": LAYERS,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "rope": Rope(6, 100.0),
        "qkv_bias": True,
    }
    return Decoder(DecoderConfig(**{**config, **changes}))


def make_experts(seed: int, params: dict[str, Any]) -> dict[str, Any]:
    """Return experts of ranks 1, 2, 3 at every slot; members without experts have columns of zeros."""
    rng = np.random.default_rng(seed)
    columns = np.repeat(np.diag([2.0, 0.5, 1.0]), [1, 2, 3], axis=1).astype(np.float32)
    tree: dict[str, Any] = {}
    for slot in SLOTS:
        leaf: Any = params
        for key in slot.path:
            leaf = leaf[key]
        kernel = leaf.get("kernel", leaf.get("embedding"))
        lead, (width_in, width_out) = kernel.shape[:-2], kernel.shape[-2:]
        here = np.stack([columns * (number != ABSENT) for number in np.ravel(slot.numbers)]).reshape(*lead, N, 6)
        node = tree
        for key in slot.path[:-1]:
            node = node.setdefault(key, {})
        node[slot.path[-1]] = {
            "lora_a": jnp.asarray(rng.normal(size=(*lead, width_in, 6)) / 2, jnp.float32),
            "lora_b": jnp.asarray(rng.normal(size=(*lead, 6, width_out)) / 4, jnp.float32),
            "columns": jnp.asarray(here, jnp.float32),
        }
    return tree


def random_like(seed: int, shapes: Any) -> Any:
    """Return random arrays: matrices keep the variance of their inputs, norms and biases are not neutral."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        scale = {"kernel": 1.5 * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0, "embedding": 1.0}.get(name, 0.3)
        return jnp.asarray(scale * rng.normal(size=leaf.shape) + (name == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_model(module: Decoder | None = None, seed: int = 0, **settings: Any) -> XLoraModel:
    module = module or decoder()
    config = XLoraConfig(
        **{"hidden_size": WIDTH, "adapters": {"x": "1", "y": "2", "z": "3"}, "xlora_dropout_p": 0.0, **settings}
    )
    layers = AdaptedLayers(NAMES, SLOTS)
    xlora = XLora(module, layers, N, config)
    base = random_like(seed, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    hidden = jnp.zeros((1, 1, WIDTH))
    classifier = random_like(seed + 1, jax.eval_shape(xlora.classifier.init, jax.random.key(0), hidden)["params"])
    params = {"base": base, "experts": make_experts(seed, base), "classifier": classifier}
    return XLoraModel(module, params, config, layers, ("x", "y", "z"))


def tokens(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)
