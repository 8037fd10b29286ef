"""What an out-of-memory error must not lose: the state before a step, and tensors that are on the host meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from surgvqa.memory.out_of_memory import empty_cache


class OffloadedTensors:
    """The optimiser's states and the inputs of the step in the making, on the host from an error until work goes on.

    Each of them lies in whatever block was free when it was made. While they are away the emptied cache gives
    everything back, and when they return they lie together.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []

    def put(self, holders: Iterable[dict[str, Any]], device: torch.device) -> None:
        """Their tensors on the device go to the host, one for all who share it, and the cache is emptied."""
        places = [  # by name: a tensor that is still referred to here would keep its place on the GPU
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
        """To the device. May run out of memory itself; what has not come then comes the next time."""
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
    """Trained parameters and the optimiser's states, on the CPU: an optimiser step that runs out of memory has changed
    some of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        def copy(value: Any) -> Any:
            return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value

        self.optimizer = optimizer
        self.parameters = [(p, copy(p)) for group in optimizer.param_groups for p in group["params"]]
        self.states = {p: {name: copy(value) for name, value in held.items()} for p, held in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """As it was; states that were not there are gone."""
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
