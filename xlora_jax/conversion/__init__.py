"""X-LoRA for any Flax model, Linen or NNX."""
