"""Saves what an out-of-memory error would lose: the state before a step, and tensors that are moved to the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from surgvqa.memory.out_of_memory import empty_cache


class OffloadedTensors:
    """The optimiser's states and the inputs of the current step, on the host from an error until work continues.

    Each of them is in a block that was free when it was allocated. While they are on the host, emptying the cache frees
    all blocks, and afterwards they are allocated contiguously.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []

    def put(self, holders: Iterable[dict[str, Any]], device: torch.device) -> None:
        """Moves the holders' tensors from the device to the host (shared ones once) and empties the cache."""
        places = [  # by key, because a reference to the tensor would keep its memory on the GPU
            (holder, name)
            for holder in holders
            for name, value in holder.items()
            if torch.is_tensor(value) and value.device.type == device.type
        ]
        on_host = {id(holder[name]): holder[name].to("cpu", copy=True) for holder, name in places}
        for holder, name in places:
            holder[name] = on_host[id(holder[name])]
        self._places += places
        empty_cache()

    def bring_back(self, device: torch.device) -> None:
        """Moves the tensors back to the device. If this runs out of memory, the next call moves the remaining ones."""
        came: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        while self._places:
            holder, name = self._places[-1]
            if name in holder:
                value = holder[name]
                if id(value) not in came:
                    came[id(value)] = value, value.to(device)
                holder[name] = came[id(value)][1]
            self._places.pop()


class OptimizerSnapshot:
    """A copy of trained parameters and optimiser states on the CPU: a step that runs out of memory changes some."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        def copy(value: Any) -> Any:
            return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value

        self.optimizer = optimizer
        self.parameters = [(p, copy(p)) for group in optimizer.param_groups for p in group["params"]]
        self.states = {p: {name: copy(value) for name, value in held.items()} for p, held in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the copy and deletes states that did not exist."""
        for parameter, before in self.parameters:
            parameter.copy_(before)
        for parameter in list(self.optimizer.state):
            if parameter not in self.states:
                del self.optimizer.state[parameter]
                continue
            held = self.optimizer.state[parameter]
            for name, before in self.states[parameter].items():
                if torch.is_tensor(before):
                    held[name].copy_(before)
                else:
                    held[name] = before
