"""The `gpu` events of a run: a thread that looks once a second at what the process takes."""

from __future__ import annotations

import threading
from typing import Any

from surgvqa.gpu import sample_process
from surgvqa.runs import Run


class MemorySampler:
    """Emits a `gpu` event every `every_s` seconds while it is entered, and remembers the most memory it saw.

    `device` is a torch.device. On a CPU the memory is the process's resident memory; on a GPU also what torch's
    allocator holds, which counts from 0 at the start.
    """

    def __init__(self, run: Run, device: Any, every_s: float = 1.0):
        self.run = run
        self.device = device
        self.every_s = every_s
        self.peak_process_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._emit()

    def peaks(self) -> dict[str, Any]:
        """For a result: peak_allocated_gb (on a CPU the peak of the resident memory) and peak_kind, which says so."""
        if self.device.type == "cuda":
            import torch

            return {
                "peak_allocated_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
                "peak_reserved_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
                "peak_kind": "cuda allocator",
            }
        return {"peak_allocated_gb": self.peak_process_bytes / 1e9, "peak_kind": "resident memory (CPU)"}

    def _sample_until_stopped(self) -> None:
        while not self._stop.is_set():
            self._emit()
            self._stop.wait(self.every_s)

    def _emit(self) -> None:
        if self.device.type == "cuda":
            import torch

            uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
            event = sample_process(self.device.index or 0, None if uuid is None else str(uuid))
            event["allocated_bytes"] = torch.cuda.memory_allocated(self.device)
            event["reserved_bytes"] = torch.cuda.memory_reserved(self.device)
            event["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
        else:
            event = sample_process(None)
        self.peak_process_bytes = max(self.peak_process_bytes, event.get("process_bytes", 0))
        self.run.emit("gpu", **event)
