"""This machine: GPUs, memory, cores, and whether it can train."""
