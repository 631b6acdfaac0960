"""X-LoRA cell by cell: run it in VS Code, Spyder or Jupyter (jupytext), or as a whole.

python examples/walkthrough.py BASE NAME=ADAPTER NAME=ADAPTER ... --text NAME=FILE NAME=FILE ...
"""

# %% What is needed: an HF base model with its tokenizer, two or more PEFT LoRA adapters, and text that needs them.
import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np
from transformers import AutoTokenizer

from interop import load_xlora, save_xlora
from interop.hf.tokenizer import codec_of
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows, encode_records, lay_out, read_records
from xlora_jax.training.routing import make_routing_step
from xlora_jax.training.trainer import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER")
parser.add_argument("--text", nargs="+", metavar="NAME=FILE", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="walkthrough")
arguments = parser.parse_args()
texts = dict(pair.split("=", 1) for pair in arguments.text)

# %% The model: base and experts are frozen, the classifier is new. Parameters are one tree.
model = load_xlora(arguments.base, adapters=dict(pair.split("=", 1) for pair in arguments.adapters))
for part, tree in model.params.items():
    print(f"{part}: {sum(leaf.size for leaf in jax.tree.leaves(tree)):,} parameters")
print(f"{len(model.layer_names)} adapted layers, from {model.layer_names[0]} to {model.layer_names[-1]}")

# %% One call is both passes: base model, classifier, base model with the experts so mixed.
tokenizer = AutoTokenizer.from_pretrained(arguments.base, trust_remote_code=False)
rows = {
    name: lay_out(encode_records(read_records(path), codec_of(tokenizer)), length=64) for name, path in texts.items()
}
tokens = next(iter(rows.values())).arrays["input_ids"][:1, :12]
out = model(tokens)
assert out.logits is not None
assert out.scalings is not None
print(f"logits {out.logits.shape}; scalings {out.scalings.shape}: batch, tokens, layers, experts")
print("the gate of the last token, before it has learnt anything:", np.round(out.scalings[0, -1, 0], 2))


# %% What the gate does with each text: mean gate of each expert, loss of the base alone and with the experts.
step = make_routing_step(model.xlora)


def look(title: str) -> None:
    """Print and draw it."""
    _, panel = plt.subplots(layout="constrained")
    left = np.zeros(len(rows))
    means = {
        name: step(model.params, {key: array[:8] for key, array in part.arrays.items()}).mean()
        for name, part in rows.items()
    }
    gates = np.stack([np.asarray(mean.gates).mean(axis=0) for mean in means.values()])
    for name, mean in means.items():
        print(f"{title}, {name}: base {float(mean.base_loss):.3f}, X-LoRA {float(mean.loss):.3f} nats per token")
    for expert, share in zip(model.expert_names, gates.T, strict=True):
        panel.barh(list(rows), share, left=left, label=expert)
        left += share
    panel.set_title(f"mean gates, {title}")
    panel.legend()
    plt.savefig(f"{arguments.output}-{title.replace(' ', '-')}.png")


look("before training")

# %% Training. Settings are those of `xlora-jax train`; with output= it writes checkpoints and can be resumed.
keys = next(iter(rows.values())).arrays
together = Rows({key: np.concatenate([part.arrays[key] for part in rows.values()]) for key in keys})
config = TrainConfig(steps=arguments.steps, batch_size=4, learning_rate=1e-2, tensorboard=False)
result = train(model, together, config, show_progress=True)
model = result.model
look("after training")

# %% Text. Each pass has a cache of its own: a token costs two reads of the weights, fewer where drafts are right.
written = model.generate(tokens, max_new_tokens=24)
print(tokenizer.decode(np.asarray(written)[0]))
print(model.get_generation_stats())

# %% Back to PEFT: PeftModel.from_pretrained reads this directory, and gives the same logits.
save_xlora(model, arguments.output)
