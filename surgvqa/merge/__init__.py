"""LoRA adapters and a checkpoint become one full BF16 checkpoint."""
