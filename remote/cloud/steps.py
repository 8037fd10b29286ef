"""The steps that may follow a job on a rented machine."""

STEPS = ("evaluate", "fetch", "terminate")
"""In this order."""
