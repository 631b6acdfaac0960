"""X-LoRA over Flax models of other authors, Linen and NNX."""
