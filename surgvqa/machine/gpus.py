"""`surgvqa gpus`: shows this machine's GPUs."""

from __future__ import annotations

import json
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, TypeVar

from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.machine.gpu import driver_problem, sample_devices, trouble
from surgvqa.outcome import Outcome

ANSWER_S = 30.0
"""Seconds that the driver has to answer: a cold start takes a few, and a lost card may block it for ever."""

T = TypeVar("T")


def answered(ask: Callable[[], T]) -> T:
    """What `ask` returns. Raises SurgvqaError when the driver blocks it for longer than ANSWER_S."""
    found: list[T] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            found.append(ask())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if failed:
        raise failed[0]
    if not found:
        raise SurgvqaError(
            f"the NVIDIA driver does not answer in {ANSWER_S:.0f} s: a GPU may have fallen off the bus; "
            "dmesg | grep Xid shows it, a restart of this machine mends it"
        )
    return found[0]


def run(arguments: Namespace, workspace: Any) -> Outcome:
    """`surgvqa gpus`: shows the GPUs once, or repeatedly with --watch (with --json, one document per line)."""
    every = getattr(arguments, "watch", None)
    if every is None:
        gpus, problem = answered(lambda: (sample_devices(), driver_problem()))
        data = {"gpus": gpus, **({"note": problem} if problem else {})}
        return Outcome(data, show=lambda console: console.print(draw(gpus, problem)))
    if not 0.05 <= every <= 3600:
        raise UsageError(f"--watch {every:g}: expected seconds between 0.05 and 3600")
    if arguments.json:
        while True:
            print(json.dumps({"t": round(time.time(), 3), "gpus": answered(sample_devices)}), flush=True)
            time.sleep(every)
    _watch(every)
    return Outcome({})


def _watch(every: float) -> None:
    """Redraws until Ctrl-C, which is not a failure."""
    from rich.live import Live

    from surgvqa.terminal.drawing import terminal

    def look() -> Any:
        return draw(*answered(lambda: (sample_devices(), driver_problem())))

    with Live(look(), console=terminal(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(look(), refresh=True)
        except KeyboardInterrupt:
            return


def draw(gpus: list[dict[str, Any]], problem: str | None = None) -> Any:
    """The GPUs as a rich renderable: a heading, two bars and the processes for each."""
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
