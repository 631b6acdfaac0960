"""X-LoRA checkpoints: PEFT's layout, the original one, and the one of mistral.rs."""
