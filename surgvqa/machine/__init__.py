"""What this machine is and does: GPUs, memory, cores, and whether it can train."""
