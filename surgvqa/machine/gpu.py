"""What the GPUs are doing, from NVML (nvidia-ml-py); on a machine without a GPU, how much host memory the process uses.

Any single figure may be missing: MIG devices have no utilisation, containers hide other processes, passively cooled
cards have no fan. What is unknown is absent, never zero and never an error. NVML stays initialised between samples:
initialising takes up to a second, a sample well under a millisecond. Memory is in bytes, power in watts, temperature
in degrees Celsius.
"""

from __future__ import annotations

import json
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome

CGROUP_ROOT = Path("/sys/fs/cgroup")
CHILDREN_EVERY_S = 5.0  # walking /proc for child processes is the slowest part of a host sample

_lock = threading.Lock()
_initialised = False


# --- the GPUs --------------------------------------------------------------------------------------------------------


def sample_devices() -> list[dict[str, Any]]:
    """One dict for each GPU or MIG instance: index, state, name, uuid, memory_used_bytes, memory_total_bytes,
    utilization_percent, power_w, power_limit_w, temperature_c, processes [{pid, used_bytes, name}], mig_index.

    `state` is "ok", "lost" (it fell off the bus, or needs a reset) or "failed" (NVML cannot open it); a card that is
    not ok has `problem`, NVML's own words. The index is NVML's (nvidia-smi's). No driver: an empty list;
    `driver_problem` says why.
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
    """Why NVML cannot list the GPUs, in one line; None when it can."""
    with _lock:
        return _initialise() or _counting_problem()


def driver_version() -> tuple[str, str]:
    """The driver's version and the newest CUDA that it runs ("12.4"); "" for what it does not say."""
    import pynvml

    if driver_problem():
        return "", ""
    cuda = _try(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return _text(_try(pynvml.nvmlSystemGetDriverVersion)) or "", f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""


def sample_process(device_index: int | None, uuid: str | None = None) -> dict[str, Any]:
    """The fields of a `gpu` event (surgvqa/runs/folder.py) for this process on one device.

    `device_index` is NVML's; `uuid` (torch.cuda.get_device_properties(i).uuid), when given, wins over it, because
    CUDA_VISIBLE_DEVICES renumbers what torch sees. None for both: a process that runs on the CPU.
    In a container NVML shows the host's process ids, so that our own memory there is unknown and absent.
    Further GPUs of the machine are in `other_gpus`: index, name, used_bytes, total_bytes, processes.
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
            return _known(
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
                other_gpus=[_short(other) for other in devices if other is not device] or None,
            )
    broken = [_short(device) for device in devices if device["state"] != "ok"]  # the run's own may be among them
    return _known(device=device_index, backend="cuda", other_gpus=broken or None)  # else NVML hides it


def _short(device: dict[str, Any]) -> dict[str, Any]:
    """The fields shown of a GPU that is not the run's own."""
    mig = f".{device['mig_index']}" if "mig_index" in device else ""
    return _known(
        index=f"{device['index']}{mig}",
        state=device["state"],
        problem=device.get("problem"),
        name=device.get("name"),
        used_bytes=device.get("memory_used_bytes"),
        total_bytes=device.get("memory_total_bytes"),
        processes=device.get("processes"),
    )


def _known(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _initialise() -> str | None:
    """Makes NVML ready once; returns the problem, or None. Tried again at each call until it succeeds."""
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
    """An NVML figure, or None where this device, driver or user has none."""
    import pynvml

    try:
        return function(*arguments)
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


@dataclass(frozen=True)
class _Device:
    """A device that has memory of its own: a card or a MIG instance of one."""

    index: int
    mig_index: int | None = None
    handle: Any = None
    card: Any = None
    """The handle of the whole card, which alone knows power and temperature."""
    problem: str = ""
    """Why the card could not be opened."""
    lost: bool = False


def _counting_problem() -> str | None:
    """Why the driver, once initialised, cannot count its cards."""
    import pynvml

    try:
        pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return f"the NVIDIA driver does not answer: {error}"
    return None


def _is_lost(error: Exception) -> bool:
    """Whether NVML says that the whole card is gone: it fell off the bus (Xid 79) or needs a reset."""
    import pynvml

    codes = [getattr(pynvml, name, None) for name in ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED")]
    return getattr(error, "value", -1) in codes or "lost" in str(error).lower()


def _devices() -> Iterator[_Device]:
    """Every device that has memory of its own, and every card that could not be opened."""
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
    """The figures of one device; of one that is lost or failed, what is known of it."""
    import pynvml

    if found.problem:
        return {"index": found.index, "state": "lost" if found.lost else "failed", "problem": found.problem}
    device, card = found.handle, found.card
    named = _known(
        index=found.index,
        mig_index=found.mig_index,
        name=_text(_try(pynvml.nvmlDeviceGetName, device)),
        uuid=_text(_try(pynvml.nvmlDeviceGetUUID, device)),
    )
    try:  # the driver goes on handing out handles of some cards that are gone
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    except pynvml.NVMLError as error:
        if _is_lost(error):
            return {**named, "state": "lost", "problem": str(error)}
        memory = None
    rates = _try(pynvml.nvmlDeviceGetUtilizationRates, device)
    power = _try(pynvml.nvmlDeviceGetPowerUsage, card)
    limit = _try(pynvml.nvmlDeviceGetEnforcedPowerLimit, card)
    return named | _known(
        state="ok",
        memory_used_bytes=memory and memory.used,
        memory_total_bytes=memory and memory.total,
        utilization_percent=rates and rates.gpu,
        power_w=power and power / 1000,
        power_limit_w=limit and limit / 1000,
        temperature_c=_try(pynvml.nvmlDeviceGetTemperature, card, pynvml.NVML_TEMPERATURE_GPU),
        processes=_processes(device),
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _processes(device: Any) -> list[dict[str, Any]] | None:
    """Compute and graphics processes on a device, largest first; None when this user may not see them."""
    import pynvml

    lists = [
        _try(function, device)
        for function in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
    ]
    if all(found is None for found in lists):
        return None
    by_pid = {p.pid: p.usedGpuMemory for found in lists for p in found or []}
    listed = [_known(pid=pid, used_bytes=used, name=_process_name(pid)) for pid, used in by_pid.items()]
    return sorted(listed, key=lambda p: -p.get("used_bytes", 0))


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


# --- the host --------------------------------------------------------------------------------------------------------


def sample_host() -> dict[str, Any]:
    """The `gpu` event of a process on the CPU: its memory with its children's, and the machine's."""
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
    """Resident bytes of this process and of its children (data loader workers) without the pages they share."""
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
    """(used, total) bytes of the machine, or of the control group's limit where that is tighter (a container)."""
    machine = psutil.virtual_memory()
    used, total = machine.total - machine.available, machine.total
    for folder, limit_file, usage_file, cache_key in _cgroup_folders():
        limit = _read_number(folder / limit_file)
        usage = _read_number(folder / usage_file)
        if limit is not None and usage is not None and limit < total:
            total, used = limit, max(0, usage - _read_cache(folder / "memory.stat", cache_key))
    return used, total


def _cgroup_folders() -> Iterator[tuple[Path, str, str, str]]:
    """The control groups that hold this process, innermost first: cgroups(7), versions 2 and 1."""
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


# --- the command -----------------------------------------------------------------------------------------------------


def run(arguments: Namespace, workspace: Any) -> Outcome:
    """`surgvqa gpus`: once, or with --watch again and again; with --json --watch one document a line."""
    every = getattr(arguments, "watch", None)
    if every is None:
        gpus = sample_devices()
        problem = driver_problem()
        data = {"gpus": gpus, **({"note": problem} if problem else {})}
        return Outcome(data, show=lambda console: console.print(draw(gpus, problem)))
    if not 0.05 <= every <= 3600:
        raise UsageError(f"--watch {every:g}: expected seconds between 0.05 and 3600")
    if arguments.json:
        while True:
            print(json.dumps({"t": round(time.time(), 3), "gpus": sample_devices()}), flush=True)
            time.sleep(every)
    _watch(every)
    return Outcome({})


def _watch(every: float) -> None:
    """Redraws until Ctrl-C, which is the way out and no failure."""
    from rich.live import Live

    from surgvqa.terminal.drawing import terminal

    with Live(draw(sample_devices(), driver_problem()), console=terminal(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(draw(sample_devices(), driver_problem()), refresh=True)
        except KeyboardInterrupt:
            return


def trouble(gpu: dict[str, Any]) -> str:
    """What is wrong with a device that is not "ok", in NVML's words: "lost: GPU is lost"."""
    return f"{gpu.get('state')}: {gpu.get('problem', 'no reason given')}"


def draw(gpus: list[dict[str, Any]], problem: str | None = None) -> Any:
    """The GPUs as a rich renderable: a heading, two bars and the processes of each."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from surgvqa.terminal.drawing import bar

    if not gpus:
        return Text(f"no GPU: {problem or 'the driver lists none'}")
    rows = Table.grid(padding=(0, 1))
    for gpu in gpus:
        mig = f".{gpu['mig_index']}" if "mig_index" in gpu else ""
        if gpu.get("state", "ok") != "ok":
            rows.add_row(Text(f"GPU {gpu['index']}{mig}", "bold"), Text(gpu.get("name", "")), Text(trouble(gpu), "red"))
            continue
        state = []
        if "temperature_c" in gpu:
            state.append(f"{gpu['temperature_c']} °C")
        if "power_w" in gpu:
            limit = f" of {gpu['power_limit_w']:.0f}" if "power_limit_w" in gpu else ""
            state.append(f"{gpu['power_w']:.0f}{limit} W")
        rows.add_row(
            Text(f"GPU {gpu['index']}{mig}", "bold"), Text(gpu.get("name", "?")), Text("  ".join(state), "dim")
        )
        used, total = gpu.get("memory_used_bytes"), gpu.get("memory_total_bytes")
        if used is not None and total:
            rows.add_row("  memory", bar(used / total), f"{used / 1e9:.1f} of {total / 1e9:.1f} GB")
        if "utilization_percent" in gpu:
            rows.add_row(
                "  busy", bar(gpu["utilization_percent"] / 100, alarm=False), f"{gpu['utilization_percent']} %"
            )
        for process in gpu.get("processes", []):
            name = process.get("name", "outside this container")
            taken = f"{process['used_bytes'] / 1e9:.1f} GB" if "used_bytes" in process else ""
            rows.add_row("", Text(f"pid {process['pid']} {name}", "dim"), Text(taken, "dim"))
    return Group(rows)
