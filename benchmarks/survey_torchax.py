"""Which classes of transformers run through torchax: each at a tiny size, against transformers itself.

Every causal, masked and sequence-to-sequence class of the installed transformers gets a small random model, which is
saved and loaded through the files a user would have (`interop.load_base(..., backend="torchax")`). Its logits are
compared with transformers' own, with padding on the right. Each class runs in a process of its own, with a time limit.

    python benchmarks/survey_torchax.py --seconds 60

The table says for each class: the largest difference of the logits, the number of layers that experts can adapt, or the
reason why it does not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A size that a config has under one of these names is made small.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def classes() -> dict[str, str]:
    """Return the classes to try, with their task."""
    from transformers.models.auto import modeling_auto

    tables: dict[str, Any] = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for task, table in tables.items():
        for name in table.values():
            for single in (name,) if isinstance(name, str) else name:
                found.setdefault(single, task)
    return found


def attempt(name: str) -> dict[str, Any]:
    """Run one class; return the largest difference of the logits and the number of layers."""
    import numpy as np
    import torch
    import transformers

    from interop import load_base

    kind = getattr(transformers, name)
    config = kind.config_class()
    for field, value in SMALL.items():
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, value)
    for field in ("layer_types", "mlp_layer_types"):
        if isinstance(vars(config).get(field), list):
            setattr(config, field, getattr(config, field)[:2])
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = np.arange(14).reshape(2, 7) % 60 + 5
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with torch.no_grad():
            theirs = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
        base = load_base(folder, backend="torchax", dtype="float32")
        ours = np.asarray(base(**inputs).logits)
    kept = mask[:, : theirs.shape[1]] != 0 if not config.is_encoder_decoder else np.ones(theirs.shape[:2], bool)
    return {"difference": float(np.abs(ours - theirs)[kept].max()), "layers": len(base.origin.family.layers)}


def main() -> None:
    """Try every class and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--class", dest="only", help="run this class alone, in this process, and print its result")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of each class")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/output/torchax.md"), help="page to write")
    arguments = parser.parse_args()
    if arguments.only:
        try:
            result = attempt(arguments.only)
        except Exception as error:  # whatever a class's code raises is the result
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result))
        return
    rows = []
    for name, task in sorted(classes().items()):
        command = [sys.executable, __file__, "--class", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.seconds, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            result = json.loads(lines[-1]) if lines else {"error": f"ended with status {done.returncode}"}
        except subprocess.TimeoutExpired:
            result = {"error": f"not done within {arguments.seconds:.0f} s"}
        rows.append((name, task, result))
        print(name, result, flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page(rows), encoding="utf-8")


def page(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Return the table as a page of the documentation."""
    works = [row for row in rows if row[2].get("difference", 1) < 1e-4]
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "torchax", "jax"))
    lines = [
        "# Models by torchax",
        "",
        f"Of {len(rows)} causal, masked and sequence-to-sequence classes, {len(works)} run as JAX functions, with",
        f"logits within 1e-4 of transformers' own ({packages}).",
        "Each was tried with its own default config made small, random weights, float32, on a CPU; a class that needs",
        "other settings fails here and may run with them. The command: `python benchmarks/survey_torchax.py`.",
        "",
        "| class | task | largest difference | layers that experts can adapt | why not |",
        "|---|---|---|---|---|",
    ]
    for name, task, result in rows:
        reason = " ".join(result.get("error", "").replace("|", "/").split())[:160]
        difference = f"{result['difference']:.1e}" if "difference" in result else ""
        lines.append(f"| `{name}` | {task} | {difference} | {result.get('layers', '')} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
