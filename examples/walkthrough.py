# %% [markdown]
# # X-LoRA, step by step
#
# A base model, four LoRA adapters and a classifier that learns which adapter each token needs.
#
# The models are those of `quickstart.py`: the first run makes them, in about a minute. With models of your own, set
# `base` to a Hugging Face directory or hub id, `adapters` to `{name: PEFT directory}`, and `texts` to
# `{name: records}`, for example from `read_records("math.jsonl")`.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from quickstart_assets import prepare
from rich.console import Console
from transformers import AutoTokenizer

from interop import codec_of, load_xlora, save_xlora
from xlora_jax import Rows, TrainConfig, encode_records, lay_out, report_routing, train

assets = prepare(Path(".cache/quickstart"), Console(quiet=True))
base, adapters = assets.base, assets.adapters
tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def records(table: np.ndarray) -> list[dict[str, str]]:
    """Return each row of tokens as a record, the form of one line of a .jsonl file."""
    return [{"text": text} for text in tokenizer.batch_decode(table[:, 1:])]


texts = {name: records(table[:96]) for name, table in assets.train.items()}
held_out = {name: records(table[:16]) for name, table in assets.held_out.items()}

# %% [markdown]
# ## The model
#
# Base and experts are frozen, and the classifier is new. All parameters are one tree.

# %%
model = load_xlora(base, adapters=adapters)
for part, tree in model.params.items():
    print(f"{part}: {sum(leaf.size for leaf in jax.tree.leaves(tree)):,} parameters")
print(f"{len(model.layer_names)} adapted layers, from {model.layer_names[0]} to {model.layer_names[-1]}")

# %% [markdown]
# One call runs both passes: the base model for the classifier, then the base model with the experts mixed.

# %%
tokens = tokenizer(["4718+3695\n8+5+0=13\n"], return_tensors="np")["input_ids"]
out = model(tokens)
assert out.logits is not None
assert out.scalings is not None
print(f"logits {out.logits.shape}: batch, tokens, vocabulary")
print(f"scalings {out.scalings.shape}: batch, tokens, layers, experts")
print("scalings of the last token before training:", np.asarray(out.scalings[0, -1, 0]).round(2))

# %% [markdown]
# ## Data
#
# Records become rows of tokens. Several records may share a row, and each attends to itself only.

# %%
codec = codec_of(tokenizer)
train_rows = {name: lay_out(encode_records(text, codec), length=128) for name, text in texts.items()}
held_out_rows = {name: lay_out(encode_records(text, codec), length=128) for name, text in held_out.items()}
for name, rows in train_rows.items():
    print(f"{name}: {len(rows.arrays['input_ids'])} rows")

# %% [markdown]
# ## Routing before and after training
#
# For each held-out text: the mean gate of each expert, the loss of the base model alone and the loss with the experts.


# %%
def show_routing(title: str) -> None:
    """Print the losses and draw the mean gates."""
    _, panel = plt.subplots(figsize=(7, 2.5), layout="constrained")
    left = np.zeros(len(held_out_rows))
    report = report_routing(model, held_out_rows, max_rows=16).content["texts"]
    for name, entry in report.items():
        print(f"{title}, {name}: base {entry['base_loss']:.3f}, X-LoRA {entry['loss']:.3f} nats per token")
    gates = np.stack([np.mean(entry["mean_gates"], axis=0) for entry in report.values()])
    for expert, share in zip(model.expert_names, gates.T, strict=True):
        panel.barh(list(held_out_rows), share, left=left, label=expert)
        left += share
    panel.set_title(f"mean gates, {title}")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plt.show()


show_routing("before training")

# %% [markdown]
# The settings are those of `xlora-jax train`. With `output=` the trainer writes checkpoints and can be resumed.

# %%
keys = next(iter(train_rows.values())).arrays
together = Rows({key: np.concatenate([rows.arrays[key] for rows in train_rows.values()]) for key in keys})
config = TrainConfig(steps=60, batch_size=8, learning_rate=3e-2, tensorboard=False)
model = train(model, together, config).model
show_routing("after training")

# %% [markdown]
# ## Text
#
# Each pass has its own cache, so a token costs two reads of the weights, and fewer if drafts are right.

# %%
written = model.generate(tokens, max_new_tokens=48)
print(tokenizer.decode(np.asarray(written)[0]))

# %% [markdown]
# Which expert wrote what: each token has the color of its leading expert. Point at a token for all weights.

# %%
model.routing("def count_lines(self, path):\n", max_new_tokens=48)

# %% [markdown]
# ## Back to PEFT
#
# `PeftModel.from_pretrained` reads this directory and gives the same logits.

# %%
save_xlora(model, "walkthrough-model")
print(*sorted(path.name for path in Path("walkthrough-model").iterdir()), sep="\n")
