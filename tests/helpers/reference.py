"""Reference models of the tests: small random models of transformers, LoRA adapters and X-LoRA models of real PEFT.

No value is neutral: norm weights and biases are random, LoRA's B is not zero, head counts, ranks and targets are
unequal, and matrices are not square. So a dropped or transposed factor can't pass. Everything is float32, made from
seeds, on one thread.

Axis legend: B batch, T tokens, D width, V vocabulary, L adapted layers, N experts.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 97, 48, 80, 3, 6, 2
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """A base model family: its config class in transformers, and its differences from the shared small shape."""

    config: str
    options: Mapping[str, Any]


# A family whose projections have Llama's names takes one line.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "mistral": Family("MistralConfig", {"head_dim": 12, "sliding_window": 5}),
    "qwen2": Family("Qwen2Config", {}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Base models


def make_base(out_dir: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a random causal model of a family as a Hugging Face directory, and return the directory.

    `options` replace the family's own; `max_shard_size` is passed to `save_pretrained`.
    """
    save = {"max_shard_size": options.pop("max_shard_size")} if "max_shard_size" in options else {}
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "use_cache": False,  # PEFT's X-LoRA requires it
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, FAMILIES[family].config)(**{**shape, **FAMILIES[family].options, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.to(dtype).save_pretrained(out_dir, **save)
    return Path(out_dir)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: matrices keep the variance of their inputs, norms and biases differ from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else parameter[0].numel() ** -0.5
                parameter.copy_(scale * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)


def torch_base(base_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the base model in transformers, in evaluation mode, without cache."""
    return _cached_base(str(base_dir), dtype)


@cache
def _cached_base(base_dir: str, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(base_dir)
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model = auto.from_pretrained(base_dir, dtype=dtype)
    model.config.use_cache = False
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# LoRA adapters


def make_adapter(
    base_dir: Path,
    out_dir: Path,
    seed: int,
    r: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    layers_to_transform: Sequence[int] | None = None,
    **lora_config: Any,
) -> Path:
    """Save a LoRA adapter that PEFT made on the base, with random A and B, and return its directory."""
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
        task_type="CAUSAL_LM",
        **lora_config,
    )
    model = get_peft_model(copy.deepcopy(torch_base(base_dir)), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                fan_in = parameter.shape[1] if "embedding_A" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 * fan_in**-0.5)
    with warnings.catch_warnings():
        # PEFT warns if embeddings are among the targets, and then stores the base's embedding too.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(str(out_dir))
    return Path(out_dir)


@dataclasses.dataclass(frozen=True)
class Expert:
    """Settings of one adapter: the arguments of `make_adapter`."""

    r: int
    alpha: float
    targets: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, base_dir: Path, out_dir: Path, seed: int) -> Path:
        return make_adapter(base_dir, out_dir, seed, self.r, self.alpha, self.targets, self.layers, **self.more)


# Sets of three: torch.topk and jax.lax.top_k break ties alike for up to three experts (see `test_reference.py`).
EXPERTS: dict[str, tuple[Expert, ...]] = {
    "alike": tuple(Expert(4, 8, ("q_proj", "v_proj")) for _ in range(3)),
    "unequal": (
        Expert(2, 4, ATTENTION),
        Expert(5, 5, MLP, layers=(0, 2)),
        Expert(3, 4, ("q_proj", "down_proj"), more={"use_rslora": True, "rank_pattern": {"down_proj": 6}}),
    ),
    "embedding": (
        Expert(3, 3, ("embed_tokens", "q_proj")),
        Expert(4, 8, ("o_proj", "up_proj"), layers=(1,)),
        Expert(2, 3, ("embed_tokens", "gate_proj"), more={"alpha_pattern": {"gate_proj": 5}}),
    ),
}


def make_experts(base_dir: Path, out_dir: Path, experts: str | Sequence[Expert], seed: int = 0) -> list[Path]:
    """Save the adapters of a set (a name in `EXPERTS`, or settings) as `out_dir/0`, `out_dir/1`, ..."""
    recipes = EXPERTS[experts] if isinstance(experts, str) else experts
    return [e.make(base_dir, Path(out_dir) / str(i), 100 * seed + i + 1) for i, e in enumerate(recipes)]


# ---------------------------------------------------------------------------------------------------------------------
# X-LoRA in PEFT


def peft_xlora(base_dir: Path, adapters: Sequence[Path], seed: int = 0, gate_scale: float = 1.0, **config: Any) -> Any:
    """Return a real PEFT X-LoRA model (a `PeftModel`) with a random classifier, in evaluation mode.

    Args:
        base_dir: directory of the base model.
        adapters: directories of the experts; PEFT gets them under the names "0", "1", ...
        seed: seed of the classifier's weights.
        gate_scale: approximate standard deviation of the classifier's logits. At 1, gates are far from uniform, and
            float32 errors of the logits don't grow in the softmax.
        **config: fields of `peft.XLoraConfig`; a `scaling_pass_value` of None goes through `set_scaling_pass_value`.
    """
    base = copy.deepcopy(torch_base(base_dir))
    config = {"xlora_size": 24, "xlora_dropout_p": 0.0, **config}
    mean_pass = "scaling_pass_value" in config and config["scaling_pass_value"] is None
    if mean_pass:
        del config["scaling_pass_value"]
    model = get_peft_model(
        base,
        peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.get_text_config().hidden_size,
            adapters={str(i): str(path) for i, path in enumerate(adapters)},
            **config,
        ),
    )
    if mean_pass:
        model.base_model.set_scaling_pass_value(None)
    randomize_classifier(classifier_of(model), seed, gate_scale)
    return model.eval()


def randomize_classifier(classifier: torch.nn.Module, seed: int, gate_scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    linears = [module for module in classifier.layers if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            gain = gate_scale if linear is linears[-1] else 2**0.5
            weight = torch.randn(linear.weight.shape, generator=generator)
            linear.weight.copy_(weight * gain * linear.weight.shape[1] ** -0.5)
            linear.bias.copy_(0.3 * torch.randn(linear.bias.shape, generator=generator))


def classifier_of(model: Any) -> Any:
    """Return PEFT's live `XLoraClassifier` of a `PeftModel`."""
    return model.base_model.internal_xlora_classifier


def peft_run(model: Any, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [B, T, V] and scalings [B, T, L, N] of PEFT's model for arrays named as its arguments."""
    with torch.no_grad():
        logits = model(**tensors(inputs)).logits
    return logits.numpy(), model.base_model.get_latest_scalings().numpy()


def base_run(base_dir: Path, dtype: torch.dtype = torch.float32, **inputs: np.ndarray) -> np.ndarray:
    """Return logits [B, T, V], float32, of the base model in transformers."""
    with torch.no_grad():
        return torch_base(base_dir, dtype)(**tensors(inputs)).logits.float().numpy()


def peft_generate(model: Any, max_new_tokens: int, **inputs: np.ndarray) -> np.ndarray:
    """Return the greedy continuation with its prompt: int64 [B, T + new]."""
    with torch.no_grad():
        return model.generate(**tensors(inputs), max_new_tokens=max_new_tokens, do_sample=False).numpy()


def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        name: torch.as_tensor(np.array(array, np.int64 if array.dtype.kind in "iu" else array.dtype))
        for name, array in inputs.items()
    }


def peft_layer_names(model: Any) -> list[str]:
    """Return the adapted layers of a PEFT X-LoRA model in PEFT's order, under the base model's module names."""
    kinds = (lora.Linear, lora.Embedding, lora.Conv2d)
    return [name for name, module in model.base_model.lora_model.model.named_modules() if isinstance(module, kinds)]


# ---------------------------------------------------------------------------------------------------------------------
# X-LoRA from its formula, for experts that PEFT's own X-LoRA can't load (on `lm_head`)


def hooked_xlora_logits(
    base_dir: Path, adapters: Sequence[Path], gates: Callable[[str, int], torch.Tensor], **inputs: np.ndarray
) -> np.ndarray:
    """Return logits [B, T, V] of the base with `scale * B A (gate * x)` added by hooks at every adapted `nn.Linear`.

    Args:
        base_dir: directory of the base model.
        adapters: directories of plain LoRA adapters (rank and alpha patterns are not read).
        gates: (module name, expert) to the gate [B, T] of that expert at that module, after top-k.
        **inputs: arguments of the model.
    """
    base = torch_base(base_dir)
    with torch.no_grad(), _mixing_hooks(base, adapters, gates):
        return base(**tensors(inputs)).logits.numpy()


def adapter_matrices(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return, by adapted module name, A [r, in or V], B [out, r], and alpha / r (or alpha / sqrt(r))."""
    config = LoraConfig.from_pretrained(str(adapter))
    weights = peft.utils.load_peft_weights(str(adapter), device="cpu")
    found = {}
    for key, a in weights.items():
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            b = weights[key.replace("_A", "_B")]
            found[name] = (a, b, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))
    return found


@contextmanager
def _mixing_hooks(
    base: torch.nn.Module, adapters: Sequence[Path], gates: Callable[[str, int], torch.Tensor]
) -> Iterator[None]:
    handles = []
    for expert, adapter in enumerate(adapters):
        for name, (a, b, scale) in adapter_matrices(adapter).items():

            def add(module, args, output, name=name, expert=expert, a=a, b=b, scale=scale):
                (x,) = args
                return output + scale * (gates(name, expert)[..., None] * x) @ a.T @ b.T

            handles.append(base.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def relative_error(ours: Any, theirs: Any, where: np.ndarray | None = None) -> float:
    """Return ||ours - theirs|| / ||theirs|| in float64, over entries where the mask of the leading axes is not 0."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shapes differ: ours {ours.shape}, theirs {theirs.shape}"
    if where is not None:
        ours, theirs = ours[np.asarray(where) != 0], theirs[np.asarray(where) != 0]
    assert np.isfinite(ours).all(), "ours has values that are not finite"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def prompt(batch: int, tokens: int, padding: str | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask`, int32 [B, T]; with padding, row b has 2 b fewer tokens."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (batch, tokens)).astype(np.int32)
    mask = np.ones_like(ids)
    for row in range(batch):
        if padding == "left":
            mask[row, : 2 * row] = 0
        elif padding == "right":
            mask[row, tokens - 2 * row :] = 0
    return {"input_ids": np.where(mask, ids, 0).astype(np.int32), "attention_mask": mask}


def pairwise(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return few combinations in which every pair of values of two axes occurs (greedy and deterministic)."""
    names = list(axes)
    values = [list(axes[name]) for name in names]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    left = {(i, a, j, b) for i, j in pairs for a in range(len(values[i])) for b in range(len(values[j]))}
    random = np.random.default_rng(0)
    rows = []
    while left:
        candidates = random.integers(0, [len(v) for v in values], (500, len(names)))
        covered = [{(i, row[i], j, row[j]) for i, j in pairs} & left for row in candidates.tolist()]
        best = max(range(len(covered)), key=lambda n: len(covered[n]))
        left -= covered[best]
        rows.append({name: values[i][candidates[best][i]] for i, name in enumerate(names)})
    return rows


def config_of(base_dir: Path) -> Any:
    return AutoConfig.from_pretrained(str(base_dir))


def reload_in_peft(base_dir: Path, checkpoint: Path) -> Any:
    """Load an X-LoRA checkpoint in PEFT, as a user would."""
    return PeftModel.from_pretrained(copy.deepcopy(torch_base(base_dir)), str(checkpoint)).eval()
