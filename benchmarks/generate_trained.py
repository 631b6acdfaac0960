"""Drafting on a trained gate: how many drafts are right, and what a token costs beside the base model's.

    python benchmarks/generate_trained.py BASE CHECKPOINT --prompts FILE [--new 128] [--repeats 5]

Two drafts are compared on the same texts: the one that is built in, the adapted model with the gates of the token
before; and the base model's own next token, which the scaling pass could give (its acceptance is computed from the
finished texts). Prompts stand one a line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from transformers import AutoTokenizer

from interop import load_xlora
from xlora_jax import BaseModel
from xlora_jax.generation import Drafted

# Never out of credit: every token is drafted.
ALWAYS = Drafted(cost=1e-3)


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

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = load_xlora(options.base, checkpoint=options.checkpoint, dtype=options.dtype, scan_layers=False)
    alone = BaseModel(model.module, model.params["base"])
    print(f"{options.checkpoint}: jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.new} new tokens\n")
    print(f"{'prompt':32s} {'stale gates':>11s} {'base draft':>11s} {'reads/token':>11s}  x base: plain drafted  same")
    for line in options.prompts.read_text(encoding="utf-8").splitlines():
        ids = np.asarray([tokenizer(line)["input_ids"]])
        if not ids.size:
            continue
        ways: dict[str, Callable[[], jax.Array]] = {
            "base": partial(alone.generate, ids, max_new_tokens=options.new),
            "plain": partial(model.generate, ids, max_new_tokens=options.new, draft=False),
            "drafted": partial(model.generate, ids, max_new_tokens=options.new, draft=ALWAYS),
        }
        texts = {name: np.asarray(call()) for name, call in ways.items()}
        stats = model.get_generation_stats()
        assert stats is not None
        assert stats.acceptance is not None
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, call in ways.items():
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in times.items()}
        text = texts["plain"]
        logits = alone(text).logits
        assert logits is not None
        guesses = np.asarray(logits.argmax(-1))[0, ids.shape[1] : -1]
        base_draft = float(np.mean(guesses == text[0, ids.shape[1] + 1 :]))
        print(
            f"{line[:32]!r:34.34s} {stats.acceptance:9.1%} {base_draft:11.1%} {stats.reads_per_token:11.2f}"
            f"   {median['plain'] / median['base']:13.2f} {median['drafted'] / median['base']:8.2f}"
            f"  {'yes' if np.array_equal(text, texts['drafted']) else 'NO'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
