"""Bases that other programs have quantized: bitsandbytes, GGUF, compressed-tensors, AWQ, GPTQ."""
