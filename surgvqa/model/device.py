"""Where the model runs and in which precision."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from surgvqa.errors import UsageError, first_line
from surgvqa.model.torch_internals import sdpa_takes_cudnn


def choose_device(requested: str) -> torch.device:
    """The first GPU when there is one and `requested` ("auto", "cpu", "cuda") allows it, else the CPU."""
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


def attention_kernel(config: Any, attention: str, device: torch.device) -> str:
    """What computes a layer's attention, for the memory prediction: "eager", "flash-attn", "cudnn" or "flash", which
    stands for all others. `config` is the language model's; torch's sdpa takes cuDNN's kernel on Hopper and its own
    flash kernel on other cards.
    """
    if attention != "sdpa" or device.type != "cuda":
        return {"eager": "eager", "flash_attention_2": "flash-attn"}.get(attention, "flash")
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return "cudnn" if sdpa_takes_cudnn(heads, config.num_key_value_heads, width, device) else "flash"


FLASH_CAPABILITY = (8, 0)
"""flash-attn 2 needs Ampere or newer."""


def choose_attention(requested: str, device: str | torch.device) -> tuple[str, str]:
    """The attention kernel that will run (for LM, vision tower and Whisper alike) and a sentence that says why.

    `requested` is "auto", "flash_attention_2", "sdpa" or "eager". UsageError when flash_attention_2 is asked for by
    name and cannot run here.
    """
    if requested in ("sdpa", "eager"):
        return requested, f"{requested}: asked for by name."
    obstacle = _flash_obstacle(torch.device(device))
    if obstacle is None:
        return "flash_attention_2", "flash_attention_2: flash-attn is installed and the GPU is Ampere or newer."
    if requested == "flash_attention_2":
        raise UsageError(f"attn_implementation is flash_attention_2, but {obstacle}; use auto or sdpa")
    return "sdpa", f"sdpa (on a GPU cuDNN's kernel, before Hopper torch's own flash kernel): {obstacle}."


def _flash_obstacle(device: torch.device) -> str | None:
    """Why flash-attn 2 cannot run on the device, or None."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA GPU and the device is {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < FLASH_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"flash-attn needs an Ampere or newer GPU and {name} has compute capability {capability[0]}.{capability[1]}"
        )
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # OSError: a build for another torch or glibc
        return f"flash-attn cannot be imported ({type(error).__name__}: {first_line(error)})"
    if not is_flash_attn_2_available():  # it asks the package's metadata too
        return "transformers does not take the flash-attn that is here for version 2 of the package flash-attn"
    return None
