"""The environment of a job: memory, shared memory, limits, disks, Python's bytecode cache. For doctor."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from surgvqa.machine.finding import Finding
from surgvqa.machine.gpu import host_memory
from surgvqa.runs import bytecode

FREE_GB = 40.0  # a merged checkpoint (18 GB), adapters and a feature cache, without the merge's inputs
RAM_GB = 16.0
"""Host memory in GB that a training of the real model needs: embeddings, data workers, page cache."""
SHARED_GB = 1.0
"""Size of /dev/shm in GB, which data workers use to pass batches. Docker's default is 64 MB."""
OPEN_FILES = 4096
"""Limit of open files. Each data worker, each shard and each batch in shared memory needs one."""
NETWORK_DISKS = ("nfs", "cifs", "smb", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p")


def surroundings(root: Path) -> Iterator[Finding]:
    """Yields the findings for a workspace at `root`."""
    yield disk(root)
    yield _memory()
    yield from _shared_memory(Path("/dev/shm"))
    yield from _network_disk("home", Path.home())
    yield from _limits()
    yield from _bytecode()


def disk(root: Path) -> Finding:
    """Whether there is enough disk space for a merge and for adapters."""
    usage = shutil.disk_usage(root)
    text = f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} GB at {root}"
    if usage.free < 1e9:
        mend = f"not even an adapter's checkpoint fits; du -xh --max-depth 2 {root} | sort -h shows what is large"
        return Finding("disk", "bad", text, mend)
    if usage.free < FREE_GB * 1e9:
        return Finding(
            "disk", "warn", text, f"a merge of the real model needs {FREE_GB:.0f} GB; each adapter takes 1 GB"
        )
    return Finding("disk", "ok", text)


def _memory() -> Finding:
    used, total = host_memory()
    text = f"{(total - used) / 1e9:.0f} GB free of {total / 1e9:.0f} GB"
    if total - used < 2e9:
        return Finding("RAM", "bad", text, "end large processes (ps aux --sort -rss | head), or use a larger machine")
    if total < RAM_GB * 1e9:
        return Finding("RAM", "warn", text, f"the real model trains with {RAM_GB:.0f} GB or more; the demo needs 4 GB")
    return Finding("RAM", "ok", text)


def _shared_memory(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():  # macOS does not have or need it
        return
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 1e9:.2f} GB free of {usage.total / 1e9:.2f} GB at {folder}"
    if usage.free < SHARED_GB * 1e9:
        mend = "docker run --shm-size=8g …, or mount -o remount,size=8G /dev/shm: data workers share batches there"
        yield Finding("shared memory", "warn", text, mend)


def _network_disk(name: str, folder: Path) -> Iterator[Finding]:
    kind = file_system(folder)
    if kind.startswith(NETWORK_DISKS):
        mend = "export XDG_CACHE_HOME=/a/local/disk (compiled kernels and locks go there), and keep the workspace local"
        text = f"{folder} is on a network disk ({kind}): compiling and locking are slow there"
        yield Finding(name, "warn", text, mend)


def file_system(folder: Path) -> str:
    """The type of a folder's file system; "" if unknown."""
    best = ("", "")
    for mounted in psutil.disk_partitions(all=True):
        point = mounted.mountpoint
        if len(point) > len(best[0]) and (folder == Path(point) or Path(point) in folder.parents):
            best = (point, mounted.fstype)
    return best[1]


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < OPEN_FILES:
        allowed = most if 0 <= most < OPEN_FILES else 65536
        raised = f"ulimit -n {allowed}" + (", or nofile in /etc/security/limits.conf" if allowed < OPEN_FILES else "")
        yield Finding("open files", "warn", f"only {files} may be open at once; data workers may need more", raised)
    for number, what, unit, least in (
        (resource.RLIMIT_AS, "address space", "-v", 64e9),
        (resource.RLIMIT_FSIZE, "size of a file", "-f", 5e9),
    ):
        limit, _ = resource.getrlimit(number)
        if 0 <= limit < least:
            text = f"limited to {limit / 1e9:.1f} GB, expected {least / 1e9:.0f} GB or no limit"
            yield Finding(what, "bad", text, f"ulimit {unit} unlimited")


def _bytecode() -> Iterator[Finding]:
    why = bytecode.uncompiled()
    if why:
        yield Finding(
            "start",
            "warn",
            f"{why}: every start compiles it again, which adds about 8 s",
            f"export PYTHONPYCACHEPREFIX={bytecode.cache_folder()} and unset PYTHONDONTWRITEBYTECODE; detached runs do "
            "so by themselves",
        )
