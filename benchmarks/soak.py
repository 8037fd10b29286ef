"""Follows a very long run, and measures memory and processor time of the panel's follower at each tenth of the events.

    python benchmarks/soak.py [--events 1000000]

The file grows while it is followed, like a run of several days in fast-forward. At the end a new follower reads all of
it at once, like a panel that is started late. Exit code 1 when the follower's memory grows by more than 300 bytes per
event: the five curves of a training keep 16 bytes per point each, and everything else is bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from surgvqa.config.workspace import load_workspace
from tui.follow.follower import Follower
from tui.targets.local import LocalTarget

BYTES_AN_EVENT = 300
START = 1_790_000_000.0


def line(number: int, events: int) -> str:
    """The event `number`: every tenth is a GPU sample, every thousandth a checkpoint or a warning, the others steps."""
    kind: dict[str, object] = {"kind": "metric", "step": number, "total_steps": events, "loss": 1 + math.sin(number),
                               "learning_rate": 1e-4, "grad_norm": 0.5, "samples_per_s": 3.9}  # fmt: skip
    if number % 10 == 3:
        kind = {"kind": "gpu", "device": 0, "backend": "cuda", "process_bytes": 2e10 + number, "total_bytes": 8e10}
    elif number % 1000 == 7:
        kind = {"kind": "checkpoint", "step": number, "path": f"checkpoints/checkpoint-{number}"}
    elif number % 1000 == 9:
        kind = {"kind": "warning", "text": f"warning {number}"}
    return json.dumps({"v": 1, "t": START + number * 0.1, **kind}) + "\n"


async def soak(events: int, root: Path) -> bool:
    folder = root / "runs" / "20261201-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"v": 1, "id": folder.name, "command": "train", "started": START}))
    target, process = LocalTarget(load_workspace(root)), psutil.Process()
    follower, sizes, began = Follower(target, folder.name), [], time.process_time()
    for tenth in range(10):
        for part in range(10):
            first = (10 * tenth + part) * events // 100
            with open(folder / "events.jsonl", "a") as file:
                file.writelines(line(n, events) for n in range(first, first + events // 100))
            await follower.poll()
        sizes.append(process.memory_info().rss)
        seen, seconds = follower.model.events, time.process_time() - began
        print(
            f"{seen:>9,} events  {sizes[-1] / 1e6:6.0f} MB  {1e6 * seconds / seen:5.1f} us per event, written and read"
        )
    growth = (sizes[-1] - sizes[0]) / (0.9 * events)
    began = time.process_time()
    late = Follower(target, folder.name)
    await late.poll()
    same = late.model.events == follower.model.events and late.model.train.xs == follower.model.train.xs
    print(f"{growth:.0f} bytes an event; read at once: {time.process_time() - began:.1f} s, "
          f"{process.memory_info().rss / 1e6:.0f} MB with both, {'the same' if same else 'NOT THE SAME'}")  # fmt: skip
    return same and growth < BYTES_AN_EVENT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    with tempfile.TemporaryDirectory() as root:
        return 0 if asyncio.run(soak(parser.parse_args().events, Path(root))) else 1


if __name__ == "__main__":
    sys.exit(main())
