"""X-LoRA, a mixture of LoRA experts (arXiv 2402.07148), for JAX and Flax."""

from xlora_jax.config import XLoraConfig
from xlora_jax.model import BaseModel, XLoraModel
from xlora_jax.passes import XLora, XLoraOutput, forward
from xlora_jax.training.step import (
    TrainState,
    causal_lm_loss,
    init_train_state,
    make_train_step,
    merge_params,
    split_params,
)

__all__ = [
    "BaseModel",
    "TrainState",
    "XLora",
    "XLoraConfig",
    "XLoraModel",
    "XLoraOutput",
    "causal_lm_loss",
    "forward",
    "init_train_state",
    "make_train_step",
    "merge_params",
    "split_params",
]
