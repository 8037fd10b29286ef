"""PEFT's private names that we rely on: those of its parameters, and its cast switch.

tests/surgvqa/model/test_internals.py asserts that they exist and work.
"""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn

ADAPTER = "default"
"""PEFT's name of the only adapter, which is part of its parameters' names."""
PREFIX = "base_model.model."
"""Prefix of every tensor name in an adapter file."""


def without_input_casts(model: nn.Module) -> None:
    """Stops PEFT from casting the inputs of LoRA matrices, for as long as the model exists.

    PEFT casts every LoRA input to the adapter's float32, and under bf16 autocast the matmul casts it back. Without both
    casts no bit changes, and no float32 copy of every layer's input is needed. Use only under autocast.
    """
    vars(model)["input_casts_off"] = (
        None  # kept on the model, because PEFT's context manager enables the casts again when it is freed
    )
    casts_off = disable_input_dtype_casting(model)
    casts_off.__enter__()
    vars(model)["input_casts_off"] = casts_off


def adapter_parameters(peft_model: PeftModel, on_disk: Callable[[str], str]) -> dict[str, nn.Parameter]:
    """{name in an adapter file: parameter} of LoRA matrices and the copies of modules_to_save.

    `on_disk` maps a module name to the one in files.
    """

    def file_name(name: str) -> str:
        name = name.replace(f"modules_to_save.{ADAPTER}.", "").replace(f".{ADAPTER}.", ".")
        return on_disk(name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"))

    return {file_name(n): p for n, p in peft_model.named_parameters() if f".{ADAPTER}." in n}
