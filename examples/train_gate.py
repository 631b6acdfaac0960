"""Your own training loop in a few lines of optax.

python examples/train_gate.py BASE NAME=ADAPTER NAME=ADAPTER ... --text FILE
"""

import argparse
from pathlib import Path

import optax

from interop import load_codec, load_xlora, save_xlora
from xlora_jax import Loader, encode_records, init_train_state, lay_out, make_train_step, merge_params, read_records

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base", help="HF model directory or hub id")
parser.add_argument("adapters", nargs="+", help="NAME=DIRECTORY of PEFT LoRA adapters")
parser.add_argument("--text", required=True, help="a .jsonl or .txt file")
parser.add_argument("--output", type=Path, default=Path("gate"))
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()

# Rows of tokens: several documents share a row, and each attends to itself only.
rows = lay_out(encode_records(read_records(arguments.text), load_codec(arguments.base)), length=128)
loader = Loader(rows, batch_size=8, seed=0)

model = load_xlora(arguments.base, adapters=dict(pair.split("=", 1) for pair in arguments.adapters))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, arguments.steps)))
state, frozen = init_train_state(model.params, model.config, optimizer)
step = make_train_step(model.xlora, optimizer)

for number, batch in zip(range(arguments.steps), loader, strict=False):
    del batch["row"]  # the rows' numbers
    state, metrics = step(state, frozen, batch)
    if number % 10 == 0:
        print(f"step {number}: loss {float(metrics['loss']):.4f}, gradient {float(metrics['grad_norm']):.3f}")

save_xlora(model.replace(params=merge_params(state.trainable, frozen)), arguments.output)
print(f"The trained gate is in {arguments.output}; PeftModel.from_pretrained loads it.")
