"""What is exported for mistral.rs, run by mistral.rs itself (the package `mistralrs`, on a CPU)."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from interop import load_xlora, save_xlora
from tests.helpers.reference import make_adapter, randomize
from xlora_jax import XLoraConfig

CHARACTERS = (string.ascii_letters + string.digits)[:61]
VOCAB = {"<pad>": 0, "<s>": 1, "</s>": 2} | {character: number for number, character in enumerate(CHARACTERS, 3)}
NEW = 24
# In a process of its own: what goes wrong there panics.
RUN = """
import sys
from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which

directory, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
which = Which.XLora(
    xlora_model_id=directory,
    order=f"{directory}/xlora_ordering.json",
    arch=Architecture.Mistral,
    dtype=ModelDType.F32,
)
request = CompletionRequest(prompt=prompt, model="default", max_tokens=new, temperature=0.0, ignore_eos=True)
done = Runner(which=which).send_completion_request(request)
# Longer prompts fail in 0.9.5, so the test has to know that this one is of one token.
assert done.usage.prompt_tokens == 1, done.usage.prompt_tokens
print("TEXT", done.choices[0].text)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    config = MistralConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=None,
        tie_word_embeddings=False,  # mistral.rs wants an lm_head.weight
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MistralForCausalLM(config)
    randomize(model, 0)
    model.save_pretrained(directory)
    # Where transformers 5 no longer writes it, and mistral.rs reads it.
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "rope_theta": 10000.0}))
    tokenizer = Tokenizer(models.BPE(VOCAB, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"xlora_depth": 1, "layerwise_scalings": True, "softmax_temperature": 0.5},
        {"xlora_depth": 3, "xlora_size": 24, "layerwise_scalings": True, "scaling_pass_value": 0.3},
        {"xlora_depth": 2, "xlora_size": 16, "top_k_lora": 1, "global_scaling_weight": 1.5},
    ],
    ids=lambda settings: f"depth {settings['xlora_depth']}",
)
def test_greedy_tokens_are_ours(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    modules = ["q_proj", "v_proj", "up_proj"]
    adapters = {
        name: str(make_adapter(base, tmp_path / name, seed, 4, 8, modules)) for seed, name in enumerate(("aa", "bb"))
    }
    config = XLoraConfig(hidden_size=32, adapters=adapters, **{"xlora_dropout_p": 0.0, **settings})
    model = load_xlora(base, adapters=adapters, config=config, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    classifier = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), model.params["classifier"]
    )
    model = model.replace(params={**model.params, "classifier": classifier})
    save_xlora(model, tmp_path / "out", layout="mistralrs")
    prompt = np.array([[VOCAB["h"]]])
    tokens = np.asarray(model.generate(prompt, max_new_tokens=NEW))[0, 1:].tolist()
    letters = {number: character for character, number in VOCAB.items()}
    wanted = "".join(letters[token] for token in tokens if token > 2)
    model.disable_adapter_layers()
    assert np.asarray(model.generate(prompt, max_new_tokens=NEW))[0, 1:].tolist() != tokens
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "out"), "h", str(NEW)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "MISTRALRS_CPU_KV_F32": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TEXT ")]
    assert line.removeprefix("TEXT ") == wanted
