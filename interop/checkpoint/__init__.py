"""X-LoRA checkpoints in the layouts of PEFT, of the original package and of mistral.rs."""
