"""Where the model runs and in which precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from surgvqa.errors import UsageError
from surgvqa.memory.predict import CUDA_CONTEXT


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
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    width = config.hidden_size // config.num_attention_heads
    q, k, v = (torch.zeros(1, n, 256, width, dtype=torch.bfloat16, device=device, requires_grad=True) for n in heads)
    chosen = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return "cudnn" if chosen == SDPBackend.CUDNN_ATTENTION.value else "flash"


def memory_limit_gb(budget_gb: float, device: torch.device) -> float:
    """What a run may allocate: the budget, or what the card has beside the driver's own if that is less."""
    if device.type != "cuda":
        return budget_gb
    total = torch.cuda.get_device_properties(device).total_memory
    return min(budget_gb, (total - CUDA_CONTEXT) / 1e9)
