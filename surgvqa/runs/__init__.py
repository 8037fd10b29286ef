"""The run folder: the only thing that a job and whoever watches it have in common."""
