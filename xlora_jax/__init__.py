"""X-LoRA, a mixture of LoRA experts (arXiv 2402.07148), for JAX and Flax.

Names are imported when they are first used: ``import xlora_jax`` alone loads neither JAX nor the training libraries.
Type checkers read them in ``__init__.pyi``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_HOMES = {
    "backend": ("compile_for",),
    "config": ("XLoraConfig",),
    "conversion.linen": ("Lora", "convert", "find_layers"),
    "conversion.nnx": ("convert_nnx",),
    "conversion.torch": ("convert_torch",),
    "generation.generate": ("GenerationConfig", "GenerationStats"),
    "generation.sampling": ("LogitsProcessor", "Sampler"),
    "generation.text": ("StopStrings",),
    "job": ("Job", "run_training"),
    "model": ("BaseModel", "XLoraModel"),
    "passes": (
        "XLora",
        "XLoraOutput",
        "base_forward",
        "classify",
        "forward",
        "real_pass",
        "scaling_pass",
        "unembed",
    ),
    "report": ("RoutingReport", "report_routing"),
    "routing.metrics": ("RoutingMetrics", "RoutingSums", "Total", "routing_sums"),
    "routing.recorder": ("ScalingsLog", "load_scalings_log"),
    "routing.text": ("RoutedText",),
    "sharding": ("make_mesh", "param_shardings", "placer", "shard_params"),
    "training.checkpoints": ("CheckpointError", "Checkpoints"),
    "training.classification": ("make_objective_step",),
    "training.config": ("TrainConfig",),
    "training.data": ("Codec", "Loader", "Rows", "encode_records", "lay_out"),
    "training.records": ("BadRecords", "read_records"),
    "training.evaluation": ("evaluate", "mean_gates"),
    "training.losses": ("causal_lm_loss",),
    "training.regularizers": ("Regularizers",),
    "training.routing": ("Routing", "make_routing_step"),
    "training.step": (
        "TrainState",
        "init_train_state",
        "make_eval_step",
        "make_train_step",
        "merge_params",
        "split_params",
    ),
    "training.trainer": ("NonFiniteError", "TrainResult", "Trainer", "train"),
}
_MODULE_OF = {name: f"xlora_jax.{module}" for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]

try:
    __version__ = version("xlora-jax")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
