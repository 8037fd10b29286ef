"""bitsandbytes' private name that training relies on.

tests/surgvqa/training/test_bitsandbytes_internals.py asserts that it exists and is called where we need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_waiting(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the context, a step of bitsandbytes' optimiser does not wait for the GPU after each parameter.

    It does so after each of the adapter's 393 matrices, while the GPU runs dry: 30 ms a step. Only paged states, which
    are not on the GPU, need it. Other optimisers are left alone.
    """
    if not type(optimizer).__module__.startswith("bitsandbytes") or getattr(optimizer, "is_paged", True):
        yield
        return
    module: Any = importlib.import_module("bitsandbytes.optim.optimizer")
    wait = module.sync_gpu
    module.sync_gpu = _wait_for_nothing
    try:
        yield
    finally:
        module.sync_gpu = wait


def _wait_for_nothing(_tensor: torch.Tensor) -> None:
    """In place of bitsandbytes' `sync_gpu`."""
