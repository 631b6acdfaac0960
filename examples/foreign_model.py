"""X-LoRA on a Flax model that knows nothing of this library.

`GPT` below is plain Flax Linen: a scanned, rematerialized decoder of `nn.Embed`, `nn.DenseGeneral` and `nn.Dense`. The
one line that X-LoRA needs is `variable_axes` of its `nn.scan`, so that the experts' arrays reach the blocks. Two
experts learn one rule each. Then the gate learns, from mixed text, which expert each token needs.

    python examples/foreign_model.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from xlora_jax import (
    Lora,
    XLoraConfig,
    XLoraModel,
    XLoraOutput,
    causal_lm_loss,
    convert,
    find_layers,
    forward,
    init_train_state,
    make_objective_step,
    merge_params,
)

VOCAB, WIDTH, HEADS, BLOCKS, LENGTH = 29, 32, 4, 2, 16


class Block(nn.Module):
    """A pre-norm transformer block."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Map the residual stream `[B, T, D]`; the signature is that of `nn.scan`."""
        width = x.shape[-1]
        y = nn.LayerNorm(name="attention_norm")(x)
        head = (self.heads, width // self.heads)
        q, k, v = (nn.DenseGeneral(head, name=name)(y) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(width, name="down")(y), None


class GPT(nn.Module):
    """A causal language model: int `[B, T]` to logits `[B, T, V]`."""

    vocab: int = VOCAB
    width: int = WIDTH
    heads: int = HEADS
    blocks: int = BLOCKS
    length: int = LENGTH

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits `[B, T, V]`."""
        positions = nn.Embed(self.length, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(self.vocab, self.width, name="tokens")(tokens) + positions
        scanned = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0, "experts": 0, "scalings": 0},  # the last two are for X-LoRA
            split_rngs={"params": True},
            length=self.blocks,
        )
        x, _ = scanned(self.heads, name="blocks")(x)
        x = nn.LayerNorm(name="final_norm")(x)
        return nn.Dense(self.vocab, use_bias=False, name="head")(x)


# A domain is a rule for the next token.
RULES = {"tripled": (3, 1), "reversed": (-1, 5)}


def text(domain: str, batch: int, seed: int) -> np.ndarray:
    """Return rows that follow the domain's rule from random starts: int32 [B, T]."""
    factor, shift = RULES[domain]
    rows = [np.random.default_rng(seed).integers(0, VOCAB, batch)]
    for _ in range(LENGTH - 1):
        rows.append((factor * rows[-1] + shift) % VOCAB)
    return np.stack(rows, axis=1).astype(np.int32)


def batch_of(domain: str, step: int) -> dict[str, jax.Array]:
    """Return a training batch."""
    tokens = jnp.asarray(text(domain, 32, seed=step))
    return {"input_ids": tokens, "labels": tokens}


def new_experts(module: GPT, params: Any, rank: int = 4) -> dict[str, dict[str, Lora]]:
    """Return an untrained expert for each domain, on every layer that has a row for each example."""
    random = np.random.default_rng(0)
    layers = find_layers(module, params, jnp.zeros((1, LENGTH), jnp.int32))
    del layers["positions"]
    experts: dict[str, dict[str, Lora]] = {domain: {} for domain in RULES}
    for loras in experts.values():
        for name, layer in layers.items():
            lead = () if layer.members is None else (layer.members,)
            width_in, width_out = layer.shape
            a = random.normal(size=(*lead, width_in, rank)) * width_in**-0.5
            loras[name] = Lora(a, np.zeros((*lead, rank, width_out)), alpha=2 * rank)
    return experts


def train_expert(model: XLoraModel, number: int, domain: str, steps: int) -> XLoraModel:
    """Train one expert alone, with its gate fixed at one."""
    optimizer = optax.adam(1e-2)
    one = jax.nn.one_hot(number, len(RULES))

    def loss_of(experts: Any, batch: dict[str, jax.Array]) -> jax.Array:
        out = forward(model.xlora, {**model.params, "experts": experts}, batch["input_ids"], scalings=one)
        assert out.logits is not None
        return causal_lm_loss(out.logits, batch["labels"])

    @jax.jit
    def step(experts: Any, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        grads = jax.grad(loss_of)(experts, batch)
        # `columns` assigns columns to experts; it is not trained.
        grads = jax.tree_util.tree_map_with_path(
            lambda path, grad: jnp.zeros_like(grad) if path[-1].key == "columns" else grad, grads
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(experts, updates), state

    experts = model.params["experts"]
    state = optimizer.init(experts)
    for i in range(steps):
        experts, state = step(experts, state, batch_of(domain, i))
    return model.replace(params={**model.params, "experts": experts})


def next_token_loss(out: XLoraOutput, labels: jax.Array) -> jax.Array:
    """Return the objective, from the output of both passes."""
    assert out.logits is not None
    return causal_lm_loss(out.logits, labels)


def loss_on(model: XLoraModel, domain: str, scalings: Any = None) -> float:
    """Return the loss on rows that were not trained on, in nats."""
    tokens = text(domain, 64, seed=10_000)
    out = model(tokens, scalings=scalings)
    assert out.logits is not None
    return float(causal_lm_loss(out.logits, jnp.asarray(tokens)))


def main(expert_steps: int = 150, gate_steps: int = 400) -> dict[str, dict[str, float]]:
    """Build and train the model, and print each domain's loss with every expert alone and with the gate."""
    module = GPT()
    example = jnp.zeros((1, LENGTH), jnp.int32)
    params = module.init(jax.random.key(0), example)["params"]
    config = XLoraConfig(hidden_size=WIDTH, adapters={}, layerwise_scalings=True, xlora_depth=2, xlora_size=128)
    model = convert(
        module,
        params,
        new_experts(module, params),
        config,
        hidden_states="final_norm",
        example={"input_ids": example},
    )
    for number, domain in enumerate(RULES):
        model = train_expert(model, number, domain, expert_steps)

    optimizer = optax.adam(1e-2)
    state, frozen = init_train_state(model.params, model.config, optimizer)
    step = make_objective_step(model.xlora, optimizer, next_token_loss)
    for i in range(gate_steps):
        state, _ = step(state, frozen, batch_of(list(RULES)[i % 2], i))
    model = model.replace(params=merge_params(state.trainable, frozen))

    losses = {}
    for domain in RULES:
        with model.disable_adapter():
            losses[domain] = {"base": loss_on(model, domain)}
        for number, expert in enumerate(RULES):
            losses[domain][expert] = loss_on(model, domain, np.eye(len(RULES))[number])
        losses[domain]["X-LoRA"] = loss_on(model, domain)
        print(domain, {name: round(loss, 3) for name, loss in losses[domain].items()})
    return losses


if __name__ == "__main__":
    main()
