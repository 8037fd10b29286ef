"""Tests the connection of this machine's GPUs with the all-reduce that training uses, for doctor.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m surgvqa.machine.all_reduce

Rank 0 prints one JSON line. Without GPUs it uses gloo, for tests only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil

from surgvqa.machine.finding import Finding

MEGABYTES, TIMES = 256, 5
WITHIN_S = 90.0
"""Time limit; the test takes 15 s, mostly to start."""
SLOW_GB_PER_S = 2.0
"""At this speed, the gradients of LoRA rank 64 (0.66 GB) take a third of a second, as long as a sample."""


def check_all_reduce(count: int, cpu: bool = False) -> Finding:
    """Runs the all-reduce between `count` processes, one per GPU, or without GPUs if `cpu` is set."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "LOGLEVEL": "CRITICAL", "OMP_NUM_THREADS": "1"}
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    what = f"an all-reduce between {count} GPUs"
    hint = "NCCL_P2P_DISABLE=1 surgvqa doctor tries without peer-to-peer (often blocked by ACS or IOMMU in the BIOS)"
    with subprocess.Popen(
        [*words, "-m", __name__],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as torchrun:
        try:
            out, err = torchrun.communicate(timeout=WITHIN_S)
        except subprocess.TimeoutExpired:
            for rank in psutil.Process(torchrun.pid).children(recursive=True):  # they use the GPUs
                with contextlib.suppress(psutil.Error):
                    rank.kill()
            torchrun.kill()
            return Finding("GPUs together", "bad", f"{what} does not end within {WITHIN_S:.0f} s", hint)
    return read_output(what, hint, out, err)


def read_output(what: str, hint: str, out: str, err: str) -> Finding:
    """The finding from the output of the processes. `hint` says what to try."""
    for line in out.splitlines():
        try:
            rate = float(json.loads(line)["gb_per_s"])
        except (ValueError, KeyError, TypeError):
            continue
        text = f"{what}: {rate:.1f} GB/s each"
        if rate < SLOW_GB_PER_S:
            return Finding("GPUs together", "warn", f"{text}; training waits for it at each step", hint)
        return Finding("GPUs together", "ok", text)
    errors = [line.strip() for line in err.splitlines() if "Error" in line]
    why = errors[0][:200] if errors else "no reason given"
    return Finding("GPUs together", "bad", f"{what} fails: {why}", f"NCCL_DEBUG=INFO surgvqa doctor says more; {hint}")


def measure() -> dict[str, Any]:
    """Measures the GB/s that each rank sends and receives: 2 (n - 1) / n of the data, NCCL's "bus bandwidth"."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    count, size = dist.get_world_size(), (MEGABYTES if cuda else 4) * 1_000_000
    data = torch.ones(size // 4, device="cuda" if cuda else "cpu")
    dist.all_reduce(data)
    if data[-1].item() != count:
        raise RuntimeError(f"the sum of {count} ones is {data[-1].item():g}")
    began = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(data)
    data[-1].item()  # waits for the GPU
    seconds = (time.perf_counter() - began) / TIMES
    dist.destroy_process_group()
    return {"gb_per_s": 2 * (count - 1) / count * size / seconds / 1e9, "ranks": count}


if __name__ == "__main__":
    measured = measure()
    if os.environ["RANK"] == "0":
        print(json.dumps(measured), flush=True)
