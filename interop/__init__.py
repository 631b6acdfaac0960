"""Files and formats of others: Hugging Face base checkpoints, PEFT LoRA adapters, X-LoRA checkpoints.

torch is optional here: it is needed for `.bin` pickles and for handing over a live `torch.nn.Module` only.
"""

from interop.base import load_base, save_base
from interop.checkpoint import classifier_from_torch, classifier_to_torch, repoint
from interop.errors import FormatError
from interop.generation import load_generation_config
from interop.lora import LoraAdapter, LoraLayer, load_lora, save_lora
from interop.model import load_xlora, save_xlora

__all__ = [
    "FormatError",
    "LoraAdapter",
    "LoraLayer",
    "classifier_from_torch",
    "classifier_to_torch",
    "load_base",
    "load_generation_config",
    "load_lora",
    "load_xlora",
    "repoint",
    "save_base",
    "save_lora",
    "save_xlora",
]
