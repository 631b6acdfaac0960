"""Files and formats of others: Hugging Face base checkpoints, PEFT LoRA adapters, X-LoRA checkpoints.

torch is optional here: it is needed for `.bin` pickles and for handing over a live `torch.nn.Module` only.
"""

from interop.errors import FormatError
from interop.lora import LoraAdapter, LoraLayer, load_lora, save_lora

__all__ = ["FormatError", "LoraAdapter", "LoraLayer", "load_lora", "save_lora"]
