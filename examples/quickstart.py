"""X-LoRA from end to end: PEFT adapters in, a classifier trained in JAX, a PEFT checkpoint out.

    python examples/quickstart.py      (or: make demo)

Four LoRA adapters, made by PEFT, each know one kind of text. A small classifier learns which adapter each token needs.
Then held-out losses are compared, PEFT loads the export and must give the same logits, and a page shows the routing.

quickstart_assets.py makes the base model and the adapters once and keeps them. They stand in for your own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from xlora_jax import (
    RoutedText,
    RoutingReport,
    Rows,
    XLoraConfig,
    XLoraModel,
    init_train_state,
    make_train_step,
    merge_params,
    report_routing,
)
from xlora_jax.routing.metrics import log_values
from xlora_jax.routing.text import Part, pieces_of

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
    model, history = train_gate(model, batches(list(assets.train.values()), BATCH, seed=2), arguments.steps, console)

    console.rule("3. Generated text, each token in the color of its leading expert")
    written = written_texts(model, tokenizer)
    console.print(text_table(written))

    console.rule("4. Loss on held-out text, in nats per token")
    held_out = {domain: rows[:HELD_OUT_ROWS] for domain, rows in assets.held_out.items()}
    tour = model.routing(TOUR, name="a tour")
    report = report_routing(
        model,
        {domain: Rows.from_tokens(rows) for domain, rows in held_out.items()},
        effects=True,
        samples=[tour, *written],
        training=history,
    )
    losses = losses_of(report)
    console.print(loss_table(losses))

    console.rule("5. Export, and reload in PEFT")
    exported = arguments.output / "xlora"
    save_xlora(model, exported)
    difference = difference_in_peft(
        model, assets.base, exported, np.concatenate([rows[:2] for rows in held_out.values()])
    )
    console.print(f"{exported} loaded by PeftModel.from_pretrained: ||ours - PEFT's|| / ||PEFT's|| = {difference:.1e}")

    console.rule("6. A picture, and a page")
    picture = arguments.output / "experts.png"
    shares = {
        domain: dict(zip(model.expert_names, np.mean(entry["mean_gates"], axis=0).tolist(), strict=True))
        for domain, entry in report.content["texts"].items()
    }
    gates = tour.gates.mean(axis=1)
    draw(picture, tokens=tour.tokens[1:], gates=gates[1:], shares=shares, losses=losses, colors=COLORS)
    console.print(str(picture))
    page = report.write(arguments.output / "report")

    failures = verdict(losses, difference)
    seconds = {"assets": prepared - start, "rest": time.perf_counter() - prepared}
    results = {"losses": losses, "shares": shares, "difference_in_peft": difference, "failures": failures}
    (arguments.output / "results.json").write_text(json.dumps({**results, "seconds": seconds}, indent=2) + "\n")
    for failure in failures:
        console.print(f"[bold red]{failure}")
    if not failures:
        console.print("[bold green]Better than base and uniform mix on every domain, within 5% of its own expert.")
    console.print(f"{seconds['assets']:.0f} s for base and adapters, {seconds['rest']:.0f} s for the rest")
    console.print("The routing report, to open in a browser:")
    console.print(str(page), soft_wrap=True)
    return 1 if failures else 0


def train_gate(
    model: XLoraModel, rows: Iterator[np.ndarray], steps: int, console: Console
) -> tuple[XLoraModel, list[dict[str, Any]]]:
    """Train the classifier on mixed text, with base and experts frozen; return the model and the metrics by step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    state, frozen = init_train_state(model.params, model.config, optimizer)
    step = make_train_step(model.xlora, optimizer)
    history = []
    with progress_bar(console) as progress:
        task = progress.add_task("gate, on mixed text", total=steps, loss=float("nan"))
        for number, tokens in enumerate(itertools.islice(rows, steps), 1):
            state, metrics = step(state, frozen, {"input_ids": jnp.asarray(tokens), "labels": jnp.asarray(tokens)})
            loss = float(metrics["loss"])
            routing = log_values(metrics["routing"], model.expert_names)
            history.append({"step": number, "kind": "train", "loss": loss, **routing})
            progress.update(task, advance=1, loss=loss)
    return model.replace(params=merge_params(state.trainable, frozen)), history


def losses_of(report: RoutingReport) -> dict[str, dict[str, float]]:
    """Return variant -> domain -> loss: the base, each expert alone, all experts at 1/n, and the trained gate."""
    texts = report.content["texts"]
    alone = {
        f"expert {name}": {domain: entry["effects"]["alone"][number] for domain, entry in texts.items()}
        for number, name in enumerate(report.content["experts"])
    }
    return {
        "base": {domain: entry["base_loss"] for domain, entry in texts.items()},
        **alone,
        "uniform mix": {domain: entry["effects"]["uniform"] for domain, entry in texts.items()},
        "X-LoRA": {domain: entry["loss"] for domain, entry in texts.items()},
    }


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


def written_texts(model: XLoraModel, tokenizer: PreTrainedTokenizerFast) -> list[RoutedText]:
    """Return one continuation for each domain with its gates, generated as one batch padded on the left."""
    prompts = tokenizer(list(PROMPTS.values()), padding=True, return_tensors="np")
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    tokens = np.asarray(model.generate(ids, mask, max_new_tokens=64, do_sample=True, temperature=0.4))
    width = ids.shape[1]
    full_mask = np.pad(mask, ((0, 0), (0, tokens.shape[1] - width)), constant_values=1)
    gates = model.gates_of(tokens, full_mask)
    texts = []
    for row, domain in enumerate(PROMPTS):
        own = full_mask[row] != 0
        texts.append(
            RoutedText(
                pieces_of(tokens[row, own].tolist(), lambda ids: str(tokenizer.decode(list(ids)))),
                gates[row, own],
                model.expert_names,
                model.routing_layers,
                (Part(0, "prompt"), Part(int(mask[row].sum()), "generated")),
                domain,
            )
        )
    return texts


def text_table(texts: Sequence[RoutedText]) -> Table:
    """Return a table of prompts and continuations, each new token in the color of its leading expert."""
    table = Table("prompt", "continuation", show_lines=True)
    for written in texts:
        start = written.parts[-1].start
        text = Text()
        for piece, leader in zip(written.tokens[start:], written.leaders[start:], strict=True):
            text.append(piece, COLORS[written.expert_names[leader]])
        table.add_row(Text(PROMPTS[written.name]), text)
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
