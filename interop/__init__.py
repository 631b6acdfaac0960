"""Reading and writing the files of other programs: Hugging Face models, PEFT LoRA adapters, X-LoRA checkpoints.

torch is optional: only `.bin` pickles and live `torch.nn.Module` objects need it.
"""

from interop.checkpoint.classifier import classifier_from_torch, classifier_to_torch
from interop.checkpoint.places import repoint
from interop.editing import add_expert, remove_expert
from interop.hf.auto import load_tokenizer
from interop.hf.base import load_base, save_base
from interop.hf.generation_config import load_generation_config
from interop.hf.tokenizer import codec_of, load_codec
from interop.merging import as_model, merge_experts
from interop.model import load_xlora, save_xlora
from interop.peft.adapter import LoraAdapter, LoraLayer, load_lora, save_lora
from interop.storage.errors import FormatError

__all__ = [
    "FormatError",
    "LoraAdapter",
    "LoraLayer",
    "add_expert",
    "as_model",
    "classifier_from_torch",
    "classifier_to_torch",
    "codec_of",
    "load_base",
    "load_codec",
    "load_generation_config",
    "load_lora",
    "load_tokenizer",
    "load_xlora",
    "merge_experts",
    "remove_expert",
    "repoint",
    "save_base",
    "save_lora",
    "save_xlora",
]
