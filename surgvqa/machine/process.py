"""This process: its cores and its memory."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may run on; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The most memory this process has held, file pages included."""
    if sys.platform == "linux":
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]  # the kernel always has it
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
