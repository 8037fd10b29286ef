"""The language model's layers, divided among ranks with FSDP2 (`--shard`), where the model does not fit one card.

Only the frozen weights are divided; the adapter is whole on every rank, as without. Each rank has a part of every
layer, and all of them gather a layer before its forward pass, and again before its backward pass. So every gather needs
all ranks, in the same order. They agree on each pass before it begins: a rank that has no sample for it, or that has
run out of memory in it, makes the pass's gathers all the same (`take_part`, `complete`). The ranks may therefore have
different numbers of samples, batches and tokens to generate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from surgvqa.model.layers import decoder_layers
from surgvqa.model.torch_internals import begin_divided, reset_divided
from surgvqa.runs.ranks import Ranks

GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class DividedLayers:
    """Keeps the ranks in step: each pass through the language model has the same gathers on all of them.

    A pass is forward through all layers, and back if gradients are computed.
    """

    def __init__(self, model: Any, ranks: Ranks, device: torch.device):
        """Divides `model`, which is on the host (with or without PEFT's wrapper), and moves what is not divided to
        `device`; token embeddings stay on the host, unless they are the head as well."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.ranks = ranks
        self.root: Any = base.model.language_model
        self.layers: list[Any] = list(decoder_layers(model))
        self._order: list[int] = []
        """Layers in the order of the current pass's gathers."""
        self._gathered = 0
        """How many of these gathers have begun."""
        whole = {p for p in model.parameters() if p.requires_grad}
        mesh = init_device_mesh(device.type, (ranks.count,))
        for layer in self.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
            layer.set_custom_all_gather(self)
        # The root has no weights of its own to divide; it lets a layer be gathered while the one before is computed.
        fully_shard(self.root, mesh=mesh, ignored_params=set(self.root.parameters()))
        begin_divided(self.root)
        embeddings = base.get_input_embeddings().weight
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor) and (tensor is not embeddings or tensor is base.lm_head.weight):
                tensor.data = tensor.data.to(device)
        base.divided = True
        self.root.register_forward_pre_hook(self._begin, prepend=True)  # before FSDP2 begins the pass
        self.take_part(backward=False)  # makes the whole layers' tensors, which must not be first made for inference
        ranks.passes = self
        if device.type == "cuda":
            ranks.watch(mesh.get_group().abort)

    def _begin(self, *_: object) -> None:
        self.complete()
        self._expect(self.ranks.begin_pass(torch.is_grad_enabled()))

    def _expect(self, backward: bool) -> None:
        there = list(range(len(self.layers)))
        if self._order == there:  # FSDP2 gathers ahead in the order of all passes since the last one with gradients
            reset_divided(self.root)
        self._order = there + (there[::-1] if backward else [])
        self._gathered = 0

    def take_part(self, backward: bool) -> None:
        """A pass without a sample."""
        self._expect(backward)
        self.complete()

    def complete(self) -> None:
        """Makes the gathers that are left of a pass that was interrupted, or that needed no gradient of some layers."""
        if self._gathered == len(self._order):
            return
        reset_divided(self.root)
        for number in self._order[self._gathered :]:
            layer: FSDPModule = self.layers[number]
            layer.unshard()
            layer.reshard()

    # --- what FSDP2 gathers with -------------------------------------------------------------------------------------

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Gathers, and counts it."""
        if self._gathered == len(self._order):
            raise RuntimeError("FSDP2 gathers more often than a pass does: the other ranks would not")
        self._gathered += 1
        return GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
