"""How the language model's layers run in training: which recompute, what is compiled.

None of it changes what is computed beyond rounding; each buys time with memory or memory with time.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgvqa.model.sizes import require_layers
from surgvqa.model.torch_internals import configure_compiler


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's layers, also below PEFT's wrapper."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: nn.ModuleList = base.model.language_model.layers
    return layers


class LayerForward:
    """Stands as a layer's `forward`: computes it, compiled or not; if `recomputes`, in training again in the backward
    pass, for which then the layer's input alone is kept.

    transformers' own `gradient_checkpointing` would do where nothing is compiled. Since 5.23 it acts within what is
    compiled, and torch keeps more than the input.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.plain = self.compute = layer.forward
        self.recomputes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputes and self.layer.training:
            return checkpoint(self.compute, *args, use_reentrant=False, **kwargs)
        return self.compute(*args, **kwargs)


def forwards(model: nn.Module) -> list[LayerForward]:
    """What stands as `forward` of each of the language model's layers, put there by the first call."""
    found: list[LayerForward] = []
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, LayerForward):
            vars(layer)["forward"] = LayerForward(layer)
        found.append(vars(layer)["forward"])
    return found


def checkpoint_layers(model: nn.Module, count: int | None = None) -> int:
    """Lets `count` layers (None: all) recompute their activations in the backward pass; returns how many do.

    They are the first ones: the backward pass comes to the last layers first and frees what they kept before the first
    recomputation needs room. May change at any time. UsageError for a count outside 0..layers.
    """
    found = forwards(model)
    count = len(found) if count is None else count
    require_layers(count, len(found))
    for number, forward in enumerate(found):
        forward.recomputes = number < count
    return count


def compile_layers(model: nn.Module, keep: str = "all") -> None:
    """Compiles each layer by itself (28 equal graphs compile once). A layer that will not compile runs as it is.

    `keep`: what a layer that does not recompute keeps for the backward pass. With `products` that is matrix products
    and attention; norms, dropout masks (from their seeds), SwiGLU and rotary positions are computed again: the same
    values, about half the memory. Both go with any number of layers that recompute (`checkpoint_layers`).
    """
    configure_compiler(recompute_cheap=keep == "products")
    for forward in forwards(model):
        forward.compute = torch.compile(forward.plain)
