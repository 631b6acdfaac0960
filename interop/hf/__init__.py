"""Hugging Face base models: config, weights, tokenizer, generation settings, classification heads."""
