"""PEFT LoRA adapters: config, tensors, module names, classification heads."""
