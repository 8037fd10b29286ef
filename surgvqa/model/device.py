"""Chooses the device and the precision of the model."""

from __future__ import annotations

import torch

from surgvqa.errors import UsageError


def choose_device(requested: str) -> torch.device:
    """The first GPU if there is one and `requested` ("auto", "cpu", "cuda") allows it, else the CPU.

    Raises UsageError when CUDA was requested and there is no GPU.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if requested == "cuda":
        raise UsageError("device is cuda, but torch sees no CUDA GPU here; surgvqa doctor says why")
    return torch.device("cpu")


def choose_dtype(device: torch.device, bf16: bool = True) -> torch.dtype:
    """bfloat16 on a GPU if wanted; float32 on a CPU, where bfloat16 is slower."""
    return torch.bfloat16 if device.type == "cuda" and bf16 else torch.float32
