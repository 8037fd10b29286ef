"""The same commands on a GPU host over SSH."""
