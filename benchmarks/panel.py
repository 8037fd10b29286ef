"""Measures the cost of the panel: bytes to the terminal, CPU and memory, during a run and for each key.

    python benchmarks/panel.py [--seconds 15]

The panel and a minimal Textual app (one text, changed once a second) each run in a pseudo-terminal, with a workspace
in a temporary folder whose run writes a step and a GPU sample every second. CPU is the process's user and system time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SIZES = ((120, 36), (200, 60))
MINIMAL = """
from textual.app import App
from textual.widgets import Static
class Minimal(App):
    def compose(self):
        yield Static("0")
    def on_mount(self):
        self.n = 0
        self.set_interval(1.0, self.tick)
    def tick(self):
        self.n += 1
        self.query_one(Static).update(f"{self.n} {self.n * 0.37:.3f}")
Minimal().run()
"""


class Terminal:
    """A program in its own pseudo-terminal."""

    def __init__(self, argv: list[str], size: tuple[int, int], folder: Path) -> None:
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "HOME": str(folder)}
        for name in ("TMUX", "NO_COLOR", "XDG_CONFIG_HOME"):
            environment.pop(name, None)
        self.began = time.monotonic()
        self.process = subprocess.Popen(argv, stdin=side, stdout=side, stderr=side, env=environment,
                                        start_new_session=True)  # fmt: skip
        os.close(side)
        self.known = psutil.Process(self.process.pid)

    def read(self, seconds: float, each: Callable[[], object] = lambda: None) -> int:
        """Number of bytes read within `seconds`; `each` is called once a second."""
        total, end, next_call = 0, time.monotonic() + seconds, time.monotonic()
        while (now := time.monotonic()) < end:
            if now >= next_call:
                each()
                next_call += 1.0
            if select.select([self.main], [], [], 0.02)[0]:
                total += len(os.read(self.main, 1 << 16))
        return total

    def first_paint(self) -> float:
        """Seconds until the program first draws."""
        seen = b""
        while b"\x1b[" not in seen or len(seen) < 2000:
            seen += os.read(self.main, 1 << 16)
        return time.monotonic() - self.began

    def cpu(self) -> float:
        times = self.known.cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        return int(self.known.memory_info().rss)

    def press(self, keys: bytes) -> None:
        os.write(self.main, keys)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.main)


class LiveRun:
    """A running run: steps, GPU samples, and sometimes an evaluation."""

    def __init__(self, root: Path) -> None:
        from surgvqa.runs.folder import Run

        options = {"run_name": {"value": "measured", "from": "here"}, "budget_gb": {"value": 28.5, "from": "here"}}
        self.run = Run.create(root / "runs", "train", options=options)
        self.step = 0
        for _ in range(300):
            self.write_step()

    def write_step(self) -> None:
        self.step += 1
        step = self.step
        loss = 0.4 + 2.6 / (1 + step / 30) + 0.12 * math.sin(step * 2.4)
        self.run.emit("metric", step=step, total_steps=2000, loss=loss, learning_rate=1e-4 * (1 - step / 2000),
                      grad_norm=1 + 0.3 * math.sin(step), samples_per_s=4 + 0.1 * math.cos(step))  # fmt: skip
        self.run.emit("gpu", device=0, backend="cuda", name="NVIDIA H100", total_bytes=85.5e9,
                      process_bytes=26e9 + 1e7 * (step % 7), utilization_percent=90 + step % 9, temperature_c=60,
                      power_w=600 + step % 30)  # fmt: skip
        if step % 50 == 0:
            self.run.emit("eval", step=step, eval_loss=loss + 0.1)


def measure_idle(terminal: Terminal, seconds: float, each: Callable[[], object]) -> dict[str, float]:
    """Bytes per second, share of a core, and memory during a run."""
    cpu, began = terminal.cpu(), time.monotonic()
    total = terminal.read(seconds, each)
    took = time.monotonic() - began
    return {"kb_per_s": total / 1000 / took, "cpu_percent": 100 * (terminal.cpu() - cpu) / took,
            "rss_mb": terminal.rss() / 1e6}  # fmt: skip


def measure_key(terminal: Terminal, keys: list[bytes]) -> dict[str, float]:
    """Bytes and CPU per key, beyond those of the same time without keys."""
    cpu = terminal.cpu()
    idle = terminal.read(0.3 * len(keys))
    idle_cpu = terminal.cpu() - cpu
    cpu, total = terminal.cpu(), 0
    for key in keys:
        terminal.press(key)
        total += terminal.read(0.3)
    return {"kb_a_key": max(0.0, total - idle) / 1000 / len(keys),
            "cpu_ms_a_key": 1000 * max(0.0, terminal.cpu() - cpu - idle_cpu) / len(keys)}  # fmt: skip


def measure(size: tuple[int, int], seconds: float) -> dict[str, dict[str, float]]:
    """All figures at one size."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "surgvqa.toml").write_text('preset = "baseline-8f-512px"\n')
        found = {}
        minimal = Terminal([sys.executable, "-c", MINIMAL], size, root)
        found["minimal app"] = {"first_paint_s": minimal.first_paint()}
        minimal.read(2.0)
        found["minimal app"] |= measure_idle(minimal, seconds, lambda: None)
        minimal.end()
        run = LiveRun(root)
        panel = Terminal([sys.executable, "-m", "tui.main", "--workspace", str(root)], size, root)
        found["panel"] = {"first_paint_s": panel.first_paint()}
        panel.read(4.0)
        found["panel"] |= measure_idle(panel, seconds, run.write_step)
        down, up = b"\x1b[B", b"\x1b[A"
        for key, name in ((b"1", "merge"), (b"2", "upload"), (b"3", "train"), (b"4", "monitor")):
            panel.press(key)
            panel.read(4.0)
            found[f"a key on {name}"] = measure_key(panel, [down] * 6 + [up] * 6)
        panel.end()
    return found


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {f"{columns}x{rows}": measure((columns, rows), arguments.seconds) for columns, rows in SIZES}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for size, rows in found.items():
        for what, figures in rows.items():
            print(f"{size}  {what:<18}" + "  ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
