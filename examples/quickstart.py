"""X-LoRA from end to end: PEFT adapters in, a classifier trained in JAX, a PEFT checkpoint out.

    python examples/quickstart.py      (or: make demo)

Four LoRA adapters, made by PEFT, each know one kind of text. A small classifier learns which adapter each token needs.
Then held-out losses are compared, and PEFT loads the export and must give the same logits.

quickstart_assets.py makes the base model and the adapters once and keeps them. They stand in for your own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart_assets import DOMAINS, PROMPTS, batches, prepare, progress_bar, quiet
from quickstart_picture import draw
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from interop import load_base, load_xlora, save_xlora
from xlora_jax import XLoraConfig, XLoraModel, causal_lm_loss, init_train_state, make_train_step, merge_params

HERE = Path(__file__).parent
COLORS = dict(zip(DOMAINS, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
BATCH, RATE = 12, 3e-2
HELD_OUT_ROWS = 32

# A few lines of every domain; not in the training text.
TOUR = """\
If the file does not exist, an error is raised. Otherwise the number of lines is returned.
def count_lines(self, path, encoding=None):
    with open(path, 'r', encoding=encoding) as file:
        return len(file.readlines())
4685+3758
5+8+0=13
8+5+1=14
6+7+1=14
4+3+1=08
answer 8443
{"name": "LATIN SMALL LETTER X WITH TILDE", "category": "Ll", "bidirectional": "L", "width": "N"}
The result is the same as that of the method, but the object is not changed.
"""


def main() -> int:
    """Run all steps; the exit status is 1 if the gate or the export is not good enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "quickstart", help="for base model and experts")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "quickstart", help="for the results")
    parser.add_argument("--steps", type=int, default=80, help="training steps of the gate")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    quiet()
    start = time.perf_counter()

    console.rule("1. A base model and four LoRA adapters, as Hugging Face files")
    assets = prepare(arguments.cache, console)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(assets.base)
    console.print(f"base model: {assets.base}")
    console.print(*(f"{name} expert: {path}" for name, path in assets.adapters.items()), sep="\n")
    prepared = time.perf_counter()

    console.rule("2. Train the gate")
    base = load_base(assets.base)
    config = XLoraConfig(hidden_size=base.module.config.hidden_size, adapters=assets.adapters)
    model = load_xlora(base, config=config)
    model = train_gate(model, batches(list(assets.train.values()), BATCH, seed=2), arguments.steps, console)

    console.rule("3. Loss on held-out text, in nats per token")
    held_out = {domain: rows[:HELD_OUT_ROWS] for domain, rows in assets.held_out.items()}
    losses = held_out_losses(model, held_out)
    console.print(loss_table(losses))

    console.rule("4. Generated text, each token in the color of its leading expert")
    console.print(written_text(model, tokenizer))

    console.rule("5. Export, and reload in PEFT")
    exported = arguments.output / "xlora"
    save_xlora(model, exported)
    difference = difference_in_peft(
        model, assets.base, exported, np.concatenate([rows[:2] for rows in held_out.values()])
    )
    console.print(f"{exported} loaded by PeftModel.from_pretrained: ||ours - PEFT's|| / ||PEFT's|| = {difference:.1e}")

    console.rule("6. A picture")
    picture = arguments.output / "experts.png"
    shares = {
        domain: dict(zip(model.expert_names, gates(model, rows).mean((0, 1)).tolist(), strict=True))
        for domain, rows in held_out.items()
    }
    tour = tokenizer(TOUR, return_tensors="np")["input_ids"]
    pieces = tokenizer.batch_decode(tour[0, 1:, None])
    draw(picture, tokens=pieces, gates=gates(model, tour)[0, 1:], shares=shares, losses=losses, colors=COLORS)
    console.print(str(picture))

    failures = verdict(losses, difference)
    seconds = {"assets": prepared - start, "rest": time.perf_counter() - prepared}
    results = {"losses": losses, "shares": shares, "difference_in_peft": difference, "failures": failures}
    (arguments.output / "results.json").write_text(json.dumps({**results, "seconds": seconds}, indent=2) + "\n")
    for failure in failures:
        console.print(f"[bold red]{failure}")
    if not failures:
        console.print("[bold green]Better than base and uniform mix on every domain, within 5% of its own expert.")
    console.print(f"{seconds['assets']:.0f} s for base and adapters, {seconds['rest']:.0f} s for the rest")
    return 1 if failures else 0


def train_gate(model: XLoraModel, rows: Iterator[np.ndarray], steps: int, console: Console) -> XLoraModel:
    """Train the classifier on mixed text; base and experts are frozen."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    state, frozen = init_train_state(model.params, model.config, optimizer)
    step = make_train_step(model.xlora, optimizer)
    with progress_bar(console) as progress:
        task = progress.add_task("gate, on mixed text", total=steps, loss=float("nan"))
        for tokens in itertools.islice(rows, steps):
            state, metrics = step(state, frozen, {"input_ids": jnp.asarray(tokens), "labels": jnp.asarray(tokens)})
            progress.update(task, advance=1, loss=float(metrics["loss"]))
    return model.replace(params=merge_params(state.trainable, frozen))


def held_out_losses(model: XLoraModel, held_out: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return variant -> domain -> loss: the base, each expert alone, all experts at 1/n, and the trained gate."""
    n = len(model.expert_names)
    constant = {f"expert {name}": one_hot for name, one_hot in zip(model.expert_names, np.eye(n), strict=True)}
    variants = {"base": None, **constant, "uniform mix": np.full(n, 1 / n), "X-LoRA": None}
    losses: dict[str, dict[str, float]] = {}
    for variant, scalings in variants.items():
        losses[variant] = {}
        for domain, rows in held_out.items():
            with model.disable_adapter() if variant == "base" else nullcontext():
                logits = model(rows, scalings=scalings).logits
            assert logits is not None
            losses[variant][domain] = float(causal_lm_loss(logits, jnp.asarray(rows)))
    return losses


def loss_table(losses: dict[str, dict[str, float]]) -> Table:
    """Return a table of losses with a row for each variant; the domain's own expert is underlined."""
    table = Table("", *(f"[{COLORS[domain]}]{domain}" for domain in DOMAINS))
    for variant, row in losses.items():
        cells = [Text(f"{row[domain]:.3f}", "underline" if variant == f"expert {domain}" else "") for domain in DOMAINS]
        table.add_row(variant, *cells, style="bold" if variant == "X-LoRA" else "")
    against = [losses["X-LoRA"][domain] / losses[f"expert {domain}"][domain] - 1 for domain in DOMAINS]
    table.add_section()
    table.add_row("X-LoRA against own expert", *(f"{difference:+.1%}" for difference in against))
    return table


def gates(model: XLoraModel, tokens: jax.typing.ArrayLike, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the gates of each token, float [B, T, N], averaged over the adapted layers."""
    scalings: np.ndarray = np.asarray(model(tokens, attention_mask=mask).scalings).mean(axis=2)
    return scalings


def written_text(model: XLoraModel, tokenizer: PreTrainedTokenizerFast) -> Table:
    """Return one continuation for each domain, generated as one batch padded on the left."""
    prompts = tokenizer(list(PROMPTS.values()), padding=True, return_tensors="np")
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    tokens = model.generate(ids, mask, max_new_tokens=64, do_sample=True, temperature=0.4)
    length = ids.shape[1]
    full_mask = np.pad(mask, ((0, 0), (0, tokens.shape[1] - length)), constant_values=1)
    leaders = gates(model, tokens, full_mask).argmax(-1)

    table = Table("prompt", "continuation", show_lines=True)
    for i, prompt in enumerate(PROMPTS.values()):
        text = Text()
        pieces = tokenizer.batch_decode(np.asarray(tokens[i, length:, None]))
        for piece, leader in zip(pieces, leaders[i, length:], strict=True):
            text.append(piece, COLORS[model.expert_names[leader]])
        table.add_row(Text(prompt), text)
    return table


def difference_in_peft(model: XLoraModel, base: Path, exported: Path, rows: np.ndarray) -> float:
    """Return ||ours - theirs|| / ||theirs|| of the logits, where theirs are PEFT's for the exported directory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, use_cache=False), exported).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(rows).long()).logits.numpy()
    return float(np.linalg.norm(model(rows).logits - expected) / np.linalg.norm(expected))


def verdict(losses: dict[str, dict[str, float]], difference: float) -> list[str]:
    """Return a message for each claim that does not hold."""
    failures = []
    for domain in DOMAINS:
        ours = losses["X-LoRA"][domain]
        limits = {
            "the base": losses["base"][domain],
            "the uniform mix": losses["uniform mix"][domain],
            "its own expert + 5%": 1.05 * losses[f"expert {domain}"][domain],
        }
        # Test `not ours < m` and not `ours >= m`, so that NaN fails too.
        failures += [f"{domain}: {ours:.3f} is not below {what}, {m:.3f}" for what, m in limits.items() if not ours < m]
    if not difference <= 1e-5:
        failures.append(f"logits in PEFT differ by {difference:.1e}, more than 1e-5")
    return failures


if __name__ == "__main__":
    sys.exit(main())
