"""How the language model's layers run in training: which recompute, in which dtype LoRA computes, what is compiled.

None of it changes what is computed beyond rounding; each buys time with memory or memory with time.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgvqa.model.sizes import require_layers


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's layers, also below PEFT's wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.language_model.layers


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
    layers = decoder_layers(model)
    for layer in layers:
        if not isinstance(layer.forward, LayerForward):
            layer.forward = LayerForward(layer)
    return [layer.forward for layer in layers]


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


def lora_without_casts(model: nn.Module) -> None:
    """LoRA matrices stay float32, their inputs stay as they come.

    PEFT casts every LoRA input to the adapter's float32; under bf16 autocast the matmul casts it back. Leaving both out
    changes no bit and saves a float32 copy of every layer's input. Only for use under autocast.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def compile_layers(model: nn.Module, keep: str = "all") -> None:
    """Compiles each layer by itself (28 equal graphs compile once). A layer that will not compile runs as it is.

    `keep`: what a layer that does not recompute keeps for the backward pass. With `products` that is matrix products
    and attention; norms, dropout masks (from their seeds), SwiGLU and rotary positions are computed again: the same
    values, about half the memory. Both go with any number of layers that recompute (`checkpoint_layers`).
    """
    import torch._dynamo
    import torch._functorch.config

    from surgvqa.model import dropout_seeds

    torch._dynamo.config.suppress_errors = True  # fall back to eager, with torch's own warning
    # One graph serves all layers, their parameters are its inputs. But transformers' way to flash-attn reads a layer's
    # number: taken for a constant, every layer would need a graph of its own, and at recompile_limit the others would
    # run uncompiled.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # 8 by default, too few for all the kinds: a layer recomputes or not, is the first (whose input needs no gradient)
    # or not, runs in training or in evaluation, with rows of the first length or of any other.
    torch._dynamo.config.recompile_limit = 32
    torch._functorch.config.aggressive_recomputation = keep == "products"
    dropout_seeds.keep()
    for forward in forwards(model):
        forward.compute = torch.compile(forward.plain)


def start_compiler() -> None:
    """Starts inductor's worker processes: they take seconds to import torch, and until they are there kernels are
    compiled one after another in this process."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def compilations() -> dict[str, int]:
    """What torch.compile has done so far in this process.

    graphs: compiled; recompiles: those of them that were needed because an earlier one did not fit what came, another
    length for instance; graph_breaks: places within a layer where it goes on in plain Python; compile_failures: what it
    gave up, after an error or at torch._dynamo.config.recompile_limit, and now runs uncompiled.
    """
    import torch._dynamo.utils as dynamo

    attempts = dynamo.get_compilation_metrics()
    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"],
        "recompiles": sum(bool(attempt.recompile_reason) and not attempt.fail_type for attempt in attempts),
        "graph_breaks": sum(dynamo.counters["graph_break"].values()),
        "compile_failures": sum(bool(attempt.fail_type) for attempt in attempts),
    }
