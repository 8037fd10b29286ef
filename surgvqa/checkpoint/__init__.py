"""Checkpoint folders: safetensors headers, config.json, the audit, and writing new ones."""
