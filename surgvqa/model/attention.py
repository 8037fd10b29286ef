"""Chooses the attention kernel: the requested one, else the fastest that can run on this GPU.

The fastest kernel depends on the GPU. On an H100 a training step is 7 to 10 % slower with flash-attn than with cuDNN's
kernel (docs/benchmarks.md); on an Ampere GPU torch does not offer cuDNN's. So the first training on a GPU times both,
in less than a second, and keeps the result in the cache folder of torch's compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import is_flash_attn_2_available

from surgvqa.errors import UsageError, first_line
from surgvqa.files import read_json, write_json_atomic
from surgvqa.model.torch_internals import compiler_cache_dir, sdpa_takes_cudnn
from surgvqa.untrusted import is_kind

FLASH_CAPABILITY = (8, 0)
"""flash-attn 2 needs Ampere or newer."""
MEASURED_FILE = "surgvqa_attention.json"
TOKENS_STEP = 512
"""Lengths are rounded up to a multiple of this, so that similar lengths share a measurement."""
WARM_UP, REPEATS = 3, 15
"""Passes of each kernel before it is timed, and timed passes."""

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value), each [batch, heads, tokens, width], to the output [batch, heads, tokens, width]; causal."""


@dataclass(frozen=True)
class AttentionShape:
    """The size of attention in one layer, for one row of a training batch."""

    heads: int
    key_value_heads: int
    head_dim: int
    tokens: int

    @property
    def measured_tokens(self) -> int:
        """`tokens`, rounded up to a multiple of TOKENS_STEP."""
        return max(1, math.ceil(self.tokens / TOKENS_STEP)) * TOKENS_STEP


REAL_SHAPE = AttentionShape(28, 4, 128, 3886)
"""Qwen2-VL-7B with eight frames of 512 px and 1,500 audio tokens."""


def choose_attention(
    requested: str, device: str | torch.device, shape: AttentionShape | None = None
) -> tuple[str, str]:
    """The attention kernel for LM, vision tower and Whisper, and a sentence with the reason.

    `requested` is "auto", "flash_attention_2", "sdpa" or "eager". With the `shape` of a training row, "auto" measures
    which kernel is faster; without a shape it uses flash-attn wherever that runs. Raises UsageError when
    flash_attention_2 was requested and cannot run on this machine.
    """
    if requested in ("sdpa", "eager"):
        return requested, f"{requested}: requested."
    device = torch.device(device)
    obstacle = _flash_obstacle(device)
    if obstacle is None and requested == "auto" and shape:
        return _faster(shape, device)
    if obstacle is None:
        return "flash_attention_2", "flash_attention_2: flash-attn is installed and the GPU is Ampere or newer."
    if requested == "flash_attention_2":
        raise UsageError(f"attn_implementation is flash_attention_2, but {obstacle}; use auto or sdpa")
    return "sdpa", f"sdpa (on a GPU cuDNN's kernel, before Hopper torch's own flash kernel): {obstacle}."


def attention_kernel(config: Any, attention: str, device: torch.device) -> str:
    """The kernel that computes a layer's attention, for the memory prediction.

    One of "eager", "flash-attn", "cudnn", and "flash" for all others. `config` is the language model's. torch's sdpa
    uses cuDNN's kernel on Hopper and its own flash kernel on other cards.
    """
    if attention != "sdpa" or device.type != "cuda":
        return {"eager": "eager", "flash_attention_2": "flash-attn"}.get(attention, "flash")
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return "cudnn" if sdpa_takes_cudnn(heads, config.num_key_value_heads, width, device) else "flash"


# --- measuring -------------------------------------------------------------------------------------------------------


def _faster(shape: AttentionShape, device: torch.device) -> tuple[str, str]:
    """The faster of sdpa and flash-attn, and a sentence with both times; flash-attn if neither can be timed."""
    measured, problem = measured_attention(shape, device)
    if not measured:
        return (
            "flash_attention_2",
            f"flash_attention_2: it runs here, and which kernel is faster is unknown ({problem}).",
        )
    name = min(measured, key=measured.__getitem__)
    others = [other for other in KERNELS if other != name]
    rest = "; ".join(
        f"{other} {measured[other]:.2f} ms, {measured[other] / measured[name] - 1:.0%} more"
        if other in measured
        else f"{other} failed ({problem})"
        for other in others
    )
    return name, f"{name}: {measured[name]:.2f} ms a layer and row on this card; {rest}."


def measured_attention(shape: AttentionShape, device: torch.device) -> tuple[dict[str, float], str]:
    """({kernel: milliseconds of its forward and backward pass for one row}, the problem, '' if there was none).

    Reads an earlier measurement from MEASURED_FILE, or measures and writes it. Omits kernels that fail.
    """
    file = compiler_cache_dir() / MEASURED_FILE
    key = " | ".join(
        [
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            f"torch {torch.__version__}",
            f"flash-attn {getattr(importlib.import_module('flash_attn'), '__version__', 'unknown')}",
            f"{shape.heads}/{shape.key_value_heads} heads of {shape.head_dim}, {shape.measured_tokens} tokens",
        ]
    )
    known = _earlier_measurements(file)
    if _is_complete(known.get(key)):
        return dict(known[key]), ""
    measured, problem = measure(shape, device, KERNELS)
    if _is_complete(measured):
        with contextlib.suppress(OSError):  # a folder that cannot be written: measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(file, {**_earlier_measurements(file), key: measured})
    return measured, problem


def measure(shape: AttentionShape, device: torch.device, kernels: Mapping[str, Kernel]) -> tuple[dict[str, float], str]:
    """Like `measured_attention`, without the file: the median of REPEATS passes, alternating between the kernels."""

    def tensor(heads: int) -> torch.Tensor:
        size = (1, heads, shape.measured_tokens, shape.head_dim)
        return torch.randn(size, dtype=torch.bfloat16, device=device, requires_grad=True)

    times: dict[str, list[float]] = {name: [] for name in kernels}
    problems: dict[str, str] = {}
    query, key, value = tensor(shape.heads), tensor(shape.key_value_heads), tensor(shape.key_value_heads)
    gradient = torch.randn_like(query)
    for number in range(WARM_UP + REPEATS):
        for name, kernel in kernels.items():
            if name in problems:
                continue
            try:
                milliseconds = _timed(partial(_both_passes, kernel, query, key, value, gradient), device)
            except (RuntimeError, TypeError, ImportError) as error:  # also out of memory, or another flash-attn's API
                problems[name] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if number >= WARM_UP:
                times[name].append(milliseconds)
            query.grad = key.grad = value.grad = None
    medians = {name: round(statistics.median(taken), 4) for name, taken in times.items() if taken}
    return medians, "; ".join(problems.values())


def _both_passes(kernel: Kernel, *tensors: torch.Tensor) -> None:
    *inputs, gradient = tensors
    torch.autograd.backward(kernel(*inputs), gradient)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Milliseconds until the device has finished `work`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """flash-attn expects [batch, tokens, heads, width]."""
    flash_attn = importlib.import_module("flash_attn")
    by_token = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    output: torch.Tensor = flash_attn.flash_attn_func(*by_token, causal=True)
    return output.transpose(1, 2)


KERNELS: dict[str, Kernel] = {"flash_attention_2": _flash_attention, "sdpa": _sdpa}


def _earlier_measurements(file: Path) -> dict[str, Any]:
    """Earlier measurements; {} if the file is missing or damaged."""
    try:
        return read_json(file)
    except (UsageError, OSError):
        return {}


def _is_complete(measured: Any) -> bool:
    """Whether `measured` has a time for every kernel."""
    if not isinstance(measured, dict) or set(measured) != set(KERNELS):
        return False
    return all(is_kind(ms, "a number") and math.isfinite(ms) and ms > 0 for ms in measured.values())


# --- can flash-attn run? ---------------------------------------------------------------------------------------------


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
    except (Exception, SystemExit) as error:  # OSError: built for another torch or glibc; others are known too
        return f"flash-attn cannot be imported ({type(error).__name__}: {first_line(error)})"
    if not is_flash_attn_2_available():  # this also checks the package's metadata
        return "transformers does not recognise the installed flash-attn as version 2 of the package flash-attn"
    return None
