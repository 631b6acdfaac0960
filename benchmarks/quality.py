"""Quality of a gate trained here and one trained by PEFT, on the quickstart's data, with the same start and settings.

    python benchmarks/quality.py                 # PEFT against this library, one setting
    python benchmarks/quality.py --table         # held-out loss by setting, this library alone

Base and experts are those of examples/quickstart.py. Held-out loss in nats per token, per domain and mean.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from interop import classifier_from_torch, load_base, load_xlora
from xlora_jax import BaseModel, XLoraConfig, XLoraModel, init_train_state, make_train_step
from xlora_jax.training.data import Rows
from xlora_jax.training.evaluation import evaluate
from xlora_jax.training.step import make_eval_step

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

RATE = 3e-3
TABLE: dict[str, dict[str, Any]] = {
    "dense, depth 1": {},
    "dense, depth 2": {"xlora_depth": 2},
    "dense, depth 4": {"xlora_depth": 4},
    "top-1": {"top_k_lora": 1},
    "top-2": {"top_k_lora": 2},
    "layerwise, depth 1": {"layerwise_scalings": True},
    "layerwise, depth 2": {"layerwise_scalings": True, "xlora_depth": 2},
    "layerwise, top-2": {"layerwise_scalings": True, "top_k_lora": 2},
}


def orders(tables: list[np.ndarray], steps: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the batches of every run, int32 [batch, tokens], with the domains in equal shares."""
    random = np.random.default_rng(2)
    for _ in range(steps):
        chosen = random.permutation(np.arange(batch) % len(tables))
        yield np.stack([tables[table][random.integers(len(tables[table]))] for table in chosen])


def config_for(assets: Any, base: BaseModel, **settings: Any) -> XLoraConfig:
    """Return a config without dropout, because PEFT's masks can't be reproduced here."""
    return XLoraConfig(
        hidden_size=base.module.config.hidden_size,
        adapters={name: str(path) for name, path in assets.adapters.items()},
        **{"xlora_size": 256, "xlora_dropout_p": 0.0, **settings},
    )


def train_here(model: XLoraModel, batches: Iterator[np.ndarray]) -> tuple[dict[str, Any], Any]:
    """Train the gate of a model; return the trained and the frozen parameters."""
    optimizer = optax.adamw(RATE, weight_decay=0.0)
    state, frozen = init_train_state(model.params, model.config, optimizer)
    step = make_train_step(model.xlora, optimizer)
    for ids in batches:
        state, _ = step(state, frozen, {"input_ids": ids, "labels": ids})
    return state.trainable, frozen


def held_out(model: XLoraModel, trainable: Any, frozen: Any, assets: Any, rows: int) -> dict[str, float]:
    """Return the held-out loss of each domain, and their mean."""
    step = make_eval_step(model.xlora)
    losses = {}
    for name, table in assets.held_out.items():
        losses[name], _ = evaluate(step, trainable, frozen, Rows.from_tokens(table[:rows]), 8)
    return {**losses, "mean": float(np.mean(list(losses.values())))}


def against_peft(assets: Any, base: BaseModel, arguments: argparse.Namespace) -> None:
    """Train both gates from PEFT's random start on the same batches, and evaluate both here."""
    import torch
    import transformers
    from peft import XLoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"xlora_depth": 2, "layerwise_scalings": True}
    hf: Any = AutoModelForCausalLM.from_pretrained(assets.base)
    hf.config.use_cache = False
    config = config_for(assets, base, **settings)
    numbered = {str(i): path for i, path in enumerate(config.adapters.values())}
    fields = {"hidden_size": config.hidden_size, "xlora_size": 256, "xlora_dropout_p": 0.0, **settings}
    theirs: Any = get_peft_model(hf, PeftConfig(task_type="CAUSAL_LM", adapters=numbered, **fields)).train()
    # In training mode PEFT applies the experts' dropout too; these adapters have none.
    gate = theirs.base_model.internal_xlora_classifier
    start = classifier_from_torch(gate)
    tables = list(assets.train.values())
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=0.0)
    for ids in orders(tables, arguments.steps, arguments.batch):
        tokens = torch.from_numpy(ids).long()
        optimizer.zero_grad()
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    model = load_xlora(base, config=config)
    model = model.replace(params={**model.params, "classifier": start})
    trainable, frozen = train_here(model, orders(tables, arguments.steps, arguments.batch))
    results = {
        "at the start": held_out(model, {"classifier": start}, frozen, assets, arguments.rows),
        "trained by PEFT": held_out(model, {"classifier": classifier_from_torch(gate)}, frozen, assets, arguments.rows),
        "trained here": held_out(model, trainable, frozen, assets, arguments.rows),
    }
    show(results)
    ratio = results["trained here"]["mean"] / results["trained by PEFT"]["mean"]
    print(f"here / PEFT: {ratio:.5f}; largest difference of a domain: {largest(results):.2%}")


def largest(results: Mapping[str, Mapping[str, float]]) -> float:
    """Return the largest relative difference of a domain's loss between the two results."""
    ours, theirs = results["trained here"], results["trained by PEFT"]
    return max(abs(ours[name] / theirs[name] - 1) for name in ours)


def table(assets: Any, base: BaseModel, arguments: argparse.Namespace) -> None:
    """Train and evaluate every setting of the table."""
    results = {}
    for name, settings in TABLE.items():
        model = load_xlora(base, config=config_for(assets, base, **settings))
        trainable, frozen = train_here(model, orders(list(assets.train.values()), arguments.steps, arguments.batch))
        results[name] = held_out(model, trainable, frozen, assets, arguments.rows)
        show({name: results[name]}, header=len(results) == 1)


def show(results: Mapping[str, Mapping[str, float]], header: bool = True) -> None:
    """Print losses as a table in Markdown."""
    names = list(next(iter(results.values())))
    if header:
        print(f"| setting | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for setting, losses in results.items():
        print(f"| {setting} | {' | '.join(f'{losses[name]:.4f}' for name in names)} |", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows of each domain")
    parser.add_argument("--cache", type=Path, default=EXAMPLES / ".cache" / "quickstart")
    arguments = parser.parse_args()

    assets = importlib.import_module("quickstart_assets").prepare(arguments.cache, Console(stderr=True))
    base = load_base(assets.base)
    jax.config.update("jax_default_matmul_precision", "highest")
    (table if arguments.table else against_peft)(assets, base, arguments)


if __name__ == "__main__":
    main()
