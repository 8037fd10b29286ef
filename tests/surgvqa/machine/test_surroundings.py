"""What the doctor says of memory, limits, disks and compiled modules, put in its mouth; and what jobs do about it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from surgvqa.machine import surroundings
from surgvqa.runs import bytecode


@pytest.fixture
def found(monkeypatch, tmp_path):
    """{name: finding} of a machine that lacks nothing but what is changed."""

    def examine(memory=(8e9, 128e9), shared=60e9, disk="ext4", limits=None, uncompiled=None):
        limits = limits or {}
        usage = {Path("/dev/shm"): SimpleNamespace(free=shared, total=64e9)}
        free = SimpleNamespace(free=500e9, total=1000e9)
        monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: usage.get(path, free))
        monkeypatch.setattr(surroundings, "host_memory", lambda: memory)
        disks = [SimpleNamespace(mountpoint="/", fstype="overlay"), SimpleNamespace(mountpoint="/home", fstype=disk)]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: disks)
        monkeypatch.setattr(Path, "home", lambda: Path("/home/anna"))
        monkeypatch.setattr(resource, "getrlimit", lambda number: limits.get(number, (-1, -1)))
        monkeypatch.setattr(bytecode, "uncompiled", lambda: uncompiled)
        listed = {finding.name: finding for finding in surroundings.surroundings(tmp_path)}
        assert all(finding.mend for finding in listed.values() if finding.status in ("warn", "bad"))
        return {name: finding for name, finding in listed.items() if finding.status != "ok"}

    return examine


def test_a_healthy_machine_has_nothing_to_mend(found):
    assert found() == {}


@pytest.mark.parametrize(
    ("changed", "name", "status", "mend"),
    [
        ({"memory": (127e9, 128e9)}, "RAM", "bad", "ps aux --sort -rss"),
        ({"memory": (1e9, 8e9)}, "RAM", "warn", "16 GB or more"),
        ({"shared": 64e6}, "shared memory", "warn", "--shm-size"),
        ({"disk": "nfs4"}, "home", "warn", "XDG_CACHE_HOME"),
        ({"disk": "fuse.sshfs"}, "home", "warn", "XDG_CACHE_HOME"),
        ({"limits": {resource.RLIMIT_NOFILE: (1024, 1048576)}}, "open files", "warn", "ulimit -n 65536"),
        ({"limits": {resource.RLIMIT_NOFILE: (256, 1024)}}, "open files", "warn", "limits.conf"),
        ({"limits": {resource.RLIMIT_AS: (8 << 30, -1)}}, "address space", "bad", "ulimit -v unlimited"),
        ({"limits": {resource.RLIMIT_FSIZE: (1 << 30, -1)}}, "size of a file", "bad", "ulimit -f unlimited"),
        ({"uncompiled": "PYTHONDONTWRITEBYTECODE is set"}, "start", "warn", "PYTHONPYCACHEPREFIX"),
    ],
)
def test_each_lack_is_named_with_the_way_to_mend_it(found, changed, name, status, mend):
    listed = found(**changed)
    assert list(listed) == [name] and listed[name].status == status and mend in listed[name].mend


def _package(folder: Path, compiled: bool) -> dict[str, str]:
    """A `torch` on a path of its own, and the environment that finds it."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = {n: v for n, v in environment.items() if n not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    if compiled:
        subprocess.run([sys.executable, "-c", "import torch"], env=environment, check=True)
    return environment


def _asked(environment: dict[str, str], said: str = "environment()") -> str:
    program = f"from surgvqa.runs import bytecode; bytecode.LARGE = ('torch',); print(bytecode.{said})"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("compiled", [True, False])
def test_only_modules_that_cannot_be_kept_go_elsewhere(tmp_path, compiled):
    environment = _package(tmp_path, compiled)
    assert _asked(environment) == "{}"  # compiled, or about to be
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    elsewhere = {"PYTHONPYCACHEPREFIX": f"{tmp_path}/cache/surgvqa/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    assert _asked(environment) == ("{}" if compiled else str(elsewhere))


def test_a_job_with_that_environment_finds_them_compiled(tmp_path):
    environment = {**_package(tmp_path, compiled=False), "PYTHONDONTWRITEBYTECODE": "1"}
    assert "PYTHONDONTWRITEBYTECODE is set" in _asked(environment, "uncompiled()")
    job = {**environment, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", "import torch"], env=job, check=True)
    assert list((tmp_path / "cache").rglob("torch/__init__.*.pyc"))
    assert _asked(job, "uncompiled()") == "None"
