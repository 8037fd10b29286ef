"""How the language model's layers run in training: which recompute, what is compiled.

This changes results only by rounding, and trades memory for time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgvqa.model.peft_internals import without_input_casts
from surgvqa.model.sizes import require_layers
from surgvqa.model.torch_internals import configure_compiler


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's layers, with or without PEFT's wrapper."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: nn.ModuleList = base.model.language_model.layers
    return layers


class LayerForward:
    """Replaces a layer's `forward`. Runs it compiled or not and, if `recomputes`, again in training's backward pass.

    Then only the layer's input is kept. transformers' own `gradient_checkpointing` does the same for uncompiled layers,
    but since 5.23 it is part of the compiled graph, and torch keeps more than the input.
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
    """The LayerForward of each of the language model's layers, installed by the first call."""
    found: list[LayerForward] = []
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, LayerForward):
            vars(layer)["forward"] = LayerForward(layer)
        found.append(vars(layer)["forward"])
    return found


def checkpoint_layers(model: nn.Module, count: int | None = None) -> int:
    """Makes the first `count` layers (None: all) recompute their activations in the backward pass; returns how many do.

    The first ones, because the backward pass starts with the last layers and frees their activations before the first
    recomputation needs memory. May be called at any time. Raises UsageError for a count outside 0..layers.
    """
    found = forwards(model)
    count = len(found) if count is None else count
    require_layers(count, len(found))
    for number, forward in enumerate(found):
        forward.recomputes = number < count
    return count


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs layers uncompiled inside the context, because each new shape of a generation would be compiled."""
    found = forwards(model)
    compiled = [forward.compute for forward in found]
    for forward in found:
        forward.compute = forward.plain
    try:
        yield
    finally:
        for forward, compute in zip(found, compiled):
            forward.compute = compute


def compile_layers(model: nn.Module, keep: str = "all") -> None:
    """Compiles each layer separately (28 equal graphs compile once). A layer that fails to compile runs uncompiled.

    `keep` says what a layer that does not recompute keeps for the backward pass. With `products`, it keeps matrix
    products and attention and computes norms, dropout masks (from their seeds), SwiGLU and rotary positions again: the
    same values in about half the memory. Both work with any number of recomputing layers (`checkpoint_layers`).
    """
    configure_compiler(recompute_cheap=keep == "products")
    for forward in forwards(model):
        forward.compute = torch.compile(forward.plain)


def configure(model: nn.Module, *, recomputing: int, autocast: bool, keep: str | None) -> None:
    """Configures a model with an adapter for training: how many layers recompute, and what compiled layers keep.

    `autocast`: training runs under autocast. `keep` is None if nothing is compiled.
    """
    checkpoint_layers(model, recomputing)
    if autocast:
        without_input_casts(model)
    if keep is not None:
        compile_layers(model, keep)
