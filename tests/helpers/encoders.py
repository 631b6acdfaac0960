"""Small random encoders of transformers with a classification head, their inputs and adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.helpers.reference import randomize, tensors

_SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SHAPE, "vocab_size": 61, "max_position_embeddings": 32, "layer_norm_eps": 3e-3, "num_labels": 5}
_TEXT |= {"hidden_act": "gelu_new", "type_vocab_size": 3}
_ROBERTA = {**_TEXT, "pad_token_id": 1}
_DISTIL = {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "max_position_embeddings": 32}
_DISTIL |= {"activation": "gelu_new", "num_labels": 5, "sinusoidal_pos_embds": True}
_MODERN = {**_SHAPE, "num_hidden_layers": 3, "vocab_size": 61, "norm_eps": 3e-3, "num_labels": 5, "pad_token_id": 0}
_MODERN |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 5}
_MODERN |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True}
_MODERN |= {"mlp_bias": True, "hidden_activation": "gelu_new", "classifier_activation": "silu"}
_MODERN |= {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    }
}
_IMAGE = {**_SHAPE, "image_size": (8, 12), "patch_size": (4, 2), "num_channels": 2, "num_labels": 5}
_IMAGE |= {"qkv_bias": False, "layer_norm_eps": 3e-3}
# transformers' class, config fields, modules that the experts adapt.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert sequence": (
        "BertForSequenceClassification",
        _TEXT,
        ["query", "value", "output.dense", "pooler.dense", "word_embeddings"],
    ),
    "bert token": ("BertForTokenClassification", _TEXT, ["key", "intermediate.dense"]),
    "roberta sequence": ("RobertaForSequenceClassification", _ROBERTA, ["query", "output.dense"]),
    "roberta token": ("RobertaForTokenClassification", _ROBERTA, ["value", "intermediate.dense"]),
    "xlm-roberta sequence": ("XLMRobertaForSequenceClassification", _ROBERTA, ["value", "classifier.dense"]),
    "xlm-roberta token": ("XLMRobertaForTokenClassification", _ROBERTA, ["key", "intermediate.dense"]),
    "distilbert sequence": (
        "DistilBertForSequenceClassification",
        _DISTIL,
        ["q_lin", "lin2", "pre_classifier", "word_embeddings"],
    ),
    "distilbert token": ("DistilBertForTokenClassification", _DISTIL, ["v_lin", "lin1"]),
    "modernbert sequence": (
        "ModernBertForSequenceClassification",
        {**_MODERN, "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True},
        ["Wqkv", "mlp.Wo", "tok_embeddings"],
    ),
    "modernbert token": ("ModernBertForTokenClassification", _MODERN, ["Wi", "head.dense"]),
    "vit": ("ViTForImageClassification", _IMAGE, ["q_proj", "fc2", "classifier"]),
}


def encoder_inputs(case: str, **changes: Any) -> dict[str, np.ndarray]:
    """Return three rows: tokens with right and left padding, and token types; or images."""
    options = {**CASES[case][1], **changes}
    random = np.random.default_rng(0)
    if case == "vit":
        return {"pixel_values": random.normal(size=(3, options["num_channels"], *options["image_size"])).astype("f4")}
    padding = options.get("pad_token_id", 1)
    ids = random.integers(padding + 1, options["vocab_size"], (3, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    inputs = {"input_ids": np.where(mask, ids, padding).astype("i4"), "attention_mask": mask}
    if "type_vocab_size" in options:
        inputs["token_type_ids"] = random.integers(0, options["type_vocab_size"], (3, 9)).astype(np.int32)
    return inputs


def case_of(family: str) -> str:
    """Return the first case of a family."""
    return next(case for case in CASES if case.split(" ")[0] == family)


def make_encoder(case: str, directory: Path, **changes: Any) -> Any:
    """Make a random transformers model, with `changes` to its config, and save it as a Hugging Face directory too."""
    name, options, _ = CASES[case]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**copy.deepcopy(options), **changes})).eval()
    randomize(model, 0)
    model.save_pretrained(directory)
    return model


def run_encoder(model: Any, inputs: Mapping[str, np.ndarray], **more: Any) -> Any:
    with torch.no_grad():
        return model(**tensors(inputs), **more)


def adapters_on(model: Any, targets: Sequence[str], directory: Path, **lora: Any) -> list[Path]:
    """Make three PEFT adapters of unequal rank and targets, with random A, B and, if they save heads, heads."""
    paths = []
    for number, (rank, own) in enumerate(((2, targets), (3, targets[:1]), (4, targets[-1:]))):
        config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=list(own), **lora)
        adapted = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name or ".modules_to_save." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.save_pretrained(str(directory / str(number)))
        paths.append(directory / str(number))
    return paths
