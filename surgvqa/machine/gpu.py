"""Samples the GPUs through NVML (nvidia-ml-py) or, on a machine without a GPU, the process's host memory.

Any figure may be missing: MIG devices have no utilisation, containers hide other processes, passively cooled cards have
no fan. An unknown figure is absent, never zero and never an error. NVML stays initialised between samples, because
initialising takes up to a second and a sample well under a millisecond. Memory is in bytes, power in watts, temperature
in degrees Celsius.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
CHILDREN_EVERY_S = 5.0  # searching /proc for child processes is the slowest part of a host sample

_lock = threading.Lock()
_initialised = False


# --- the GPUs --------------------------------------------------------------------------------------------------------


def sample_devices() -> list[dict[str, Any]]:
    """One dict for each GPU or MIG instance: index, state, name, uuid, memory_used_bytes, memory_total_bytes,
    utilization_percent, power_w, power_limit_w, temperature_c, processes [{pid, used_bytes, name}], mig_index.

    `state` is "ok", "lost" (it fell off the bus, or needs a reset) or "failed" (NVML cannot open it, or cannot read its
    memory). A card that is not ok has `problem`, NVML's message. The index is NVML's and nvidia-smi's. Without a driver
    the list is empty, and `driver_problem` says why.
    """
    with _lock:
        if _initialise():
            return []
        return [_device_sample(found) for found in _devices()]


def any_gpu() -> bool:
    """Whether this machine has a GPU that a training could use."""
    with _lock:
        return not _initialise() and any(_device_sample(found)["state"] == "ok" for found in _devices())


def driver_problem() -> str | None:
    """Why NVML cannot list the GPUs, as a one-line message; None if it can."""
    with _lock:
        return _initialise() or _counting_problem()


def driver_version() -> tuple[str, str]:
    """(the driver's version, the newest CUDA that it supports, such as "12.4"); "" if unknown."""
    import pynvml

    if driver_problem():
        return "", ""
    cuda = _try(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return _text(_try(pynvml.nvmlSystemGetDriverVersion)) or "", f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""


def sample_process(device_index: int | None, uuid: str | None = None) -> dict[str, Any]:
    """The fields of a `gpu` event (surgvqa/runs/folder.py) for this process on one device.

    `device_index` is NVML's. `uuid` (torch.cuda.get_device_properties(i).uuid), if given, takes precedence, because
    CUDA_VISIBLE_DEVICES renumbers torch's devices. Both are None for a process on the CPU. In a container, NVML shows
    the host's process ids, so our own memory is unknown and absent. Other GPUs of the machine are in `other_gpus`:
    index, name, used_bytes, total_bytes, processes.
    """
    devices = [] if device_index is None and uuid is None else sample_devices()
    if not devices:
        return sample_host()
    for device in devices:
        same_uuid = uuid and device.get("uuid", "").removeprefix("GPU-") == str(uuid).removeprefix("GPU-")
        if same_uuid or (not uuid and device["index"] == device_index):
            own = [
                p["used_bytes"] for p in device.get("processes", []) if p["pid"] == os.getpid() and "used_bytes" in p
            ]
            return _without_unknown(
                device=device["index"],
                backend="cuda",
                problem=device.get("problem"),
                name=device.get("name"),
                process_bytes=sum(own) or None,
                used_bytes=device.get("memory_used_bytes"),
                total_bytes=device.get("memory_total_bytes"),
                utilization_percent=device.get("utilization_percent"),
                temperature_c=device.get("temperature_c"),
                power_w=device.get("power_w"),
                others=[p for p in device.get("processes", []) if p["pid"] != os.getpid()] if own else None,
                other_gpus=[_other_gpu(other) for other in devices if other is not device] or None,
            )
    broken = [_other_gpu(device) for device in devices if device["state"] != "ok"]  # may include the run's own
    return _without_unknown(device=device_index, backend="cuda", other_gpus=broken or None)  # otherwise NVML hides it


def _other_gpu(device: dict[str, Any]) -> dict[str, Any]:
    """The fields to show for a GPU that is not the run's own."""
    mig = f".{device['mig_index']}" if "mig_index" in device else ""
    return _without_unknown(
        index=f"{device['index']}{mig}",
        state=device["state"],
        problem=device.get("problem"),
        name=device.get("name"),
        used_bytes=device.get("memory_used_bytes"),
        total_bytes=device.get("memory_total_bytes"),
        processes=device.get("processes"),
    )


def _without_unknown(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _initialise() -> str | None:
    """Initialises NVML once. Returns the problem or None. Tries again at each call until it succeeds."""
    global _initialised
    if _initialised:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        _initialised = True
        return None
    except ImportError:
        return "nvidia-ml-py is not installed"
    except pynvml.NVMLError_LibraryNotFound:
        return "no NVIDIA driver (libnvidia-ml.so.1 not found)"
    except pynvml.NVMLError as error:
        return f"the NVIDIA driver does not answer: {error}"


def _try(function: Callable[..., Any], *arguments: Any) -> Any:
    """An NVML figure; None if it is unavailable for this device, driver or user."""
    import pynvml

    try:
        return function(*arguments)
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


@dataclass(frozen=True)
class _Device:
    """A device with its own memory: a card or one of its MIG instances."""

    index: int
    mig_index: int | None = None
    handle: Any = None
    card: Any = None
    """The handle of the whole card, for power and temperature."""
    problem: str = ""
    """Why the card could not be opened."""
    lost: bool = False


def _counting_problem() -> str | None:
    """Why the initialised driver cannot count its cards; None if it can. The next call initialises NVML again, since a
    driver that was reloaded knows nothing of us."""
    global _initialised
    import pynvml

    try:
        pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        _initialised = False
        return f"the NVIDIA driver does not answer: {error}"
    return None


def _is_lost(error: Exception) -> bool:
    """Whether NVML reports that the whole card is lost: it fell off the bus (Xid 79) or needs a reset."""
    import pynvml

    codes = [getattr(pynvml, name, None) for name in ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED")]
    return getattr(error, "value", -1) in codes or "lost" in str(error).lower()


def _is_unavailable(error: Exception) -> bool:
    """Whether NVML reports that a sound card does not have a figure, or that this user may not read it."""
    import pynvml

    names = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH")
    codes = [getattr(pynvml, f"NVML_ERROR_{name}", None) for name in names]
    return getattr(error, "value", None) in codes or "not supported" in str(error).lower()


def _devices() -> Iterator[_Device]:
    """Yields every device with its own memory and every card that could not be opened."""
    import pynvml

    for index in range(_try(pynvml.nvmlDeviceGetCount) or 0):
        try:
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            yield _Device(index, problem=str(error), lost=_is_lost(error))
            continue
        instances: list[_Device] = []
        mode = _try(pynvml.nvmlDeviceGetMigMode, card)
        if mode and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            for number in range(_try(pynvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0):
                instance = _try(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, card, number)
                if instance is not None:
                    instances.append(_Device(index, number, instance, card))
        yield from instances or [_Device(index, None, card, card)]


def _device_sample(found: _Device) -> dict[str, Any]:
    """The figures of one device; only the known ones if it is lost or failed."""
    import pynvml

    if found.problem:
        return {"index": found.index, "state": "lost" if found.lost else "failed", "problem": found.problem}
    device, card = found.handle, found.card
    failures: list[Exception] = []

    def figure(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UnicodeDecodeError:
            return None
        except pynvml.NVMLError as error:
            if _is_lost(error) or (function is pynvml.nvmlDeviceGetMemoryInfo and not _is_unavailable(error)):
                failures.append(error)
            return None

    named = _without_unknown(
        index=found.index,
        mig_index=found.mig_index,
        name=_text(figure(pynvml.nvmlDeviceGetName, device)),
        uuid=_text(figure(pynvml.nvmlDeviceGetUUID, device)),
    )
    memory = figure(pynvml.nvmlDeviceGetMemoryInfo, device)
    rates = figure(pynvml.nvmlDeviceGetUtilizationRates, device)
    power = figure(pynvml.nvmlDeviceGetPowerUsage, card)
    limit = figure(pynvml.nvmlDeviceGetEnforcedPowerLimit, card)
    celsius = figure(pynvml.nvmlDeviceGetTemperature, card, pynvml.NVML_TEMPERATURE_GPU)
    if failures:  # the driver still returns handles, and some figures, of a card that is gone
        lost = next(filter(_is_lost, failures), None)
        return {**named, "state": "lost" if lost else "failed", "problem": str(lost or failures[0])}
    return named | _without_unknown(
        state="ok",
        memory_used_bytes=memory and memory.used,
        memory_total_bytes=memory and memory.total,
        utilization_percent=rates and rates.gpu,
        power_w=power and power / 1000,
        power_limit_w=limit and limit / 1000,
        temperature_c=celsius,
        processes=_processes(device),
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _processes(device: Any) -> list[dict[str, Any]] | None:
    """Compute and graphics processes on a device, largest first; None if this user may not see them."""
    import pynvml

    lists = [
        _try(function, device)
        for function in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
    ]
    if all(found is None for found in lists):
        return None
    by_pid = {p.pid: p.usedGpuMemory for found in lists for p in found or []}
    listed = [_without_unknown(pid=pid, used_bytes=used, name=_process_name(pid)) for pid, used in by_pid.items()]
    return sorted(listed, key=lambda p: -p.get("used_bytes", 0))


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def trouble(gpu: dict[str, Any]) -> str:
    """What is wrong with a device that is not "ok", in NVML's words, such as "lost: GPU is lost"."""
    return f"{gpu.get('state')}: {gpu.get('problem', 'no reason given')}"


# --- the host --------------------------------------------------------------------------------------------------------


def sample_host() -> dict[str, Any]:
    """The fields of a `gpu` event for a process on the CPU: memory of it and its children, and the machine's."""
    used, total = host_memory()
    return {
        "device": 0,
        "backend": "host",
        "process_bytes": _process_memory(),
        "used_bytes": used,
        "total_bytes": total,
        "utilization_percent": psutil.cpu_percent(),
    }


_family: tuple[float, list[psutil.Process]] = (0.0, [])


def _process_memory() -> int:
    """Resident bytes of this process and of its children (data loader workers), without their shared pages."""
    global _family
    if time.monotonic() - _family[0] > CHILDREN_EVERY_S:
        _family = time.monotonic(), psutil.Process().children(recursive=True)
    total = psutil.Process().memory_info().rss
    for child in _family[1]:
        try:
            memory = child.memory_info()
            total += max(0, memory.rss - getattr(memory, "shared", 0))
        except psutil.Error:
            continue
    return total


def host_memory() -> tuple[int, int]:
    """(used, total) bytes of the machine, or of its control group (a container) if that has a lower limit."""
    machine = psutil.virtual_memory()
    used, total = machine.total - machine.available, machine.total
    for folder, limit_file, usage_file, cache_key in _cgroup_folders():
        limit = _read_number(folder / limit_file)
        usage = _read_number(folder / usage_file)
        if limit is not None and usage is not None and limit < total:
            total, used = limit, max(0, usage - _read_cache(folder / "memory.stat", cache_key))
    return used, total


def _cgroup_folders() -> Iterator[tuple[Path, str, str, str]]:
    """Yields the control groups of this process, innermost first: cgroups(7), versions 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = (
                CGROUP_ROOT / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            yield folder, *files
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _read_cache(file: Path, key: str) -> int:
    """Bytes of page cache that the kernel can reclaim."""
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key + " "))
    except (OSError, ValueError, StopIteration):
        return 0
