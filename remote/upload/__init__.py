"""Checkpoints and data onto a GPU host, whole or not at all."""
