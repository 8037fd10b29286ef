"""Emits a run's `gpu` events from a thread that samples memory once a second, and measures the peak of each phase."""

from __future__ import annotations

import threading
from typing import Any

from surgvqa.machine.gpu import sample_process
from surgvqa.runs.folder import Run

PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes")


class MemorySampler:
    """A context manager that emits a `gpu` event every `every_s` seconds and records peaks.

    `device` is a torch.device. On a CPU it samples the process's resident memory, on a GPU also the memory of torch's
    allocator. `measure` ends a phase: it emits a `memory` event with the phase's peaks and resets them.
    """

    def __init__(self, run: Run, device: Any, every_s: float = 1.0, budget_gb: float | None = None):
        self.run = run
        self.device = device
        self.every_s = every_s
        self.budget_gb = budget_gb
        self._most = dict.fromkeys(PEAKS, 0)
        self._most_of_phase = dict.fromkeys(PEAKS, 0)
        self._warned = False
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._reset_allocator()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._emit()

    def peaks(self) -> dict[str, Any]:
        """The run's peaks, after the context: peak_allocated_gb (on a CPU, of resident memory), and peak_kind, which
        says what was measured."""
        if self.device.type == "cuda":
            return {
                "peak_allocated_gb": self._most["peak_allocated_bytes"] / 1e9,
                "peak_reserved_gb": self._most["peak_reserved_bytes"] / 1e9,
                "peak_kind": "cuda allocator",
            }
        return {"peak_allocated_gb": self._most["peak_process_bytes"] / 1e9, "peak_kind": "resident memory (CPU)"}

    def measure(self, phase: str) -> None:
        """Ends `phase`: emits a `memory` event with its peaks in bytes. Warns once if a peak exceeds the budget."""
        self._emit()
        with self._lock:
            peaks = {name: found for name, found in self._most_of_phase.items() if found}
            self._most_of_phase = dict.fromkeys(PEAKS, 0)
            self._reset_allocator()
        self.run.emit("memory", phase=phase, budget_gb=self.budget_gb, **peaks)
        peak_gb = peaks.get("peak_allocated_bytes", 0) / 1e9
        if self.budget_gb and peak_gb > self.budget_gb and not self._warned:
            self._warned = True
            self.run.warning(f"{phase} took {peak_gb:.1f} GB; the budget is {self.budget_gb:g} GB")

    def _reset_allocator(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def _sample_until_stopped(self) -> None:
        while not self._stop.is_set():
            self._emit()
            self._stop.wait(self.every_s)

    def _emit(self) -> None:
        self.run.emit("gpu", **self._sample())

    def _sample(self) -> dict[str, Any]:
        """The fields of a `gpu` event, with the run's peaks so far."""
        with self._lock:
            if self.device.type == "cuda":
                import torch

                uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
                event = sample_process(self.device.index or 0, None if uuid is None else str(uuid))
                event["allocated_bytes"] = torch.cuda.memory_allocated(self.device)
                event["reserved_bytes"] = torch.cuda.memory_reserved(self.device)
                now = {
                    "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
                    "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
                }
            else:
                event, now = sample_process(None), {}
            now["peak_process_bytes"] = event.get("process_bytes") or 0
            for name, found in now.items():
                self._most[name] = max(self._most[name], found)
                self._most_of_phase[name] = max(self._most_of_phase[name], found)
            if self.device.type == "cuda":
                event |= self._most | {"peak_bytes": self._most["peak_reserved_bytes"]}
            return event
