"""Merges LoRA adapters and a checkpoint into one full BF16 checkpoint."""
