"""The cores and the memory of this process."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def usable_cores() -> int:
    """Number of cores that this process may use; its share of them if torchrun has started several processes.

    On macOS, which has no affinity, the number of all cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(here))) if here.isdecimal() else cores


def peak_rss_bytes() -> int:
    """The process's peak resident memory in bytes, including file pages."""
    if sys.platform == "linux":
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]  # the kernel always writes this line
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
