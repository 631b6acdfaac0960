"""Drafting on a trained gate: the share of drafts that are right, and the cost of a token relative to the base model.

    python benchmarks/generate_trained.py BASE CHECKPOINT --prompts FILE [--new 128] [--repeats 5]

Three kinds of drafts are compared on the same texts: the adapted model with the gates of the previous token; guesses
from the text itself; and the base model's own next token, which the scaling pass could give (not implemented: its
acceptance is computed from the finished texts). Reads are reads of the weights per token: 1 for the base model, 2 for
plain decoding. "auto" is the default, which chooses the way that is likely to be fastest. The prompt file has one JSON
string per line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from interop import load_xlora
from xlora_jax import BaseModel


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    model = load_xlora(options.base, checkpoint=options.checkpoint, dtype=options.dtype, scan_layers=False)
    alone = BaseModel(model.module, model.params["base"])
    print(f"{options.checkpoint}: jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.new} new tokens\n")
    console = Console(width=140)
    table = Table(title=f"{options.new} new tokens; times are medians, relative to the base model's own decoding")
    ways = ("plain", "gates", "lookup", "auto")
    for column in ("prompt", "right: gates", "base", "guessed", "reads: gates", "lookup", *ways, "same text"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    for line in options.prompts.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        ids = np.asarray([tokenizer(prompt)["input_ids"]])
        calls: dict[str, Callable[[], jax.Array]] = {"base": partial(alone.generate, ids, max_new_tokens=options.new)}
        for way, draft in zip(ways, (False, "gates", "lookup", True), strict=True):
            calls[way] = partial(model.generate, ids, max_new_tokens=options.new, draft=draft)
        texts, stats = {}, {}
        for name, call in calls.items():
            texts[name] = np.asarray(call())
            stats[name] = model.get_generation_stats()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.repeats):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in times.items()}
        text = texts["plain"]
        logits = alone(text).logits
        assert logits is not None
        next_of_base = np.asarray(logits.argmax(-1))[0, ids.shape[1] : -1]
        gates, lookup = stats["gates"], stats["lookup"]
        assert gates is not None
        assert gates.acceptance is not None
        assert lookup is not None
        table.add_row(
            repr(prompt[:28]),
            f"{gates.acceptance:.1%}",
            f"{np.mean(next_of_base == text[0, ids.shape[1] + 1 :]):.1%}",
            f"{lookup.guessed:.1%}",
            f"{gates.reads_per_token:.2f}",
            f"{lookup.reads_per_token:.2f}",
            *(f"{median[way] / median['base']:.2f}" for way in ways),
            "yes" if all(np.array_equal(text, texts[way]) for way in ways) else "NO",
        )
    console.print(table)


if __name__ == "__main__":
    main()
